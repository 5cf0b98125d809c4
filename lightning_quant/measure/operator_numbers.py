"""What quantizing did to the numbers of each operator, on a few samples: noise, and histograms against its grids."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.rescale import along_rows, folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.measure.rounded_parts import name_of
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.numerics.fake_quantize import fake_quantize
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# Operators whose histograms are kept, values of a tensor that are looked at, and bars of a histogram.
NUM_WORST = 8
_VALUES, _BARS = 1 << 15, 60


@dataclass(frozen=True)
class Histogram:
    """Values beside the grid that they are rounded to.

    Attributes:
        low: lowest value of the grid.
        high: highest value of the grid.
        start: lower end of the first bar.
        stop: upper end of the last bar.
        counts: values in each bar, which are all of one width.
        clipped: share of the values that the grid does not reach, in [0, 1].
        step: what one integer is worth; of a weight, whose values are in such steps, that of the median channel.
    """

    low: float
    high: float
    start: float
    stop: float
    counts: tuple[int, ...]
    clipped: float
    step: float


@dataclass(frozen=True)
class OperatorNumbers:
    """What became of one operator's numbers.

    Attributes:
        name: of the operator.
        db: signal-to-noise ratio of its output with everything quantized, in decibels: what came in and what it added;
            None where its output is not rounded, so that nothing is seen of it.
        own_db: the same with nothing but this operator's weight and output quantized.
        weight: of the worst operators, its weight in steps of each channel's scale; None without one.
        output: of the worst operators, its output; None where that stays float.
    """

    name: str
    db: float | None
    own_db: float
    weight: Histogram | None = None
    output: Histogram | None = None


@dataclass
class _Seen:
    """Samples of the tensors of one run, and noise over signal of weights, by identity."""

    values: dict[str, Tensor] = field(default_factory=dict)
    weight_noise: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
@exact_arithmetic()
def operator_numbers(prepared: Prepared, call: Call) -> tuple[OperatorNumbers, ...]:
    """Run a call in float and simulated and compare every operator: about five runs of the float module in all.

    Args:
        prepared: detached and calibrated.
        call: of the module, a few samples.

    Returns:
        in the order of the plan; the `NUM_WORST` with the most noise of their own have histograms.
    """
    with evaluation_mode(prepared.root):
        exact, rounded = _in_float(prepared, call), _simulated(prepared, call)
        numbers = {identity: _numbers(prepared, identity, exact, rounded) for identity in prepared.operators}
        worst = sorted(numbers, key=lambda identity: numbers[identity].own_db)[:NUM_WORST]
        return tuple(_drawn(prepared, i, n, exact) if i in worst else n for i, n in numbers.items())


def _in_float(prepared: Prepared, call: Call) -> _Seen:
    seen = _Seen()

    def visit(site: Site) -> None:
        layer, folded = folded_layer(prepared, site.identity), prepared.folded(site.identity)
        integers = prepared.weight_integers(site.identity, folded)
        signal = noise = 0.0
        for x in site.float_inputs:
            exact = site.compute(x, layer.weight, layer.bias)
            signal += float(exact.square().sum())
            actual = site.compute(x, integers * along_rows(folded.scale, integers), folded.bias)
            noise += float((actual - exact).square().sum())
        seen.weight_noise[site.identity] = noise / signal if signal else 0.0

    with prepared.simulation.watching(_watcher(prepared, seen)):
        lockstep(prepared, [call], visit, quantized=False)
    return seen


def _simulated(prepared: Prepared, call: Call) -> _Seen:
    seen = _Seen()
    with prepared.simulation.watching(_watcher(prepared, seen)), prepared.attached("frozen"):
        prepared.root(*call.args, **call.kwargs)
    return seen


def _watcher(prepared: Prepared, seen: _Seen):  # type: ignore[no-untyped-def]
    def watch(identity: str, x: Tensor) -> None:
        if identity not in seen.values:
            seen.values[identity] = _some(prepared.on_grid(identity, x))

    return watch


def _some(x: Tensor) -> Tensor:
    """Return values of a tensor, float32 on the CPU: the same places whenever its size is the same."""
    values = x.detach().flatten()
    if len(values) > _VALUES:
        places = torch.randint(len(values), (_VALUES,), generator=torch.Generator().manual_seed(0))
        values = values[places.to(values.device)]
    return values.float().cpu()


def _numbers(prepared: Prepared, identity: str, exact: _Seen, rounded: _Seen) -> OperatorNumbers:
    operator = prepared.operators[identity]
    own, db = exact.weight_noise.get(identity, 0.0), None
    edge = operator.writes
    if operator.quantized_output and edge in exact.values and edge in rounded.values:
        expected, actual = exact.values[edge], rounded.values[edge]
        own += _ratio(expected, _on_grid(prepared, edge, expected))
        if expected.shape == actual.shape:
            db = _decibels(_ratio(expected, _on_grid(prepared, edge, actual)))
    return OperatorNumbers(name_of(prepared, identity), db, _decibels(own))


def _on_grid(prepared: Prepared, edge: str, values: Tensor) -> Tensor:
    scale, zero_point = (parameter.cpu() for parameter in prepared.ranges.parameters(edge))
    return fake_quantize(values, scale, zero_point, prepared.ranges.grid_of(edge))


def _ratio(expected: Tensor, actual: Tensor) -> float:
    signal = float(expected.double().square().sum())
    return float((actual - expected).double().square().sum()) / signal if signal else 0.0


def _decibels(ratio: float) -> float:
    return -10 * math.log10(ratio) if ratio else math.inf


def _drawn(prepared: Prepared, identity: str, numbers: OperatorNumbers, exact: _Seen) -> OperatorNumbers:
    """Return the same with histograms."""
    operator = prepared.operators[identity]
    weight = output = None
    if operator.weight:
        folded, most = prepared.folded(identity), prepared.weight_quant_max(identity)
        values = folded_layer(prepared, identity).weight
        steps = _some(values / along_rows(folded.scale, values))
        weight = _histogram(steps, -float(most), float(most), 1.0, float(folded.scale.median()))
    edge = operator.writes
    if operator.quantized_output and edge in exact.values:
        grid = prepared.ranges.grid_of(edge)
        scale, zero_point = (float(parameter) for parameter in prepared.ranges.parameters(edge))
        low, high = (grid.low - zero_point) * scale, (grid.high - zero_point) * scale
        output = _histogram(exact.values[edge], low, high, scale, scale)
    return OperatorNumbers(numbers.name, numbers.db, numbers.own_db, weight, output)


def _histogram(values: Tensor, low: float, high: float, width: float, step: float) -> Histogram | None:
    """Count values; what lies within half a `width` beyond an end is rounded to it and not clipped."""
    values = values[values.isfinite()]
    if not len(values):
        return None
    start, stop = min(low, float(values.min())), max(high, float(values.max()))
    if not start < stop:
        return None
    counts = torch.histc(values, _BARS, start, stop).long().tolist()
    clipped = float(((values < low - width / 2) | (values > high + width / 2)).double().mean())
    return Histogram(low, high, start, stop, tuple(counts), clipped, step)
