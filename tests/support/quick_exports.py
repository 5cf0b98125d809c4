"""PyTorch's exporter without what it works out anew for every export, most of the time of exporting a tiny net."""

import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import onnx_ir
import torch
import torch.export
from torch import Tensor, fx, nn
from torch._export import utils as export_utils
from torch._ops import OperatorBase
from torch.onnx._internal.exporter import _core, _registration

from lightning_quant.calls.calls import ResultSpec
from lightning_quant.graph.named_edges import EdgeQuantizer
from lightning_quant.layers.storage import Scheme
from lightning_quant.numerics.decomposed import define_operators
from lightning_quant.runtimes._flat import Flat


class _Unread:
    """Stands for a type in annotations that nothing reads, where building them is half of a function's work."""

    def __class_getitem__(cls, item: Any) -> None:
        return None


# Scale and zero point of every node that quantizes or dequantizes a tensor, in a fixed order.
_Steps = list[tuple[float, int]]
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
# What the latest modules became, by all but the values of their weights and of their steps.
_LARGEST, _MOST_CONSTANTS = 300, 4096
_written: dict[Hashable, tuple[Any, _Steps, Any]] = {}
# Whether a test changes something that the exporter may meet: then each export is a real one.
for_real = False


def export_anew() -> None:
    """Let the exporter export again what it has exported: for tests of the exporter itself."""
    _written.clear()


@functools.cache
def make_exports_quick() -> None:
    """Let the exporter list operators once in a process, and export modules that differ in weights alone once."""
    # Registers operators that would be missing from the list if a test of other recipes came first.
    define_operators()
    _registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(_registration.ONNXRegistry.from_torchlib))
    _list_operators_once()
    _register_quickly()
    if hasattr(onnx_ir.Model, "clone"):
        torch.onnx.export = _exported_once(torch.onnx.export)


def _list_operators_once() -> None:
    collect = export_utils._collect_all_valid_cia_ops
    collected = functools.cache(lambda *_: collect())

    def collect_once() -> Any:
        keys = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
        return collected(tuple(torch._C._dispatch_get_all_op_names()), tuple(keys))

    for module in list(sys.modules.values()):
        # Lazy modules of other packages would load all that they have when asked.
        if getattr(module, "__dict__", {}).get("_collect_all_valid_cia_ops") is collect:
            module._collect_all_valid_cia_ops = collect_once


def _register_quickly() -> None:
    registering = torch._ops.OperatorBase.py_impl
    names = registering.__globals__ | {"Callable": _Unread}
    torch._ops.OperatorBase.py_impl = types.FunctionType(registering.__code__, names, registering.__name__)


def _exported_once(export: Callable[..., Any]) -> Callable[..., Any]:
    def once(flat: nn.Module, args: tuple[Tensor, ...], **options: Any) -> Any:
        steps: _Steps = []
        key = None if for_real else _key(flat, args, options, steps)
        if key in _written:
            model = _copy(_written[key][0])
            if _take_steps(model, _written[key][1], steps):
                _fill(model, dict(_tensors(flat)))
                return _core._onnx_program.ONNXProgram(model, _written[key][2])
        program = export(flat, args, **options)
        if key is not None and key not in _written and _is_of(program.model, flat, steps):
            if len(_written) == _LARGEST:
                del _written[next(iter(_written))]
            kept = _copy(program.model)
            _fill(kept, dict.fromkeys(dict(_tensors(flat))))
            _written[key] = kept, steps, _calls_of(program.exported_program)
        return program

    return once


def _calls_of(program: Any) -> Any:
    """Return what tells the calls of modules in which the nodes of a program were traced, without its tensors."""
    nodes = [
        types.SimpleNamespace(name=node.name, meta={"nn_module_stack": node.meta.get("nn_module_stack", {})})
        for node in program.graph.nodes
    ]
    return types.SimpleNamespace(graph=types.SimpleNamespace(nodes=nodes))


def _is_of(model: Any, flat: Any, steps: _Steps) -> bool:
    """Tell whether a model has the weights and steps of a module, and varies where it should."""
    tensors = dict(_tensors(flat))
    weights = {name: value.const_value for name, value in model.graph.initializers.items() if name in tensors}
    own = all(getattr(weight, "raw", None) is tensors[name] for name, weight in weights.items())
    fixed = any(
        isinstance(value.shape[dimension], int)
        for value in model.graph.inputs
        for dimension in flat.call.dynamic.get(value.name, {})
    )
    return own and not fixed and _take_steps(_copy(model), steps, steps)


def _copy(model: Any) -> Any:
    """Return a copy, whose names go on counting where those of the model stand."""
    copied = model.clone()
    copied.graph._name_authority = copy.deepcopy(model.graph._name_authority)
    return copied


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _fill(model: Any, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if name in model.graph.initializers:
            stored = None if tensor is None else _core.TorchTensor(tensor, name=name)
            model.graph.initializers[name].const_value = stored


def _take_steps(model: Any, old: _Steps, new: _Steps) -> bool:
    """Put new steps in the place of a model's own; return whether it is clear which is which."""
    pairs = dict(zip(old, new, strict=True))
    scales = {(before, after) for (before, _), (after, _) in zip(old, new, strict=True)}
    # Equal scales are one constant of the model.
    if len(pairs) < len(set(zip(old, new, strict=True))) or len(scales) != len(dict(scales)):
        return False
    if len(scales) != len({after for _, after in scales}):
        return False
    values: dict[Any, float] = {}
    for node in model.graph.all_nodes():
        made = [value.producer() for value in node.inputs[1:3] if value is not None]
        if node.op_type not in _QUANTIZING or not all(n is not None and n.op_type == "Constant" for n in made):
            continue
        step = pairs.get(tuple(n.attributes["value"].value.numpy().item() for n in made))
        uses = [use for n in made for use in n.outputs[0].uses()]
        if step is None or not all(use.node.op_type in _QUANTIZING for use in uses):
            return False
        if any(values.setdefault(constant, value) != value for constant, value in zip(made, step, strict=True)):
            return False
    for constant, value in values.items():
        dtype = constant.attributes["value"].value.numpy().dtype
        constant.attributes["value"] = onnx_ir.AttrTensor("value", onnx_ir.tensor(dtype.type(value)))
    return True


def _key(flat: Any, args: tuple[Tensor, ...], options: Mapping[str, Any], steps: _Steps) -> Hashable | None:
    """Return all that an export depends on, but for steps, which are collected; None where that is not known."""
    table = options["custom_translation_table"]
    parts: list[Hashable] = [
        *(str(flat.call.signature), flat.call.spec.key(), flat.call.names, str(flat.call.dynamic)),
        *(str(options["input_names"]), str(options["output_names"]), options["opset_version"], _form(list(args))),
        *(tuple(table.items()), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")),
    ]
    numbers: dict[int, int] = {}
    for name, module in flat.named_modules(remove_duplicate=False):
        described = _module(module, steps)
        if described is None:
            return None
        parts += [name, numbers.setdefault(id(module), len(numbers)), described]
    shared: dict[int, int] = {}
    parts += [(name, shared.setdefault(id(t), len(shared)), *_form(t)) for name, t in _tensors(flat)]
    return tuple(parts)


_OF_MODULES = frozenset(vars(nn.Module()))
_HOOKS = [name for name in _OF_MODULES if name.endswith("_hooks")]


def _module(module: nn.Module, steps: _Steps) -> Hashable | None:
    """Return what a module is beside its children and tensors; None where that is not known."""
    if any(vars(module).get(name) for name in _HOOKS):
        return None
    if isinstance(module, fx.GraphModule):
        return module.training, *(_node_key(node, steps) for node in module.graph.nodes)
    left_out = {*_OF_MODULES, "_flat_weight_refs"} | ({"call"} if isinstance(module, Flat) else set())
    attributes = {name: value for name, value in vars(module).items() if name not in left_out}
    if isinstance(module, EdgeQuantizer):
        scale, zero_point, *rest = attributes.pop("grid")
        steps.append(_step(scale, zero_point))
        attributes["grid"] = tuple(rest)
    described = {name: _described(value) for name, value in attributes.items()}
    return None if None in described.values() else (type(module), module.training, *sorted(described.items()))


def _step(scale: float, zero_point: int) -> tuple[float, int]:
    return float(torch.tensor(scale, dtype=torch.float32)), zero_point


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size, type)


def _described(value: Any) -> Hashable | None:
    """Return what an attribute of a module is to an export; None where that is not known."""
    if isinstance(value, _PLAIN):
        return type(value).__name__, repr(value), value if isinstance(value, type) else None
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType):
        return None if getattr(value, "__closure__", None) else value
    if isinstance(value, Tensor):
        known = value.is_meta or value.numel() <= _MOST_CONSTANTS
        return (_form(value), "" if value.is_meta else str(value.tolist())) if known else None
    if isinstance(value, inspect.Signature | ResultSpec | OperatorBase | Scheme):
        return str(value)
    if isinstance(value, nn.Module):
        forms = tuple((name, _form(tensor)) for name, tensor in _tensors(value))
        parts = [_module(module, []) for module in value.modules()]
        return None if None in parts else (forms, *parts)
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, list | tuple | set | frozenset):
        items = tuple(_described(item) for item in value)
        return None if None in items else (type(value).__name__, items)
    return None


def _node_key(node: fx.Node, steps: _Steps) -> Hashable:
    args = node.args
    if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
        steps.append(_step(*args[1:3]))
        args = (args[0], *args[3:])
    return node.op, node.name, node.target, str(args), str(node.kwargs)


def _form(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, str(value.device), value.requires_grad, type(value)
    return tuple(_form(item) for item in value)
