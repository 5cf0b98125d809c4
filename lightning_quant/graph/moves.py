"""Operations that move or repeat values and make no new ones: on one grid they give the same integers."""

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

# Kinds whose result has values of its first input alone, or zeros.
MOVING = frozenset({"reshape", "pass", "max_pool", "slice", "flip", "repeat", "upsample", "border", "pad"})
# Those of them that leave each channel where it is.
KEEPS_CHANNELS = frozenset({"pass", "max_pool", "upsample", "border", "pad"})

MODULES: dict[type, str] = {
    nn.Flatten: "reshape", nn.Unflatten: "reshape", nn.PixelShuffle: "reshape", nn.PixelUnshuffle: "reshape",
    nn.ChannelShuffle: "reshape", nn.Identity: "pass", nn.Dropout: "pass", nn.Dropout1d: "pass", nn.Dropout2d: "pass",
    nn.Dropout3d: "pass", nn.AlphaDropout: "pass", nn.FeatureAlphaDropout: "pass",
    nn.ZeroPad1d: "pad", nn.ZeroPad2d: "pad", nn.ZeroPad3d: "pad",
    nn.ConstantPad1d: "pad", nn.ConstantPad2d: "pad", nn.ConstantPad3d: "pad",
    nn.ReflectionPad1d: "border", nn.ReflectionPad2d: "border", nn.ReflectionPad3d: "border",
    nn.ReplicationPad1d: "border", nn.ReplicationPad2d: "border", nn.ReplicationPad3d: "border",
    nn.CircularPad1d: "border", nn.CircularPad2d: "border", nn.CircularPad3d: "border",
    nn.Upsample: "upsample", nn.UpsamplingNearest2d: "upsample", nn.UpsamplingBilinear2d: "upsample",
}  # fmt: skip
FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.flatten, torch.unflatten, torch.reshape, torch.ravel, torch.permute, torch.t), "reshape"),
    **dict.fromkeys((torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis), "reshape"),
    **dict.fromkeys((torch.squeeze, torch.unsqueeze, torch.adjoint, getattr), "reshape"),
    **dict.fromkeys((F.pixel_shuffle, F.pixel_unshuffle, torch.channel_shuffle), "reshape"),
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), "pass"),
    **dict.fromkeys((torch.chunk, torch.split, torch.tensor_split, torch.unbind), "split"),
    **dict.fromkeys((torch.hsplit, torch.vsplit, torch.dsplit), "split"),
    **dict.fromkeys((operator.getitem, torch.narrow, torch.select, torch.index_select), "slice"),
    **dict.fromkeys((torch.flip, torch.fliplr, torch.flipud, torch.roll, torch.rot90), "flip"),
    **dict.fromkeys((torch.repeat_interleave, torch.tile, torch.broadcast_to), "repeat"),
    F.pad: "pad", F.interpolate: "upsample",
}  # fmt: skip
METHODS = {
    **dict.fromkeys(("flatten", "unflatten", "view", "reshape", "view_as", "reshape_as", "ravel", "t"), "reshape"),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint"), "reshape"),
    **dict.fromkeys(("squeeze", "unsqueeze", "contiguous", "clone"), "reshape"),
    **dict.fromkeys(("chunk", "split", "tensor_split", "unbind", "hsplit", "vsplit", "dsplit"), "split"),
    **dict.fromkeys(("narrow", "select", "index_select"), "slice"),
    **dict.fromkeys(("flip", "fliplr", "flipud", "roll", "rot90"), "flip"),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"), "repeat"),
}  # fmt: skip
_NEAREST = ("nearest", "nearest-exact")
_VIEWS = ("T", "mT", "H", "mH")


def moving_kind(kind: str, node: fx.Node, root: nn.Module) -> str:
    """Narrow a kind of this table by what a node's arguments, or its layer's, say."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if kind == "pad":
        return _padding_kind(node, module)
    if kind == "upsample":
        mode = _argument(node, 3, "mode", "nearest") if module is None else module.mode
        return "upsample" if mode in _NEAREST else "interpolate"
    if kind == "slice" and node.target is operator.getitem:
        return "slice" if _slices(node) else "other"
    if node.target is getattr:
        return "reshape" if node.args[1] in _VIEWS else "other"
    return kind


def moved_from(node: fx.Node) -> Any:
    """Return the tensor whose values a node of these kinds moves; that of a part of a split is what was split."""
    source = _argument(node, 0, "input")
    if node.target is operator.getitem and not isinstance(source.meta.get("fake"), Tensor):
        return _argument(source, 0, "tensor" if "tensor" in source.kwargs else "input")
    return source


def border_of(layer: nn.Module | None) -> tuple[list[int], str] | None:
    """Return how much a convolution pads its input with values of that, and in which mode; None where it does not."""
    mode = getattr(layer, "padding_mode", "zeros")
    return None if mode == "zeros" else (layer._reversed_padding_repeated_twice, mode)  # type: ignore[union-attr, return-value]


def _padding_kind(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return "pad" if getattr(module, "value", 0) == 0 else "other"
    if _argument(node, 2, "mode", "constant") != "constant":
        return "border"
    return "other" if _argument(node, 3, "value", 0) else "pad"


def _slices(node: fx.Node) -> bool:
    """Tell whether a node takes parts of a split, or of a tensor by positions that are no tensors."""
    source: Any = node.args[0]
    if isinstance(source, fx.Node) and not isinstance(source.meta.get("fake"), Tensor):
        name = source.target if source.op == "call_method" else None
        return isinstance(node.args[1], int) and (METHODS.get(str(name)) or FUNCTIONS.get(source.target)) == "split"
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is None or part is Ellipsis or isinstance(part, int | slice) or _is_size(part) for part in index)


def _is_size(part: Any) -> bool:
    return isinstance(part, fx.Node) and isinstance(part.meta.get("fake"), int)


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
