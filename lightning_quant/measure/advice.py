"""What to keep in float against the most harmful operator, and what that gains.

A tensor stays rounded as long as any operator of integers writes or reads it. So where an operator's harm is in its
tensors, it has to be kept float together with those that share them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from lightning_quant.measure.rounded_parts import all_but, name_of, own_parts, read_from_float, touched_edges
from lightning_quant.simulate.prepared import Prepared

# A tenth of a decibel less error is worth a layer in float.
_LEAST = 10**-0.01
# From what is rounded to the output's error and the score, if there is one.
Measure = Callable[[frozenset[str]], tuple[float, float | None]]


@dataclass(frozen=True)
class Advice:
    """Operators to keep in float.

    Attributes:
        names: patterns for `overrides`.
        error: noise over signal power of the output with them in float.
        float_bytes: how many bytes more the file takes, for weights in float.
        score_gain: by how much the given score rises; None without one.
    """

    names: tuple[str, ...]
    error: float
    float_bytes: int
    score_gain: float | None = None


def advise(prepared: Prepared, worst: str, measure: Measure, float_bytes: dict[str, int]) -> Advice | None:
    """Return the worst operator alone, or with some that share its tensors where that gains more than twice as much.

    Args:
        prepared: detached and calibrated.
        worst: name of the most harmful operator.
        measure: runs the module.
        float_bytes: name to what its weight takes more in float.

    Returns:
        None when that gains next to nothing, or leaves nothing to quantize.
    """
    error, score = measure(all_but(prepared))
    least = error * _LEAST
    everything = {name_of(prepared, identity) for identity in prepared.operators}
    advice: Advice | None = None
    for names in _options(prepared, worst):
        left, left_score = measure(all_but(prepared, names))
        if left < least and everything != set(names):
            gain = None if score is None or left_score is None else left_score - score
            advice = Advice(names, left, sum(float_bytes[name] for name in names), gain)
            least = error - 2 * (error - left)
    return advice


def _options(prepared: Prepared, worst: str) -> list[tuple[str, ...]]:
    """Return the operator alone, and with those that share what it reads of float ones, its output, or either."""
    edges = {i: own_parts(prepared, i)[1] for i in prepared.operators if name_of(prepared, i) == worst}
    inputs = {edge for i in edges for edge in read_from_float(prepared, i)}
    outputs = {edge for own in edges.values() for edge in own} - inputs
    options = [_sharing(prepared, worst, shared) for shared in (set(), inputs, outputs, inputs | outputs)]
    return list(dict.fromkeys(options))


def _sharing(prepared: Prepared, worst: str, edges: set[str]) -> tuple[str, ...]:
    """Return the names of the worst operator and of all that read or write these edges, in the plan's order."""
    source = prepared.ranges.source
    wanted = {source(edge) for edge in edges}
    named = {identity: name_of(prepared, identity) for identity in prepared.operators}
    sharing = [
        name
        for identity, name in named.items()
        if name == worst or wanted & {source(edge) for edge in touched_edges(prepared, identity)}
    ]
    return tuple(dict.fromkeys(sharing))
