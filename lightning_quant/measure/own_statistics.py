"""What quantizing each operator does where it is: its own noise, its range, and how far its channels differ."""

import math
from typing import Any

from torch import Tensor

from lightning_quant.calibrate.lockstep import Site, lockstep
from lightning_quant.calibrate.rescale import folded_layer
from lightning_quant.calls.calls import Call
from lightning_quant.measure.edge_statistics import edge_statistics, ratio_to_median
from lightning_quant.measure.rounded_parts import own_parts, read_from_float
from lightning_quant.numerics.fake_quantize import along
from lightning_quant.numerics.noise import alike, signal_to_noise
from lightning_quant.simulate.prepared import Prepared

# Scale and zero point of an int8 weight and of its int32 bias, for each output channel of an ONNX file.
_BYTES_OF_SCALES = 13


def error_of(exact: list[Any], actual: list[Any]) -> float:
    """Return noise over signal power of what differs from its float counterpart."""
    decibels = signal_to_noise(*alike(exact, actual))
    return 10 ** (-decibels / 10)


def own_statistics(prepared: Prepared, calls: list[Call]) -> dict[str, dict[str, Any]]:
    """Return for each operator its own signal-to-noise ratio, its range, and how far its channels differ."""
    seen, weight_noise = edge_statistics(prepared, calls), _weight_noise(prepared, calls)
    statistics: dict[str, dict[str, Any]] = {}
    for identity, operator in prepared.operators.items():
        edge = operator.writes if operator.quantized_output else operator.reads[0]
        of_edge, ratio = seen.get(edge), weight_noise.get(identity, 0.0)
        if operator.quantized_output:
            ratio = _output_noise(prepared, calls, identity, edge)
        low = high = 0.0
        if edge in prepared.ranges.edges:
            grid, (scale, zero_point) = prepared.ranges.grid_of(edge), prepared.ranges.parameters(edge)
            low, high = float((grid.low - zero_point) * scale), float((grid.high - zero_point) * scale)
        widest, extra = 1.0, 0
        if operator.weight:
            weight = folded_layer(prepared, identity).weight
            spans = weight.abs().flatten(1).amax(1)
            widest = ratio_to_median(spans)
            extra = 3 * weight.numel() - _BYTES_OF_SCALES * len(weight)
        statistics[identity] = {
            "own_db": -10 * math.log10(ratio) if ratio else math.inf,
            "low": low,
            "high": high,
            "clipped": 0.0 if of_edge is None else of_edge.outside / of_edge.number,
            "widest": widest,
            "spread": 1.0 if of_edge is None else of_edge.spread,
            "float_bytes": extra,
        }
    return statistics


def _output_noise(prepared: Prepared, calls: list[Call], identity: str, edge: str) -> float:
    """Return noise over signal of an operator's rounded output, with nothing else quantized."""
    outputs: dict[bool, list[Tensor]] = {False: [], True: []}
    weight, edges = own_parts(prepared, identity)
    for rounded, values in outputs.items():

        def watch(seen: str, x: Tensor, values: list[Tensor] = values) -> None:
            if seen == edge:
                values.append(prepared.on_grid(edge, x).float().clone())

        only = (weight | edges) if rounded else frozenset()
        simulation = prepared.simulation
        with simulation.quantizing_only(only), simulation.watching(watch), prepared.attached("frozen"):
            for args, kwargs in calls:
                prepared.root(*args, **kwargs)
    return error_of(outputs[False], [prepared.ranges.rounded(edge, x) for x in outputs[True]])


def _weight_noise(prepared: Prepared, calls: list[Call]) -> dict[str, float]:
    """Return noise over signal of weighted operators that answer in float, from their weights and what is their own."""
    noise: dict[str, float] = {}

    def visit(site: Site) -> None:
        if site.operator.quantized_output:
            return
        layer = folded_layer(prepared, site.identity)
        folded = prepared.folded(site.identity)
        integers = prepared.weight_integers(site.identity, folded)
        rounded = integers * along(folded.scale, integers)
        edge = site.operator.reads[0]
        reads_float = edge in read_from_float(prepared, site.identity)
        signal = total = 0.0
        for x in site.float_inputs:
            exact = site.compute(x, layer.weight, layer.bias)
            x = prepared.ranges.rounded(edge, x) if reads_float else x
            signal += float(exact.square().sum())
            total += float((site.compute(x, rounded, folded.bias) - exact).square().sum())
        noise[site.identity] = total / signal if signal else 0.0

    lockstep(prepared, calls, visit, quantized=False)
    return noise
