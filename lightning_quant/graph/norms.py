"""What a BatchNorm normalizes with, whether a layer of PyTorch's does so or a function on a module's own buffers."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.graph.plan import join
from lightning_quant.numerics.folding import Norm
from lightning_quant.surgery.routing import has_hooks

_NO_STATISTICS = "it keeps no running statistics to fold"


def norm_of(node: fx.Node, root: nn.Module) -> tuple[Norm | None, str]:
    """Return the names of a BatchNorm's statistics, or why they cannot be folded, for a graph in evaluation."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if module.running_mean is None:
            return None, _NO_STATISTICS
        if has_hooks(module):
            return None, "hooks on it see its own input and output"
        gamma, beta = (name if getattr(module, name) is not None else "" for name in ("weight", "bias"))
        return Norm(str(node.target), "running_mean", "running_var", gamma, beta, float(module.eps)), ""  # type: ignore[arg-type]
    mean, variance, weight, bias, training = (
        ops.argument(node, position, name)
        for position, name in enumerate(("running_mean", "running_var", "weight", "bias", "training"), 1)
    )
    if mean is None or variance is None or training:
        return None, _NO_STATISTICS
    names = [ops.parameter(value) for value in (mean, variance, weight, bias)]
    eps = ops.argument(node, 7, "eps", 1e-5)
    if "" in names[:2] or any(
        value is not None and not name for value, name in zip((weight, bias), names[2:], strict=True)
    ):
        return None, "its statistics are computed in forward"
    if not isinstance(eps, int | float):
        return None, "its `eps` is computed in forward"
    owner = _common_owner([name for name in names if name])
    mean, variance, weight, bias = (name[len(owner) + bool(owner) :] for name in names)
    return Norm(owner, mean, variance, weight, bias, float(eps)), ""


def normalizes_channels(layer: fx.Node, axis: int, norm: fx.Node, root: nn.Module) -> bool:
    """Tell whether a BatchNorm normalizes a layer's channels, which may have been moved on the way.

    Args:
        layer: node that computes the layer's result.
        axis: dimension of the channels in it.
        norm: node of the BatchNorm; what is between the two moves values, each read by the next alone.
        root: module that the graph was traced from.
    """
    shape = ops.shape_of(layer)
    channels = torch.arange(shape[axis]).movedim(0, -1)
    value = channels.view([-1 if d == axis % len(shape) else 1 for d in range(len(shape))]).expand(shape)
    between, node = [], ops.argument(norm, 0, "input")
    while node is not layer:
        between.append(node)
        node = ops.argument(node, 0, "input")
    for node in reversed(between):
        if ops.describe(node, root).kind != "pass":
            value = _moved(node, value, root)
    return value.dim() > 1 and bool((value.movedim(1, -1) == torch.arange(value.shape[1])).all())


def _moved(node: fx.Node, value: Tensor, root: nn.Module) -> Tensor:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda read: read.meta.get("fake"))
    given: tuple[Any, ...] = (value, *args[1:]) if args else ()
    kwargs = kwargs if args else {**kwargs, "input": value}
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*given, **kwargs)
    if node.op == "call_method":
        return getattr(given[0], str(node.target))(*given[1:], **kwargs)
    return node.target(*given, **kwargs)  # type: ignore[operator]


def _common_owner(names: list[str]) -> str:
    owners = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*owners, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return join(*common)
