"""PyTorch's exporter without what it works out anew for every export, most of the time of exporting a tiny net."""

import copy
import functools
import itertools
import sys
import types
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import onnx_ir
import torch
import torch.export
from torch import Tensor
from torch._export import utils as export_utils
from torch.onnx._internal.exporter import _core, _registration

from lightning_quant.numerics.decomposed import define_operators


class _Unread:
    """Stands for a type in annotations that nothing reads, where building them is half of a function's work."""

    def __class_getitem__(cls, item: Any) -> None:
        return None


# What the latest programs became, by all but the values of their weights.
_LARGEST = 200
_translated: dict[Hashable, Any] = {}


def translate_anew() -> None:
    """Let the exporter translate again what it has translated: for tests of the exporter itself."""
    _translated.clear()


@functools.cache
def make_exports_quick() -> None:
    """Let the exporter list operators once in a process, and translate programs that only differ in weights once."""
    # Registers operators that would be missing from the list if a test of other recipes came first.
    define_operators()
    _registration.ONNXRegistry.from_torchlib = staticmethod(functools.cache(_registration.ONNXRegistry.from_torchlib))
    _list_operators_once()
    _register_quickly()
    if hasattr(onnx_ir.Model, "clone"):
        _translate_once()


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


def _translate_once() -> None:
    prepare, translate = _core._prepare_exported_program_for_export, _core._exported_program_to_onnx_program

    def prepare_once(program: Any, *, registry: Any) -> Any:
        key, given = _key(program, registry), dict(_tensors(program))
        prepared = program if key in _translated else prepare(program, registry=registry)
        kept = dict(_tensors(prepared))
        known = key is not None and all(kept.get(name) is tensor for name, tensor in given.items())
        prepared.translation = (key, given) if known else None
        return prepared

    def translate_once(program: Any, *, registry: Any, **options: Any) -> Any:
        key, given = getattr(program, "translation", None) or (None, {})
        if key in _translated:
            model = _copy(_translated[key])
            _fill(model, given)
            return _core._onnx_program.ONNXProgram(model, program)
        made = translate(program, registry=registry, **options)
        if key is not None:
            if len(_translated) == _LARGEST:
                del _translated[next(iter(_translated))]
            _translated[key] = _copy(made.model)
            _fill(_translated[key], dict.fromkeys(given))
        return made

    _core._prepare_exported_program_for_export, _core._exported_program_to_onnx_program = prepare_once, translate_once


def _copy(model: Any) -> Any:
    """Return a copy, whose names go on counting where those of the model stand."""
    copied = model.clone()
    copied.graph._name_authority = copy.deepcopy(model.graph._name_authority)
    return copied


def _tensors(program: Any) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(program.named_parameters(), program.named_buffers(), program.constants.items())


def _fill(model: Any, tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if name in model.graph.initializers:
            stored = None if tensor is None else _core.TorchTensor(tensor, name=name)
            model.graph.initializers[name].const_value = stored


def _key(program: Any, registry: Any) -> Hashable | None:
    """Return all that the translation depends on; None where that is not known."""
    tensors = list(_tensors(program))
    if not all(isinstance(tensor, Tensor) and not tensor.dtype.is_complex for _, tensor in tensors):
        return None
    signature = str(program.graph_signature), str(program.range_constraints)
    parts: list[Hashable] = [signature, tuple((name, *_form(tensor)) for name, tensor in tensors)]
    # What a graph makes of constants may depend on their values.
    parts += [tuple(tensor.flatten().tolist()) for tensor in program.constants.values()]
    for name, module in program.graph_module.named_modules(remove_duplicate=False):
        if not isinstance(module, torch.fx.GraphModule):
            return None
        parts.append(name)
        parts += [_node_key(node, registry) for node in module.graph.nodes]
    return tuple(parts)


def _node_key(node: Any, registry: Any) -> Hashable:
    translations = registry.functions.get(node.target, ()) if node.op == "call_function" else ()
    written = tuple(id(translation.onnx_function) for translation in translations)
    scopes = str(list(node.meta.get("nn_module_stack", {}).values()))
    described = node.op, node.name, str(node.target), str(node.args), str(node.kwargs)
    return *described, written, scopes, _form(node.meta.get("val"))


def _form(value: Any) -> tuple[Hashable, ...]:
    if isinstance(value, Tensor):
        sizes = tuple(_form(size) for size in (*value.shape, *value.stride()))
        return *sizes, str(value.dtype), str(value.device), value.requires_grad
    if isinstance(value, tuple | list):
        return tuple(_form(item) for item in value)
    hint = value.node.hint if isinstance(value, torch.SymInt) and value.node.has_hint() else None
    return str(value), hint
