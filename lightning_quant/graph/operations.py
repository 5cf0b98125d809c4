"""Names for what graph nodes do, whatever their spelling: module, function or method."""

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from lightning_quant.graph import moves
from lightning_quant.graph.expansions import layer_read_by

_MODULES: dict[type, str] = {
    nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d", nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear", nn.Bilinear: "bilinear",
    nn.BatchNorm1d: "batch_norm", nn.BatchNorm2d: "batch_norm", nn.BatchNorm3d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.PReLU: "prelu",
    nn.ELU: "elu", nn.SELU: "selu", nn.GELU: "gelu", nn.SiLU: "silu", nn.Mish: "mish", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardswish: "hardswish", nn.Hardsigmoid: "hardsigmoid", nn.Softmax: "softmax", nn.LogSoftmax: "log_softmax",
    nn.Softplus: "softplus",
    nn.MaxPool1d: "max_pool", nn.MaxPool2d: "max_pool", nn.MaxPool3d: "max_pool",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool",
    nn.AvgPool1d: "avg_pool", nn.AvgPool2d: "avg_pool", nn.AvgPool3d: "avg_pool",
    nn.AdaptiveAvgPool1d: "global_avg_pool", nn.AdaptiveAvgPool2d: "global_avg_pool",
    nn.MultiheadAttention: "attention", nn.LSTM: "lstm", nn.GRU: "gru", nn.RNN: "rnn", nn.Embedding: "embedding",
    nn.LSTMCell: "cell", nn.GRUCell: "cell", nn.RNNCell: "cell", nn.EmbeddingBag: "embedding",
    nn.TransformerEncoderLayer: "transformer", nn.TransformerDecoderLayer: "transformer",
    nn.TransformerEncoder: "transformer", nn.TransformerDecoder: "transformer", nn.Transformer: "transformer",
    nn.LayerNorm: "layer_norm", nn.GroupNorm: "group_norm",
    **moves.MODULES,
}  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    F.conv1d: "conv1d", F.conv2d: "conv2d", F.conv3d: "conv3d", torch.conv1d: "conv1d", torch.conv2d: "conv2d",
    F.conv_transpose1d: "conv_transpose1d", F.conv_transpose2d: "conv_transpose2d", F.linear: "linear",
    F.batch_norm: "batch_norm",
    F.relu: "relu", torch.relu: "relu", F.relu6: "relu6", F.hardtanh: "hardtanh", torch.clamp: "clamp",
    torch.clip: "clamp",
    F.leaky_relu: "leaky_relu", F.prelu: "prelu", F.elu: "elu", F.selu: "selu", F.gelu: "gelu", F.silu: "silu",
    F.mish: "mish",
    F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid", F.tanh: "tanh", torch.tanh: "tanh", F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid", F.softmax: "softmax", torch.softmax: "softmax", F.log_softmax: "log_softmax",
    F.softplus: "softplus",
    operator.add: "add", torch.add: "add", operator.mul: "mul", torch.mul: "mul", operator.sub: "sub", torch.sub: "sub",
    torch.cat: "cat", torch.concat: "cat", torch.concatenate: "cat",
    torch.matmul: "matmul", operator.matmul: "matmul", torch.bmm: "matmul",
    F.scaled_dot_product_attention: "attention",
    F.max_pool1d: "max_pool", F.max_pool2d: "max_pool", F.max_pool3d: "max_pool", torch.max_pool2d: "max_pool",
    F.avg_pool1d: "avg_pool", F.avg_pool2d: "avg_pool", F.adaptive_avg_pool1d: "global_avg_pool",
    F.adaptive_avg_pool2d: "global_avg_pool", torch.mean: "global_avg_pool", F.adaptive_max_pool2d: "adaptive_max_pool",
    **moves.FUNCTIONS,
}  # fmt: skip
_METHODS = {
    "relu": "relu", "clamp": "clamp", "clip": "clamp", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax",
    "log_softmax": "log_softmax", "add": "add", "mul": "mul", "sub": "sub", "matmul": "matmul", "bmm": "matmul",
    "mean": "global_avg_pool", **moves.METHODS,
}  # fmt: skip

WEIGHTED = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
)
ACTIVATIONS = frozenset({
    "relu", "relu6", "hardtanh", "clamp", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "mish", "sigmoid",
    "tanh", "hardswish", "hardsigmoid", "softmax", "log_softmax", "softplus",
})  # fmt: skip
# Kinds whose result has values of what they read alone.
MOVING, moved_from = moves.MOVING, moves.moved_from
# What moves values, or leaves them as they are, has no row in a plan; every other kind has one.
_WITHOUT_ROW = frozenset({"border", "flip", "pad", "pass", "repeat", "reshape", "slice", "split"})
_KINDS = frozenset({*_MODULES.values(), *_FUNCTIONS.values(), *_METHODS.values(), "interpolate"})
LISTED = _KINDS - _WITHOUT_ROW
# Layers of which recipes of layers store the weights, and graphs take none apart.
STORED = frozenset({"attention", "lstm", "gru", "rnn", "cell", "embedding", "transformer"})
STORED_REASON = "'int8' has no form of it here; 'int8_dynamic' or 'int8_weight_only' stores its weights"


@dataclass(frozen=True)
class Operation:
    """A node of a traced graph, described.

    Attributes:
        kind: what it does ("conv2d", "reshape", ...), or "other".
        layer: the layer's type name, or the operation's name for functions and methods.
        weight: qualified name of the weight of a weighted kind, empty when it is no parameter.
        bias: qualified name of its bias.
    """

    kind: str
    layer: str
    weight: str = ""
    bias: str = ""


def describe(node: fx.Node, root: nn.Module) -> Operation:
    """Describe one node of a graph traced from `root`."""
    if node.op == "call_module":
        operation = _describe_module(str(node.target), root.get_submodule(str(node.target)))
        if node.meta.get("as_it_is"):
            return Operation("other", operation.layer)
        return replace(operation, kind=moves.moving_kind(operation.kind, node, root))
    if node.op == "call_function":
        kind = _FUNCTIONS.get(node.target, "other")
        if kind in WEIGHTED:
            weight = parameter(argument(node, 1, "weight"))
            # A layer whose forward was inlined, a subclass say, is still known by its type.
            owner = weight.rpartition(".")[0]
            is_inlined = bool(weight) and owner == node.meta.get("scope")
            layer = _expanded(node, root) or (type(root.get_submodule(owner)).__name__ if is_inlined else _name(node))
            return Operation(kind, layer, weight, parameter(argument(node, 2, "bias")))
        kind = _checked(moves.moving_kind(kind, node, root), node)
        return Operation(kind, _own_layer(node, root) or _name(node))
    if node.op == "call_method":
        return Operation(_checked(_METHODS.get(str(node.target), "other"), node), str(node.target))
    return Operation("other", node.op)


def kind_of(module: nn.Module) -> str:
    """Return what a module does, or "other"."""
    # A parametrization, weight norm say, puts a class of its own before the layer's.
    return _MODULES.get(parametrize.type_before_parametrizations(module), "other")


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call by position or keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def parameter(node: Any) -> str:
    """Return the name of the parameter or buffer that a node reads, or an empty text."""
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def averages_padding(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether an average pool counts zeros that it pads its input with."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        padding, counted = module.padding, module.count_include_pad
    else:
        padding, counted = argument(node, 3, "padding", 0), argument(node, 5, "count_include_pad", True)
    return bool(counted) and padding not in (0, (0,), (0, 0), [0], [0, 0])


def bounds(node: fx.Node, root: nn.Module, kind: str) -> tuple[float, float] | None:
    """Return the constant lower and upper bound of a clipping activation; None when they are not constant."""
    if kind == "relu":
        return 0.0, math.inf
    if kind == "relu6":
        return 0.0, 6.0
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return float(module.min_val), float(module.max_val)  # type: ignore[arg-type]
    names = ("min_val", "max_val", -1.0, 1.0) if kind == "hardtanh" else ("min", "max", None, None)
    low, high = argument(node, 1, names[0], names[2]), argument(node, 2, names[1], names[3])
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return (float(low), float(high)) if isinstance(low, int | float) and isinstance(high, int | float) else None


def is_float(node: Any) -> bool:
    """Tell whether a node's value is a floating-point tensor."""
    fake = node.meta.get("fake") if isinstance(node, fx.Node) else None
    return isinstance(fake, Tensor) and fake.is_floating_point()


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the traced shape of a node's value; nothing where it is not known, or no tensor."""
    fake = node.meta.get("fake") if isinstance(node, fx.Node) else None
    return tuple(fake.shape) if isinstance(fake, Tensor) else ()


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the nodes of the floating-point tensors that a node reads, in order."""
    return [source for source in node.all_input_nodes if is_float(source)]


def _expanded(node: fx.Node, root: nn.Module) -> str:
    """Return the type of the layer that was written out for a trace and whose weight a product reads, if it does."""
    if layer_read_by(node, root) is None:
        return ""
    return parametrize.type_before_parametrizations(root.get_submodule(str(node.meta["scope"]))).__name__


def _own_layer(node: fx.Node, root: nn.Module) -> str:
    """Return the type of the layer whose forward was inlined and whose weight a product reads; else an empty text."""
    scope = node.meta.get("scope")
    owners = {str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr"}
    if (
        not scope
        or scope not in owners
        or not node.meta.get("multiply_adds")
        or any(root.get_submodule(scope).children())
    ):
        return ""
    return type(root.get_submodule(scope)).__name__


def _describe_module(path: str, module: nn.Module) -> Operation:
    kind = kind_of(module)
    name = parametrize.type_before_parametrizations(module).__name__
    if kind in WEIGHTED:
        return Operation(kind, name, f"{path}.weight", f"{path}.bias" if module.bias is not None else "")
    if kind == "global_avg_pool" and module.output_size not in (1, (1, 1)):
        return Operation("adaptive_avg_pool", name)
    if kind == "max_pool" and module.return_indices:
        return Operation("other", name)
    return Operation(kind, name)


def _checked(kind: str, node: fx.Node) -> str:
    """Narrow a kind by its arguments: a mean over all places, an addition without a factor."""
    if kind == "global_avg_pool" and not _is_global(node):
        return "other"
    if kind in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return "other"
    if kind == "max_pool" and argument(node, 6, "return_indices", False):
        return "other"
    return kind


def _is_global(node: fx.Node) -> bool:
    fake = node.args[0].meta.get("fake") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(fake, Tensor) or fake.dim() < 3:
        return False
    if "adaptive" in _name(node):
        return argument(node, 1, "output_size") in (1, (1, 1), [1, 1], (1,))
    dim = argument(node, 1, "dim")
    dims = [dim] if isinstance(dim, int) else list(dim) if isinstance(dim, tuple | list) else []
    return sorted(d % fake.dim() for d in dims) == list(range(2, fake.dim()))


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
