"""Quantized tensors that a file has not although results depend on them: what was planned and did not come about."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.graph.named_edges import EdgeQuantizer, edge_of
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.process import graphs_unprinted
from lightning_quant.surgery.routing import as_exported


def lost_edges(model: PlannedModel, converted: nn.Module, present: Collection[str]) -> set[str]:
    """Return the edges that a file lacks and whose values show in the result of the captured call.

    What nothing reads may have any value; exporters leave it out, and rightly so.

    Args:
        model: that was exported.
        converted: its QDQ module.
        present: names of the edges that the file has.
    """
    planned = {edge.identity for graph in model.plan.graphs for edge in graph.edges if not edge.passed}
    missing = planned - {edge_of(name) for name in present}
    if not missing:
        return set()
    expected = _results(model, converted)
    if expected is None or not _show(model, converted, missing, expected):
        return set()
    return {identity for identity in missing if _show(model, converted, {identity}, expected)}


def _show(model: PlannedModel, converted: nn.Module, identities: set[str], expected: list[Tensor]) -> bool:
    """Tell whether a call's results change with the integers of these edges."""
    with _turned(converted, identities):
        results = _results(model, converted)
    if results is None or [t.shape for t in results] != [t.shape for t in expected]:
        return True
    return not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(results, expected, strict=True))


def _results(model: PlannedModel, converted: nn.Module) -> list[Tensor] | None:
    args, kwargs = model.call()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported(), graphs_unprinted():
            return tensor_leaves(converted(*args, **kwargs))
    except Exception:  # whatever a user's forward raises on values that it did not expect
        return None


@contextmanager
def _turned(converted: nn.Module, identities: set[str]) -> Iterator[None]:
    """Let quantizers of edges answer with integers from the other half of the grid."""

    def turn(quantizer: EdgeQuantizer, _: tuple[Tensor, ...], integers: Tensor) -> Tensor:
        low, high = quantizer.grid[2:4]
        return torch.where(integers > (low + high) // 2, low, high).to(integers.dtype)

    quantizers = [m for m in converted.modules() if isinstance(m, EdgeQuantizer) and m.identity in identities]
    hooks = [quantizer.register_forward_hook(turn) for quantizer in quantizers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
