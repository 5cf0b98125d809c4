"""The signature of a captured call: which tensors go in under which names, and what is constant.

A call `(args, kwargs)` is bound to the forward's signature with its defaults, flattened, and split into tensors, which
become inputs of graphs and model files, and constants, which are baked in and must be the same in every later call.
"""

import inspect
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.calls.structures import CONSTANTS, named_leaves, reachable_tensors, register_structures
from lightning_quant.errors import CaptureError

# Containers whose structure is in the names of a call's tensors.
_PLAIN_CONTAINERS = (dict, list, tuple, OrderedDict, defaultdict, deque)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


# Input name to dimension to its name, of what may vary.
DynamicShapes = dict[str, dict[int, str]]


class Call(NamedTuple):
    """What one call of a module passes."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012, nobody writes into it

    def map(self, function: Callable[[Tensor], Any]) -> "Call":
        """Return the call with a function of every tensor in its place."""
        return Call(*map_tensors(function, tuple(self)))

    def detached(self) -> "Call":
        """Return the call with detached copies of its tensors, where they are."""
        return self.map(lambda tensor: tensor.detach().clone())


class _Immutable:
    """Shared by copies: PyTorch's tree specs cannot be deep-copied quietly, and need not be."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@dataclass(frozen=True)
class ResultSpec(_Immutable):
    """How leaves make up a result."""

    treespec: Any

    def build(self, leaves: list[Any]) -> Any:
        """Return the result made of these leaves."""
        return pytree.tree_unflatten(leaves, self.treespec)


@dataclass(frozen=True)
class CallSpec(_Immutable):
    """Shape of one call: `treespec` and, per leaf, an input's name or a constant.

    Attributes:
        treespec: how the leaves make up the bound arguments.
        names: one name per tensor leaf, from the argument and the path inside it ("batch.image" is "batch_image").
        positions: index of each tensor leaf among all leaves.
        constants: `(index, value)` of every other leaf.
    """

    treespec: Any
    names: tuple[str, ...]
    positions: tuple[int, ...]
    constants: tuple[tuple[int, Any], ...]

    def key(self) -> str:
        """Return a text equal for calls that one graph can serve."""
        return f"{self.treespec}|{self.positions}|{self.constants}"

    def arguments(self, tensors: list[Any]) -> dict[str, Any]:
        """Return the bound arguments with these tensors in place."""
        leaves: list[Any] = [None] * (len(self.positions) + len(self.constants))
        for index, value in self.constants:
            leaves[index] = value
        for index, tensor in zip(self.positions, tensors, strict=True):
            leaves[index] = tensor
        return pytree.tree_unflatten(leaves, self.treespec)


@dataclass(frozen=True)
class CapturedCall:
    """One real call of a module, and what of it may vary: all that exporters need beside the module.

    Attributes:
        signature: of the module's own forward.
        spec: what of the call is tensors and what is constant.
        tensors: the call's tensors; sizes of dynamic dimensions are only examples.
        dynamic: input name to dimension to its name, for dimensions that may vary.
    """

    signature: inspect.Signature
    spec: CallSpec
    tensors: list[Tensor]
    dynamic: DynamicShapes = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return self.spec.names

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors by name."""
        return {name: tuple(tensor.shape) for name, tensor in zip(self.names, self.tensors, strict=True)}

    def bind(self, tensors: Sequence[Tensor] | None = None) -> Call:
        """Return the call with these tensors in place of its own."""
        return rebuild_call(self.signature, self.spec.arguments(list(self.tensors if tensors is None else tensors)))


def flatten_call(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[CallSpec, list[Tensor]]:
    """Bind a call to a signature and return its spec and its tensors in order.

    Raises:
        CaptureError: the call does not fit the signature, or an argument is of a type that cannot be baked in.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(f"Expected a call that fits `forward{signature}`, but got one where {error}.") from error
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    register_structures(arguments)
    treespec = pytree.tree_structure(arguments)
    tensors, names, positions, constants = [], [], [], []
    for index, (path, leaf) in enumerate(named_leaves(arguments)):
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            names.append(_name(path))
            positions.append(index)
        elif isinstance(leaf, CONSTANTS):
            constants.append((index, leaf))
        else:
            raise CaptureError(
                f"Expected `{_name(path)}` to be made of tensors, numbers, strings, lists, dicts and dataclasses, "
                f"but got {type(leaf).__name__}. {_way_out(leaf)}"
            )
    return CallSpec(treespec, tuple(unique_names(names)), tuple(positions), tuple(constants)), tensors


def fits(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call can be bound to a signature."""
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def opaque_spec(value: Any) -> tuple[CallSpec, list[Tensor]]:
    """Return a spec of the tensors alone that a call of whatever objects holds: it cannot make other calls."""
    tensors = reachable_tensors(value)
    names = tuple(f"tensor_{index}" for index in range(len(tensors)))
    return CallSpec(pytree.tree_structure(tensors), names, tuple(range(len(tensors))), ()), tensors


def constant_names(spec: CallSpec, tensors: list[Tensor]) -> tuple[str, ...]:
    """Return the names of a call's constants, made as those of its tensors are."""
    paths = [path for path, _ in named_leaves(spec.arguments(tensors))]
    return tuple(unique_names([_name(paths[index]) for index, _ in spec.constants]))


def context_of(spec: CallSpec) -> str:
    """Return what classes of the user's carry in a call beside their tensors, as text; empty when there are none."""
    contexts: list[str] = []

    def visit(tree: Any) -> None:
        if tree.is_leaf():
            return
        if tree.type not in _PLAIN_CONTAINERS and not (isinstance(tree.type, type) and issubclass(tree.type, tuple)):
            contexts.append(f"{tree.type.__name__}({_ADDRESS.sub('', repr(tree.context))})")
        for child in tree.children():
            visit(child)

    visit(spec.treespec)
    return ", ".join(contexts)


def rebuild_call(signature: inspect.Signature, arguments: Mapping[str, Any]) -> Call:
    """Return the call that passes the bound arguments to a function of that signature.

    Arguments with defaults go by keyword: decorators, such as those of transformers, add some of them in that way.
    """
    bound = inspect.BoundArguments(signature, dict(arguments))
    args, kwargs = bound.args, bound.kwargs
    parameters = list(signature.parameters.values())
    if any(p.kind is p.VAR_POSITIONAL and arguments.get(p.name) for p in parameters):
        return Call(args, kwargs)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    needed = sum(p.kind is p.POSITIONAL_ONLY or p.default is p.empty for p in positional)
    by_name = {p.name: value for p, value in zip(positional[needed:], args[needed:], strict=True)}
    return Call(args[:needed], {**by_name, **kwargs})


def forward_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a forward, without annotations so that it can be compared and stored."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor of nested lists, tuples, dicts, dataclasses and objects that hold tensors."""
    register_structures(tree)
    return pytree.tree_map_only(Tensor, function, tree)


def _way_out(leaf: Any) -> str:
    """Return what to do about an argument that is no tensor."""
    if type(leaf).__module__ == "numpy":
        return "Pass `torch.from_numpy(...)` of it."
    if any(
        base.__module__.startswith("transformers.") and base.__name__.endswith("Cache") for base in type(leaf).__mro__
    ):
        return "Call without it and with `use_cache=False`, or pass keys and values as tensors."
    return "Quantize a child module that receives tensors; callbacks take its name as `module=...`."


def _name(path: tuple[str, ...]) -> str:
    return "_".join("".join(c if c.isalnum() else "_" for c in part) for part in path)


def unique_names(names: list[str]) -> list[str]:
    """Tell equal names apart by a number."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen.get(name, 0)
        seen[name] = count + 1
        result.append(name if count == 0 else f"{name}_{count}")
    return result


def spec_of(signature: inspect.Signature, call: Call, *, needs_program: bool) -> tuple[CallSpec, list[Tensor], str]:
    """Return a call's spec and tensors, and why it can be made in no other way than it was; empty where it can.

    Raises:
        CaptureError: it does not fit, or cannot be described although a program needs that.
    """
    try:
        return *flatten_call(signature, *call), ""
    except CaptureError as error:
        if needs_program or not fits(signature, *call):
            raise
        return *opaque_spec(call), str(error)
