"""The QDQ form, the one that every runtime reads: `quantized_decomposed` operators in ordinary float modules."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_quant.calls.calls import ResultSpec, flatten_call
from lightning_quant.graph import operations as ops
from lightning_quant.graph.moves import border_of
from lightning_quant.graph.plan import Operator

_INT32 = torch.iinfo(torch.int32)


class BoundGraph(nn.Module):
    """A graph over flat tensors that is called like the module it was traced from."""

    def __init__(self, graph_module: fx.GraphModule, signature: inspect.Signature, output_spec: ResultSpec) -> None:
        super().__init__()
        self.graph_module = graph_module
        self.signature, self.output_spec = signature, output_spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on a call of the captured structure."""
        _, tensors = flatten_call(self.signature, args, kwargs)
        return self.output_spec.build(self.graph_module(*tensors))


class InParts(nn.Module):
    """A module some of whose parts are routed to graphs.

    Exporters take the tensors of registered modules only; among the module's own children its own code, that of an
    `nn.Sequential` say, would come upon the graphs.
    """

    def __init__(self, module: nn.Module, graphs: list[BoundGraph]) -> None:
        super().__init__()
        self.module, self.graphs = module, nn.ModuleList(graphs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self.module(*args, **kwargs)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with an int8 weight and an int32 bias, in QDQ form.

    Attributes:
        weight: `(out_channels, ...)`, int8.
        weight_scale: `(out_channels,)`, float32.
        bias: `(out_channels,)`, int32, in steps of `bias_scale`.
        bias_scale: `(out_channels,)`, input scale times weight scale.
    """

    def __init__(
        self, kind: str, options: dict[str, Any], weight: Tensor, scale: Tensor, bias: Tensor, bias_scale: Tensor
    ) -> None:
        super().__init__()
        self.kind, self.options = kind, options
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("bias_scale", bias_scale)
        self.register_buffer("zero_points", torch.zeros_like(scale, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Compute with dequantized weight and bias."""
        dequantize = torch.ops.quantized_decomposed.dequantize_per_channel
        weight = dequantize(self.weight, self.weight_scale, self.zero_points, 0, -128, 127, torch.int8)
        bias = dequantize(self.bias, self.bias_scale, self.zero_points, 0, _INT32.min, _INT32.max, torch.int32)
        if self.kind == "linear":
            # Every runtime has an integer kernel with bias for a matrix product of two dimensions, and none for more.
            flat = x.flatten(0, -2) if x.dim() > 2 else x
            y = F.linear(flat, weight, bias)
            return y.unflatten(0, x.shape[:-1]) if x.dim() > 2 else y
        return getattr(F, self.kind)(x, weight, bias, **self.options)


def is_static(module: nn.Module) -> bool:
    """Tell whether a module, or a part of it, is a QDQ graph."""
    return any(isinstance(child, BoundGraph) for child in module.modules())


def layer_options(node: fx.Node, operator: Operator, layer: nn.Module | None) -> dict[str, Any]:
    """Return stride, padding, dilation and groups of a convolution, from its layer or from the call's arguments.

    Its padding is of zeros: there is none where `border_of` has one of values.
    """
    if operator.kind == "linear":
        return {}
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    if layer is not None:
        options = {name: getattr(layer, name) for name in defaults}
        return options if border_of(layer) is None else {**options, "padding": 0}
    first = 5 if node.target == "run_function" else 3
    given = {name: ops.argument(node, first + i, name, defaults[name]) for i, name in enumerate(defaults)}
    # Numbers of channels, say, that forward reads from shapes.
    return fx.node.map_arg(given, lambda size: size.meta["fake"])
