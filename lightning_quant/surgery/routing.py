"""Run something else in place of a module's forward, and copy modules without copying their weights.

The one mechanism for prepared graphs, simulations and artifacts: a callable object in the instance's `__dict__`. A
module assigned there would register as a child; a callable object leaves type, attributes and `state_dict` as they are.
"""

import copy
import itertools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from lightning_quant.errors import CaptureError, QuantizationError
from lightning_quant.surgery.compilation import Uncompiled, is_compiled


class Route:
    """Base of the callables that stand in a module's `__dict__` as `forward`."""


def route(module: nn.Module, target: Callable[..., Any]) -> None:
    """Let `module(...)` run `target(...)`; hooks of the module still run.

    Raises:
        QuantizationError: the module's forward is already routed elsewhere.
    """
    if not has_own_forward(module):
        raise QuantizationError(
            f"Expected {type(module).__name__} to have its own forward, but an instance attribute `forward` "
            f"({type(module.__dict__['forward']).__name__}) stands in its way. Remove it before quantizing."
        )
    module.__dict__["forward"] = target


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a module runs its class's forward; several processes leave that one on the instance, bound."""
    present = module.__dict__.get("forward")
    return present is None or getattr(present, "__func__", None) is type(module).forward


def unroute(module: nn.Module) -> None:
    """Give a module its own forward back; does nothing when it already has it."""
    module.__dict__.pop("forward", None)


def unroute_all(module: nn.Module) -> None:
    """Give every module of a tree its own forward back; what others put there stays."""
    for child in module.modules():
        if isinstance(child.__dict__.get("forward"), Route):
            unroute(child)


class _Copying(TorchFunctionMode):
    """Lets `copy.deepcopy` detach tensors, and put what a function makes of each in its place, wherever they hang."""

    def __init__(self, convert: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.convert = convert

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__deepcopy__ and id(args[0]) not in args[1]:
            tensor, memo = args
            converted = self.convert(tensor.detach())
            if not tensor.is_leaf or converted.device != tensor.device or converted.dtype != tensor.dtype:
                memo[id(tensor)] = converted if converted.data_ptr() != tensor.data_ptr() else converted.clone()
                return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def copied(value: Any, memo: dict[int, Any] | None = None, convert: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return a deep copy in which tensors with a history are detached, wherever they hang.

    PyTorch refuses to copy them: a loss, a metric's last value, attention maps that a module keeps in whatever object.
    `convert` may return another tensor for each, on another device say: the copy then holds that one. What nobody can
    copy, such as locks, open files, connections and generators, is shared.

    Raises:
        CaptureError: a module or tensor cannot be copied.
    """
    memo = {} if memo is None else memo
    before = dict(memo)
    while True:
        try:
            with _Copying(convert or (lambda tensor: tensor)):
                return copy.deepcopy(value, memo)
        # Whatever objects of a user's raise when they are asked for a copy.
        except Exception as error:
            culprit = _not_copied(error)
            if culprit is None or isinstance(culprit, nn.Module | Tensor) or id(culprit) in before:
                name = type(value if culprit is None else culprit).__name__
                raise CaptureError(
                    f"Expected {name} to be copied with `copy.deepcopy`, since all is tried on a copy, but {error!r}."
                ) from error
            before[id(culprit)] = culprit
            # What was begun holds parts of objects.
            memo.clear()
            memo.update(before)


def _not_copied(error: Exception) -> Any:
    """Return the innermost object whose copy an error ended; None where no copy was under way."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is copy.deepcopy.__code__]
    return frames[-1].f_locals["x"] if frames else None


def clone(module: nn.Module, *, unrouted: bool = False, convert: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Return an independent structural copy that shares the parameters' memory and owns its buffers and attributes.

    Data sets, loaders and arrays that hang on the module are shared, and what nobody can copy. Tensors with a history
    are detached. What `torch.compile` made is left out.

    Args:
        module: left as it is.
        unrouted: give every module of the copy its own forward, and copy nothing of what the original is routed to.
        convert: makes the tensors of the copy; those that it returns as they are, are shared or copied as ever.
    """
    memo: dict[int, Any] = {}
    compiled = [child for child in module.modules() if is_compiled(child)]
    for child in module.modules():
        for parameter in child._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = parameter if convert is None else convert(parameter)
        for value in pytree.tree_leaves(list(child.__dict__.values())):
            if isinstance(value, Dataset | DataLoader | np.ndarray) or (unrouted and isinstance(value, Route)):
                memo[id(value)] = value
            elif convert is not None and isinstance(value, nn.Parameter) and id(value) not in memo:
                memo[id(value)] = convert(value)
    for child in reversed(compiled):
        memo[id(child)] = Uncompiled(copied(child.get_submodule("_orig_mod"), memo, convert))
    duplicate = copied(module, memo, convert)
    _forget_compiled_steps(duplicate)
    if unrouted:
        unroute_all(duplicate)
    return duplicate


def _forget_compiled_steps(module: nn.Module) -> None:
    """Let a copy of a compiled LightningModule run its own methods: the compiled ones call the original."""
    if module.__dict__.get("_compiler_ctx") is None:
        return
    for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
        module.__dict__.pop(name, None)
    module.__dict__["_compiler_ctx"] = None


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module tree into eval mode, flag by flag, and put every flag back afterwards."""
    with _flags(module, training=False):
        yield


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Put a module tree into training mode, flag by flag, and put every flag back afterwards."""
    with _flags(module, training=True):
        yield


@contextmanager
def _flags(module: nn.Module, *, training: bool) -> Iterator[None]:
    flags = [(child, child.training) for child in module.modules()]
    for child, _ in flags:
        child.training = training
    try:
        yield
    finally:
        for child, before in flags:
            child.training = before


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run PyTorch's encoders layer by layer; their fused kernels call no layer and leave padded places out."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def as_exported() -> Iterator[None]:
    """Let code that asks go the way that it goes while an exporter looks at it.

    Transformers leave a mask out where a look at its values shows that it hides nothing, which an exporter cannot do:
    parts of them are then called with other arguments.
    """
    from torch._export.utils import _compiling_state_context

    with _compiling_state_context():
        yield


def resolve(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a dotted path; the empty path is the root itself."""
    module = root
    # `get_submodule` asks each attribute three times, which a training step would notice.
    for name in path.split(".") if path else ():
        children = dict(module._modules.items())  # Of TorchScript it has no `get`.
        child = children.get(name)
        if child is None:
            return root.get_submodule(path)
        module = child
    return module


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter or buffer; the CPU when it has none."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def fetch(root: nn.Module, name: str) -> Tensor:
    """Return the parameter, buffer or plain tensor attribute of a qualified name."""
    owner, _, attribute = name.rpartition(".")
    return getattr(resolve(root, owner), attribute)


@contextmanager
def shadowed(module: nn.Module, values: dict[str, Any]) -> Iterator[None]:
    """Let attributes of one instance hide its parameters or methods while a block runs."""
    before = {name: module.__dict__[name] for name in values if name in module.__dict__}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name in values:
            module.__dict__.pop(name)
        module.__dict__.update(before)


@contextmanager
def unparametrized(layer: nn.Module) -> Iterator[None]:
    """Let a layer be of its own class while a block runs; that of its parametrizations hides other weights."""
    parametrized = type(layer)
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    try:
        yield
    finally:
        layer.__class__ = parametrized


def call_watched(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hooks: list[Any]) -> None:
    """Call a module once in eval mode, layer by layer and with its own random numbers, and take away what watches it.

    Args:
        model: the float module.
        args: positional arguments.
        kwargs: keyword arguments.
        hooks: handles of what was registered on its layers.
    """
    try:
        with torch.random.fork_rng(devices=[]), evaluation_mode(model), without_fast_path():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def has_hooks(module: nn.Module) -> bool:
    """Tell whether calling the module runs hooks, which inlining it would skip."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def called_without_hooks(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Call a module without its hooks, which may keep what they see, or with them where the call needs them."""
    try:
        return module.forward(*args, **kwargs)
    except TypeError:
        if not has_hooks(module):
            raise
        return module(*args, **kwargs)
