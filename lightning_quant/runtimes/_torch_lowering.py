"""A QDQ graph rewritten for PyTorch's native quantized kernels (`torch.ops.quantized`), pattern by pattern.

Tensors of those kernels carry scale and zero point with them, so what only moves values takes them as they are. What
matches no pattern stays as it was: dequantize, float arithmetic, quantize. The result has calls of operators in the
namespaces `aten` and `quantized` alone, and in each node's `meta["edge"]` the name of the plan's edge that it computes.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from lightning_quant.errors import ExportError
from lightning_quant.graph.named_edges import EdgeNames
from lightning_quant.graph.operations import argument
from lightning_quant.runtimes._torch_steps import simplify

_ATEN, _QDQ, _NATIVE = torch.ops.aten, torch.ops.quantized_decomposed, torch.ops.quantized
_QUANTIZE, _DEQUANTIZE = _ATEN.quantize_per_tensor.default, _ATEN.dequantize.self
_CONVOLUTIONS = {
    _ATEN.conv1d.default: ("conv1d", 1),
    _ATEN.conv1d.padding: ("conv1d", 1),
    _ATEN.conv2d.default: ("conv2d", 2),
    _ATEN.conv2d.padding: ("conv2d", 2),
}
_KERNELS = {"conv1d": _NATIVE.conv1d.default, "conv2d": _NATIVE.conv2d.new, "linear": _NATIVE.linear.default}
_PREPACKS = {
    "conv1d": _NATIVE.conv1d_prepack.default,
    "conv2d": _NATIVE.conv2d_prepack.default,
    "linear": _NATIVE.linear_prepack.default,
}
_BINARY = {_ATEN.add.Tensor: _NATIVE.add.default, _ATEN.mul.Tensor: _NATIVE.mul.default}
# They give the same integers whether they are given integers or what those stand for.
_MOVES = frozenset({
    _ATEN.reshape.default, _ATEN.flatten.using_ints, _ATEN.unflatten.int, _ATEN.permute.default, _ATEN.transpose.int,
    _ATEN.squeeze.default, _ATEN.squeeze.dim, _ATEN.squeeze.dims, _ATEN.unsqueeze.default, _ATEN.contiguous.default,
    _ATEN.clone.default, _ATEN.pixel_shuffle.default, _ATEN.channel_shuffle.default, _ATEN.slice.Tensor,
    _ATEN.select.int, _ATEN.max_pool1d.default, _ATEN.max_pool2d.default, _ATEN.constant_pad_nd.default,
    _ATEN.pad.default, _ATEN.flip.default, _ATEN.repeat.default, _ATEN.expand.default, _ATEN.tile.default,
    _ATEN.repeat_interleave.self_int, _ATEN.pixel_unshuffle.default, _ATEN.index_select.default, _ATEN.narrow.default,
    _ATEN.movedim.int, _ATEN.movedim.intlist, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest3d.vec,
    _ATEN._upsample_nearest_exact2d.vec,
})  # fmt: skip
# The same, with several results.
_SPLITS = frozenset({
    _ATEN.split.Tensor, _ATEN.split_with_sizes.default, _ATEN.chunk.default, _ATEN.unbind.int,
    _ATEN.tensor_split.sections, _ATEN.tensor_split.indices,
})  # fmt: skip
# Kernels keep what they compute in an order of dimensions of their own, which `view` would refuse.
_RESHAPES = (_ATEN.view.default, _ATEN._unsafe_view.default)


def lower(graph_module: fx.GraphModule, names: EdgeNames) -> fx.GraphModule:
    """Rewrite an exported, functional QDQ graph; the module is changed and returned.

    Args:
        graph_module: of the exported program.
        names: of the quantizers in the module that was exported.

    Raises:
        ExportError: its activations have fewer than eight bits, which the kernels do not clip to.
    """
    graph = graph_module.graph
    simplify(graph)
    for node in graph.nodes:
        if node.target in _RESHAPES:
            node.target = _ATEN.reshape.default
    _name_native_tensors(graph, names)
    for node in list(graph.nodes):
        if node.target in _MOVES | _SPLITS and _is(node.args[0], _DEQUANTIZE) and _pads_integers(node):
            _move_in_integers(node)
    for node in list(graph.nodes):
        if node.target is _QUANTIZE:
            _quantize_before_moves(node)
    for node in list(graph.nodes):
        if node.target is _QUANTIZE:
            _lower_quantized(graph_module, node)
    for node in list(graph.nodes):
        if node.target is _QDQ.dequantize_per_channel.default:
            _keep_weight_stored(graph_module, node)
    graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    graph_module.recompile()
    return graph_module


def _name_native_tensors(graph: fx.Graph, names: EdgeNames) -> None:
    """Write QDQ nodes as those that make and read PyTorch's quantized tensors."""
    for node in list(graph.nodes):
        if node.target is _QDQ.quantize_per_tensor.default:
            source, scale, zero_point, low, high, dtype = node.args
            if (low, high, dtype) != (0, 255, torch.uint8):
                raise ExportError(
                    f"Expected activations in [0, 255] for the kernels of PyTorch, but got [{low}, {high}] in {dtype}. "
                    "Choose another runtime for recipes with fewer bits."
                )
            node.target, node.args = _QUANTIZE, (source, scale, zero_point, torch.quint8)
            node.meta["edge"] = names.of_fx(node)
        elif node.target is _QDQ.dequantize_per_tensor.default:
            node.target, node.args = _DEQUANTIZE, (node.args[0],)


def _move_in_integers(node: fx.Node) -> None:
    """Write `move(dequantize(x))` as `dequantize(move(x))`, and a `quantize` of that on the same grid as `move(x)`."""
    dequantize: Any = node.args[0]
    node.replace_input_with(dequantize, dequantize.args[0])
    for part in list(node.users) if node.target in _SPLITS else [node]:
        _dequantize_behind(part)


def _dequantize_behind(node: fx.Node) -> None:
    with node.graph.inserting_after(node):
        moved = node.graph.call_function(_DEQUANTIZE, (node,))
    moved.meta["val"] = node.meta.get("val")
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    for reader in list(moved.users):
        if reader.target is _QUANTIZE and _grid(node) == reader.args[1:3] and "edge" not in node.meta:
            node.meta["edge"] = reader.meta["edge"]
            reader.replace_all_uses_with(node)
            node.graph.erase_node(reader)


def _quantize_before_moves(node: fx.Node) -> None:
    """Write `quantize(move(y))` as `move(quantize(y))` where a kernel that answers in integers may stand before it."""
    moves = []
    source: Any = node.args[0]
    while source.target in _MOVES and len(source.users) == 1 and _pads_integers(source):
        moves.append(source)
        source = source.args[0]
    if not moves or source.target is not _ATEN.linear.default:
        return
    with node.graph.inserting_after(source):
        quantized = node.graph.call_function(_QUANTIZE, (source, *node.args[1:]))
    moves[-1].replace_input_with(source, quantized)
    moves[0].meta["edge"] = node.meta["edge"]
    node.replace_all_uses_with(moves[0])
    node.graph.erase_node(node)


def _lower_quantized(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a `quantize` and what it rounds by one kernel, where there is one."""
    source: Any = node.args[0]
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return
    lowering: Any = _lowering(source)
    with node.graph.inserting_before(node):
        lowered = None if lowering is None else lowering(graph_module, source, *node.args[1:3])
    if lowered is not None:
        if "edge" in node.meta:
            lowered.meta["edge"] = node.meta["edge"]
        node.replace_all_uses_with(lowered)
        node.graph.erase_node(node)


def _lowering(source: fx.Node) -> Callable[[fx.GraphModule, fx.Node, float, int], fx.Node | None] | None:
    if source.target in _CONVOLUTIONS:
        return _lower_convolution
    if source.target is _ATEN.linear.default:
        return _lower_linear
    if source.target in _BINARY:
        return _lower_binary
    if source.target is _ATEN.cat.default:
        return _lower_cat
    return _lower_leaky_relu if source.target is _ATEN.leaky_relu.default else None


def _lower_convolution(root: fx.GraphModule, node: fx.Node, scale: float, zero_point: int) -> fx.Node | None:
    kind, places = _CONVOLUTIONS[node.target]  # type: ignore[index]
    weight = _stored_weight(root, node.args[1])
    if not _is(node.args[0], _DEQUANTIZE) or weight is None:
        return None
    stride = _each(argument(node, 3, "stride", 1), places)
    padding = argument(node, 4, "padding", 0)
    dilation = _each(argument(node, 5, "dilation", 1), places)
    groups = argument(node, 6, "groups", 1)
    x: Any = node.args[0].args[0]  # type: ignore[union-attr]
    if isinstance(padding, str):
        sizes = weight.shape[2:]
        missing = [0 if padding == "valid" else d * (s - 1) for d, s in zip(dilation, sizes, strict=True)]
        if any(number % 2 for number in missing):
            # One more on the far side, as PyTorch has it.
            amounts = [side for number in reversed(missing) for side in (number // 2, number - number // 2)]
            x, missing = node.graph.call_function(_ATEN.constant_pad_nd.default, (x, amounts, 0)), [0] * places
        padding = [number // 2 for number in missing]
    options = (stride, _each(padding, places), dilation, groups)
    packed = node.graph.call_function(_PREPACKS[kind], (*_weight_and_bias(root, node), *options))
    return node.graph.call_function(_KERNELS[kind], (x, packed, scale, zero_point))


def _lower_linear(root: fx.GraphModule, node: fx.Node, scale: float, zero_point: int) -> fx.Node | None:
    x: Any = node.args[0]
    if not _is(x, _DEQUANTIZE) or _stored_weight(root, node.args[1]) is None or node.meta["val"].dim() < 2:
        return None
    packed = node.graph.call_function(_PREPACKS["linear"], tuple(_weight_and_bias(root, node)))
    return node.graph.call_function(_KERNELS["linear"], (x.args[0], packed, scale, zero_point))


def _lower_binary(root: fx.GraphModule, node: fx.Node, scale: float, zero_point: int) -> fx.Node | None:
    if node.kwargs or not all(_is(operand, _DEQUANTIZE) for operand in node.args):
        return None
    first, second = (operand.args[0] for operand in node.args)  # type: ignore[union-attr]
    if node.args[0].meta["val"].shape != node.meta["val"].shape:  # type: ignore[union-attr]
        # The kernel makes its result as large as its first operand, and warns where that was too small.
        both = node.graph.call_function(_ATEN.broadcast_tensors.default, ([first, second],))
        first = node.graph.call_function(operator.getitem, (both, 0))
    return node.graph.call_function(_BINARY[node.target], (first, second, scale, zero_point))  # type: ignore[index]


def _lower_cat(root: fx.GraphModule, node: fx.Node, scale: float, zero_point: int) -> fx.Node | None:
    tensors: Any = node.args[0]
    if not all(_is(tensor, _DEQUANTIZE) for tensor in tensors):
        return None
    integers = [tensor.args[0] for tensor in tensors]
    return node.graph.call_function(_NATIVE.cat.default, (integers, argument(node, 1, "dim", 0), scale, zero_point))


def _lower_leaky_relu(root: fx.GraphModule, node: fx.Node, scale: float, zero_point: int) -> fx.Node | None:
    x: Any = node.args[0]
    if not _is(x, _DEQUANTIZE):
        return None
    slope = argument(node, 1, "negative_slope", 0.01)
    return node.graph.call_function(_NATIVE.leaky_relu.default, (x.args[0], slope, False, scale, zero_point))


def _weight_and_bias(root: fx.GraphModule, node: fx.Node) -> list[Any]:
    """Return nodes of a weight as a quantized tensor, and of the bias in float, which the kernels quantize again."""
    weight: Any = node.args[1]
    bias: Any = argument(node, 2, "bias")
    if _is(bias, _QDQ.dequantize_per_channel.default):
        integers, step = (_fetch(root, argument.target) for argument in bias.args[:2])
        name = f"bias_of_{node.name}"
        root.register_buffer(name, integers.float() * step)
        bias = node.graph.get_attr(name)
    made = _as_native_weight(root, weight)
    return [made, bias]


def _keep_weight_stored(root: fx.GraphModule, node: fx.Node) -> None:
    """Write a weight or bias that no kernel takes up with PyTorch's own operators."""
    with node.graph.inserting_before(node):
        if _fetch(root, node.args[0].target).dtype is torch.int8:  # type: ignore[union-attr]
            replacement = node.graph.call_function(_DEQUANTIZE, (_as_native_weight(root, node),))
        else:
            replacement = node.graph.call_function(_ATEN.mul.Tensor, node.args[:2])
    node.replace_all_uses_with(replacement)


def _as_native_weight(root: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Return a node that makes a quantized tensor of what a node dequantizes; the zero points are zero."""
    values, scales = node.args[:2]
    size = [_fetch(root, values.target).shape[0]]  # type: ignore[union-attr]
    zero_points = node.graph.call_function(_ATEN.zeros.default, (size,), {"dtype": torch.int64})
    return node.graph.call_function(_ATEN._make_per_channel_quantized_tensor.default, (values, scales, zero_points, 0))


def _stored_weight(root: fx.GraphModule, node: Any) -> Tensor | None:
    """Return the int8 weight that a node dequantizes, if it does."""
    if not _is(node, _QDQ.dequantize_per_channel.default) or node.args[0].op != "get_attr":
        return None
    weight = _fetch(root, node.args[0].target)
    return weight if weight.dtype is torch.int8 else None


def _grid(node: Any) -> tuple[Any, ...]:
    """Return scale and zero point of what a node computes; empty when that is not known."""
    while node.target in _MOVES | _SPLITS or node.target is operator.getitem:
        node = node.args[0]
    return tuple(node.args[1:3]) if node.target is _QUANTIZE else ()


def _pads_integers(node: fx.Node) -> bool:
    """Tell whether a padding, if it is one, pads with zeros, which every grid has, or has a kernel for integers."""
    if node.target is _ATEN.constant_pad_nd.default:
        return bool(argument(node, 2, "value", 0) == 0)
    if node.target is _ATEN.pad.default:
        mode = argument(node, 2, "mode", "constant")
        return mode == "reflect" or (mode == "constant" and argument(node, 3, "value") in (None, 0))
    return True


def _each(sizes: Any, number: int) -> list[int]:
    values = [sizes] if isinstance(sizes, int) else list(sizes)
    return values * number if len(values) == 1 else values


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _fetch(root: fx.GraphModule, name: Any) -> Tensor:
    owner, _, attribute = str(name).rpartition(".")
    return getattr(root.get_submodule(owner), attribute)
