"""From a module to an fx graph whose nodes carry stable keys, shapes, and the place in the user's code they come from.

The graph calls the user's own submodules by path, so it holds neither modules nor tensors. Tracing runs on a structural
clone under fake tensors: nothing of the user's module changes and nothing is computed.
"""

import inspect
import operator
import os
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import CallSpec, ResultSpec, rebuild_call
from lightning_quant.calls.structures import register_structures
from lightning_quant.errors import UntraceableError
from lightning_quant.graph.constants import keep_constants
from lightning_quant.graph.contractions import rewritten
from lightning_quant.graph.counting import counted_by, multiply_add_counter
from lightning_quant.graph.expansions import WHOLE, expansion_of, is_expanded, layer_read_by, transformers_traceable
from lightning_quant.graph.normalize import functionalize
from lightning_quant.graph.proxy import ShapedProxy, UnknownError, fake_of, settled
from lightning_quant.graph.recorded import functions_recorded, types_told
from lightning_quant.graph.side_effects import attributes, check_attributes
from lightning_quant.graph.size_conditions import decided, is_of_sizes
from lightning_quant.surgery.foreign_operators import ForeignOperatorsInlined
from lightning_quant.surgery.routing import called_without_hooks, clone, device_of, has_hooks, without_fast_path

_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class Traced:
    """A graph over flat tensors.

    Attributes:
        graph: placeholders are the call's tensors in order, the output is the flat list of result leaves.
        output_spec: how those leaves make up the result.
        opaque: path to reason of the modules that were left out because they cannot be traced.
    """

    graph: fx.Graph
    output_spec: ResultSpec
    opaque: dict[str, str]


class _StopError(Exception):
    """What comes after a module that cannot be traced cannot be, either: what that returns is not known."""


class _Tracer(fx.Tracer):
    def __init__(self, root: nn.Module, spec: CallSpec, tensors: list[Tensor], opaque: set[str]) -> None:
        super().__init__(param_shapes_constant=False)
        # The module may have moved since its call was captured, to a GPU for training or back: the call goes along.
        self.device = device_of(root)
        self.devices = {self.device, *(parameter.device for parameter in root.parameters())}
        self.proxy_buffer_attributes = True
        self.spec, self.tensors, self.opaque = spec, tensors, opaque
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.counter = multiply_add_counter()
        self.scopes: list[str] = [""]
        self.calls: dict[str, int] = defaultdict(int)
        self.counts, self.sites = defaultdict[Any, int](int), defaultdict[Any, int](int)
        self.output_spec: ResultSpec | None = None
        # Path of each module that turned out not to be traceable, with the reason.
        self.failures: dict[str, str] = {}
        # Whether values are being found out, and whether the forward makes a Python number of a proxy.
        self.propagating = self.numbers_asked = False

    def result_spec(self) -> ResultSpec:
        """Return how the traced leaves make up the result, once traced."""
        if self.output_spec is None:
            raise UntraceableError("forward returned nothing")
        return self.output_spec

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ShapedProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or has_hooks(m) or parametrize.is_parametrized(m):
            return True
        return isinstance(m, WHOLE) or (not is_expanded(m) and super().is_leaf_module(m, module_qualified_name))

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if not is_dataclass(a) or isinstance(a, type):
            return super().create_arg(a)
        # Calling the class with its fields, as fx does, is not what makes every dataclass.
        register_structures(a)
        leaves, treespec = pytree.tree_flatten(a)
        return self.create_node("call_function", _rebuilding(type(a), treespec), (self.create_arg(leaves),), {})

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.propagating or (m not in (self.submodule_paths or {}) and not [*m.parameters(), *m.buffers()]):
            # What forward itself makes, `nn.GELU()(x)` say, is no child to be called by path.
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        forward = expansion_of(m) or forward
        number = self.calls[path]
        self.calls[path] += 1
        self.scopes.append(path if number == 0 else f"{path}({number})")
        depth = len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except _StopError:
            raise
        except Exception as error:
            # The innermost forward that raised is at fault; fx itself raises another error on the way out.
            self.failures[path] = _reason(error)
            self.opaque.add(path)
            failed = error
            # fx takes off its stack what has returned alone, and the callers would be at fault.
            while len(self.module_stack) > depth:
                self.module_stack.popitem()
        finally:
            self.scopes.pop()
        # This graph is of no use, but what else cannot be traced is found on the same pass.
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy) and "unknown" in result.node.meta:
            raise _StopError from failed
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        return attr_val if self.propagating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self.spec.names]
        signature = inspect.signature(type(self.root).forward)

        def run(root: nn.Module, *inputs: Any) -> Any:
            own = {next(iter(signature.parameters)): root}
            args, kwargs = rebuild_call(signature, {**own, **self.spec.arguments(list(inputs))})
            expanded = expansion_of(root)
            result = type(root).forward(*args, **kwargs) if expanded is None else expanded(*args[1:], **kwargs)
            leaves, treespec = pytree.tree_flatten(result)
            self.output_spec = ResultSpec(treespec)
            return leaves

        return run, [self.root, *proxies]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **options: Any) -> fx.Proxy:
        if not torch.is_grad_enabled():
            raise UntraceableError("it switches gradients off for a part of itself")
        if kind.startswith("call_") and (equal := rewritten(target, args, kwargs, self.root)) is not None:
            return equal
        proxy = super().create_proxy(kind, target, args, kwargs, *more, **options)
        try:
            proxy.node.meta["fake"] = self._propagate(kind, target, args, kwargs)
            proxy.node.meta["multiply_adds"] = counted_by(self.counter)
        except UnknownError as error:
            proxy.node.meta["unknown"] = str(error)
        self._label(proxy.node)
        return settled(proxy, str(args[1]) if target is getattr else operation_name(proxy.node))

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta.get("fake")
        if not isinstance(value, bool | int | float) or not is_of_sizes(obj.node):
            return super().to_bool(obj)
        # What follows is right for calls of these sizes, as the graph says itself.
        self.create_proxy("call_function", decided, (obj, bool(value)), {})
        return bool(value)

    def _propagate(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            index = sum(1 for node in self.graph.nodes if node.op == "placeholder") - 1
            fake = self.mode.from_tensor(self.tensors[index].detach())
            return fake if fake.device in self.devices else fake.to(self.device)
        args, kwargs = pytree.tree_map(fake_of, (args, kwargs))
        self.propagating = True
        try:
            with self.mode, torch.no_grad(), warnings.catch_warnings(), self.counter, ForeignOperatorsInlined():
                warnings.simplefilter("ignore")
                if kind == "get_attr":
                    return operator.attrgetter(target)(self.root)
                if kind == "call_module":
                    return called_without_hooks(self.root.get_submodule(target), args, kwargs)
                if kind == "call_method":
                    return getattr(args[0], target)(*args[1:], **kwargs)
                return target(*args, **kwargs)
        except Exception as error:  # a missing shape costs metadata, which is checked where it is needed
            if kind == "call_module":
                return self._run_on_zeros(str(target), args, kwargs)
            raise UnknownError(f"{type(error).__name__}: {error}") from error
        finally:
            self.propagating = False

    def _run_on_zeros(self, path: str, args: Any, kwargs: Any) -> Any:
        """Find out what a module returns that asks for values, which fake tensors have not."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda fake: torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device), (args, kwargs)
        )
        try:
            with torch.no_grad(), self.counter:
                result = self.root.get_submodule(path).forward(*args, **kwargs)
        except Exception as error:
            raise UnknownError(f"{type(error).__name__}: {error}") from error
        return pytree.tree_map_only(Tensor, self.mode.from_tensor, result)

    def _label(self, node: fx.Node) -> None:
        scope = self.scopes[-1]
        if node.op == "call_module":
            name = base = str(node.target)
        else:
            base = operation_name(node)
            node.meta["scope"] = scope.partition("(")[0]
            layer = layer_read_by(node, self.root)
            # What the root does itself has the name of the root: see `plan.join`.
            name = layer or (f"{scope}.{base}" if scope else base if layer is None else f".{base}")
        count = self.counts[name]
        self.counts[name] += 1
        node.meta["key"] = name if count == 0 else f"{name}#{count}"
        site = (scope, base, _user_line() if node.op.startswith("call_") else None)
        node.meta["site"] = (*site, self.sites[site])
        self.sites[site] += 1


def trace(root: nn.Module, spec: CallSpec, tensors: list[Tensor], opaque: set[str] | None = None) -> Traced:
    """Trace a module under its present train and eval flags.

    A descendant whose own forward cannot be traced becomes one opaque call, and tracing goes on around it.

    Raises:
        UntraceableError: the root's own forward cannot be traced; the message says why.
    """
    reasons: dict[str, str] = {}
    device, numbers = device_of(root).type, False
    while True:
        copy = clone(root, unrouted=True)
        tracer = _Tracer(root, spec, tensors, {*(opaque or ()), *reasons})
        try:
            before = attributes(copy)
            told = functions_recorded(tracer), types_told(copy, numbers=numbers), transformers_traceable()
            uncast = torch.autocast(device, enabled=False)  # It keeps weights that it casts: those here are not real.
            with told[0], told[1], told[2], torch.enable_grad(), uncast, without_fast_path():
                graph = tracer.trace(copy)
            if not tracer.failures:
                check_attributes(before, copy)
                functionalize(graph, copy)
        except Exception as error:  # whatever a user's forward raises when run on proxies
            if tracer.numbers_asked > numbers:
                numbers = True
                continue
            failures = tracer.failures or getattr(error, "places", None) or {"": _reason(error)}
            if "" in failures or failures.keys() & reasons.keys():
                reason = failures.get("") or next(iter(failures.values()))
                raise UntraceableError(f"{type(root).__name__}.forward cannot be traced: {reason}") from error
            reasons |= failures
            continue
        if tracer.numbers_asked > numbers:
            numbers = True
            continue
        reasons |= tracer.failures
        if not tracer.failures:
            keep_constants(graph, copy, root)
            return Traced(graph, tracer.result_spec(), reasons)


def _reason(error: Exception) -> str:
    return str(error.__context__ or error).split("\n")[0]


def _rebuilding(kind: type, treespec: Any) -> Any:
    def rebuild(leaves: list[Any]) -> Any:
        return pytree.tree_unflatten(leaves, treespec)

    rebuild.__name__ = kind.__name__
    return rebuild


def operation_name(node: fx.Node) -> str:
    """Return a short name of what a node does: "add", "flatten", "conv2d"."""
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        return {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "truediv"}.get(name, name)
    return str(node.target)


def _user_line() -> tuple[str, int] | None:
    """Return file and line of the innermost frame of the user's code that led to the present operation."""
    frame = sys._getframe(3)
    while frame is not None and (frame.f_code.co_filename, frame.f_code.co_name) != (__file__, "run"):
        if not frame.f_code.co_filename.startswith((_TORCH, __file__)):
            # The code of a `torch.fx.GraphModule`, which is generated anew for every copy of it.
            is_generated = frame.f_code.co_filename.startswith("<eval_with_key>")
            return "" if is_generated else frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None
