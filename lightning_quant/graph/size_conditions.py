"""Branches on sizes: `if padding > 0`, where padding follows from height and width, has one answer for each size."""

import operator
from typing import Any

from torch import Size, Tensor, fx
from torch.fx.node import has_side_effect

from lightning_quant.errors import QuantizationError


@has_side_effect
def decided(condition: Any, expected: bool) -> None:
    """Make sure that a condition on sizes comes out as it did when a graph was traced; exporters note it as a bound.

    Raises:
        QuantizationError: it does not.
    """
    if bool(condition) != expected:
        raise QuantizationError(
            "Expected sizes for which the module's forward takes the same way as in the captured call, but got others. "
            "Call it with the captured sizes, or capture a call of these."
        )


def decides(graph: fx.Graph) -> bool:
    """Tell whether a graph is right for some sizes alone."""
    return any(node.target is decided for node in graph.nodes)


def is_of_sizes(node: fx.Node) -> bool:
    """Tell whether a number follows from sizes that are no batch's, which is the first of a tensor's sizes."""
    fake = node.meta.get("fake")
    if not isinstance(fake, bool | int | float | Size):
        return False
    dimensions = _dimensions(node)
    if dimensions is not None:
        return all(dimension > 0 for dimension in dimensions)
    return all(is_of_sizes(source) for source in node.all_input_nodes)


def _dimensions(node: fx.Node) -> list[int] | None:
    """Return which dimensions' sizes a node reads from a tensor; 1 for each of a parameter; None if it reads none."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    fake = source.meta.get("fake")
    if isinstance(fake, Tensor):
        every = [1 if source.op == "get_attr" else dimension for dimension in range(fake.dim())]
        if node.target == "size" and len(node.args) > 1:
            return [every[node.args[1]]]  # type: ignore[index]
        return every
    if isinstance(fake, Size) and node.target is operator.getitem:
        every = _dimensions(source) or []
        chosen = every[node.args[1]]  # type: ignore[index]
        return chosen if isinstance(chosen, list) else [chosen]
    return None
