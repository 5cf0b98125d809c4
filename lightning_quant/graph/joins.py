"""What joining tensors on one grid costs: boxes beside scores, whose range is a thousandth of theirs."""

import torch
from torch import Tensor, fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.surgery.routing import clone

# Decibels that every part of a join must keep on the common grid, or come within the margin of on a grid of its own.
_NEEDED_DB = 20.0
_MARGIN_DB = 6.0
_STEPS = 255


class _Watch(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: nn.Module, graph: fx.Graph, wanted: set[fx.Node]) -> None:
        super().__init__(module, graph=graph)
        self.wanted, self.values = wanted, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n in self.wanted and isinstance(value, Tensor):
            self.values[n] = value
        return value


def unlike_parts(
    joins: list[fx.Node], operations: dict[fx.Node, ops.Operation], root: nn.Module, tensors: list[Tensor]
) -> dict[fx.Node, str]:
    """Return the joins that one grid costs too much on a call, each with the reason to keep it float.

    Args:
        joins: concatenations of one graph.
        operations: what every node of it does.
        root: the module it was traced from, in evaluation mode.
        tensors: of the call.
    """
    parts = {node: _parts(node, operations) for node in joins}
    if not parts:
        return {}
    watch = _Watch(clone(root, unrouted=True), joins[0].graph, {part for keys in parts.values() for part in keys})
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        watch.run(*tensors)
    reasons = {}
    for node, keys in parts.items():
        kept = _worst([watch.values[part] for part in keys if part in watch.values])
        if kept is not None:
            reasons[node] = f"its parts' ranges are too unlike for one grid, on which one of them keeps {kept:.1f} dB"
    return reasons


def _parts(node: fx.Node, operations: dict[fx.Node, ops.Operation]) -> list[fx.Node]:
    """Return what a join is made of, through joins of joins and what moves values."""
    kind = operations[node].kind
    if kind == "cat":
        operands = ops.argument(node, 0, "tensors")
        return [part for operand in operands if isinstance(operand, fx.Node) for part in _parts(operand, operations)]
    # Behind what hands values on as they are lie the parts of a join.
    if kind in ops.MOVING - {"max_pool"} and ops.is_float(ops.moved_from(node)):
        return _parts(ops.moved_from(node), operations)
    return [node]


def _worst(parts: list[Tensor]) -> float | None:
    """Return the decibels that the worst part keeps on the common grid, where a grid of its own keeps clearly more."""
    parts = [part.float() for part in parts if part.is_floating_point() and part.numel() and part.isfinite().all()]
    if len(parts) < 2:
        return None
    common = max(map(_span, parts))
    lost = []
    for part in parts:
        if not part.any():
            continue
        shared, own = (signal_to_noise(part, _rounded(part, span)) for span in (common, _span(part)))
        if shared < _NEEDED_DB and own > shared + _MARGIN_DB:
            lost.append(shared)
    return min(lost, default=None)


def _span(part: Tensor) -> float:
    return float(part.max().clamp(min=0) - part.min().clamp(max=0))


def _rounded(part: Tensor, span: float) -> Tensor:
    step = max(span / _STEPS, torch.finfo(torch.float32).tiny)
    return torch.round(part / step) * step
