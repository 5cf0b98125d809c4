"""Which layer costs what: quantize one operator at a time, and all but one, and measure the module's output."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.accuracy.lockstep import Site, lockstep
from lightning_quant.accuracy.recalibrate import Call
from lightning_quant.accuracy.rescale import folded_layer
from lightning_quant.convert import signal_to_noise
from lightning_quant.graph.plan import identify, path_of
from lightning_quant.prepared import Prepared
from lightning_quant.routing import evaluation_mode
from lightning_quant.tables import text_table

Score = Callable[[list[Any]], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one operator does.

    Errors are noise over signal power of the module's output: 0.01 is 20 dB.

    Attributes:
        name: of the operator.
        kind: its kind.
        weight_error: error with nothing but its weight quantized; zero without a weight.
        activation_error: error with nothing but its output quantized; zero when that stays float.
        only_error: error with both and nothing else quantized.
        without_error: error with everything but this operator quantized.
        own_db: signal-to-noise ratio of its own output with its weight and output quantized, in decibels.
        low: lower end of its output's range.
        high: upper end of its output's range.
        clipped: share of its output's values outside that range, in [0, 1].
        widest: widest range of a weight channel over the median one; how far activations' channels differ, without.
        float_bytes: how many bytes more the file takes with its weight in float.
        score_gain: by how much the given score rises with this operator in float; None without one.
    """

    name: str
    kind: str
    weight_error: float
    activation_error: float
    only_error: float
    without_error: float
    own_db: float
    low: float
    high: float
    clipped: float
    widest: float
    float_bytes: int
    score_gain: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """All operators of a module, the most harmful first.

    Attributes:
        layers: sorted by how much the error falls with the operator in float.
        error: noise over signal power of the output with everything quantized.
    """

    layers: tuple[LayerSensitivity, ...]
    error: float

    def explanation(self) -> str:
        """Say in one line where the loss comes from, and what to do about it."""
        worst = self.layers[0]
        share = max(0.0, 1 - worst.without_error / self.error) if self.error else 0.0
        part = "weights" if worst.weight_error > worst.activation_error else "activations"
        detail = f"range {worst.widest:.0f} times its median channel" if worst.widest >= 2 else f"{worst.kind}"
        gain = "" if worst.score_gain is None else f"{100 * worst.score_gain:+.1f} points, "
        return (
            f"{share:.0%} of the error comes from {worst.name}, {part}, {detail}; keep it float with "
            f'`overrides={{"{worst.name}": "float"}}`: {gain}{worst.float_bytes / 1000:+.0f} KB.'
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("layer", "kind", "error falls by", "only weight", "only output", "own dB", "range", "clipped")
        rows = [
            (
                layer.name,
                layer.kind,
                f"{1 - layer.without_error / self.error:.1%}" if self.error else "-",
                f"{layer.weight_error:.2e}",
                f"{layer.activation_error:.2e}",
                f"{layer.own_db:.1f}",
                f"{layer.low:.3g} to {layer.high:.3g}",
                f"{layer.clipped:.3%}",
            )
            for layer in self.layers
        ]
        return f"{self.explanation()}\n\n{text_table(header, rows)}"


@torch.no_grad()
def sensitivity(prepared: Prepared, calls: list[Call], *, score: Score | None = None) -> Sensitivity:
    """Measure every operator of a calibrated module: three runs of all calls for each, four with a weight.

    Args:
        prepared: detached and calibrated.
        calls: of the module; a few dozen samples are enough to rank operators.
        score: from the outputs of all calls to a number that is better when higher, accuracy in [0, 1] say.

    Returns:
        the operators, the most harmful first.
    """
    with evaluation_mode(prepared.root):
        exact = [prepared.root(*args, **kwargs) for args, kwargs in calls]
        everything = frozenset(prepared.operators) | frozenset(prepared.ranges.edges)

        def run(quantized: frozenset[str]) -> list[Any]:
            with prepared.simulation.quantizing_only(quantized), prepared.attached("frozen"):
                return [prepared.root(*args, **kwargs) for args, kwargs in calls]

        outputs = run(everything)
        score_of_all = None if score is None else score(outputs)
        own = _own_statistics(prepared, calls)
        layers = []
        for identity, operator in prepared.operators.items():
            edge = identify(path_of(identity), operator.output)
            weight = frozenset({identity}) if operator.weight else frozenset()
            edges = frozenset({edge}) if operator.quantized_output else frozenset()
            without = run(everything - weight - edges)
            layers.append(
                LayerSensitivity(
                    name=".".join(part for part in (path_of(identity), operator.key) if part),
                    kind=operator.kind,
                    weight_error=_error(exact, run(weight)) if weight else 0.0,
                    activation_error=_error(exact, run(edges)) if edges else 0.0,
                    only_error=_error(exact, run(weight | edges)),
                    without_error=_error(exact, without),
                    score_gain=None if score is None or score_of_all is None else score(without) - score_of_all,
                    **own[identity],
                )
            )
    layers.sort(key=lambda layer: layer.without_error)
    return Sensitivity(tuple(layers), _error(exact, outputs))


def _error(exact: list[Any], actual: list[Any]) -> float:
    decibels = signal_to_noise(pytree.tree_leaves(exact), pytree.tree_leaves(actual))
    return 10 ** (-decibels / 10)


def _own_statistics(prepared: Prepared, calls: list[Call]) -> dict[str, dict[str, Any]]:
    """Return for each operator its own signal-to-noise ratio, its output's range, and its weight's spread."""
    seen: dict[str, list[float]] = {}
    statistics: dict[str, dict[str, Any]] = {}

    def count(identity: str, x: Tensor) -> None:
        scale, zero_point = prepared.ranges.parameters(identity)
        values = prepared.on_grid(identity, x).float()
        rounded = torch.round(values / scale).clamp(-zero_point, prepared.recipe.activation.quant_max - zero_point)
        outside = (values < (-zero_point - 0.5) * scale) | (
            values > (prepared.recipe.activation.quant_max - zero_point + 0.5) * scale
        )
        entry = seen.setdefault(identity, [0.0, 0.0, 0.0, 0.0])
        noise = (rounded * scale - values).square().sum()
        for index, value in enumerate((values.square().sum(), noise, outside.sum())):
            entry[index] += float(value)
        entry[3] += values.numel()

    with prepared.simulation.watching(count), prepared.attached("observe"):
        for args, kwargs in calls:
            prepared.root(*args, **kwargs)
    weight_noise = _weight_noise(prepared, calls)
    quant_max = prepared.recipe.activation.quant_max
    for identity, operator in prepared.operators.items():
        edge = identify(path_of(identity), operator.output)
        power, noise, outside, number = seen.get(edge, [0.0, 0.0, 0.0, 0.0])
        ratio = (noise / power if power else 0.0) + weight_noise.get(identity, 0.0)
        low = high = 0.0
        if operator.quantized_output:
            scale, zero_point = prepared.ranges.parameters(edge)
            low, high = float(-zero_point * scale), float((quant_max - zero_point) * scale)
        widest, extra = 1.0, 0
        if operator.weight:
            weight = folded_layer(prepared, identity).weight
            spans = weight.abs().flatten(1).amax(1)
            widest, extra = float(spans.max() / spans.median().clamp(min=1e-12)), 3 * weight.numel()
        statistics[identity] = {
            "own_db": -10 * math.log10(ratio) if ratio else math.inf,
            "low": low,
            "high": high,
            "clipped": outside / number if number else 0.0,
            "widest": widest,
            "float_bytes": extra,
        }
    return statistics


def _weight_noise(prepared: Prepared, calls: list[Call]) -> dict[str, float]:
    """Return noise over signal at each weighted operator's output from the rounding of its weight alone."""
    noise: dict[str, float] = {}

    def visit(site: Site) -> None:
        layer = folded_layer(prepared, site.identity)
        folded = prepared.folded(site.identity)
        integers = prepared.weight_integers(site.identity, folded)
        rounded = integers * folded.scale.view(-1, *[1] * (integers.dim() - 1))
        signal = total = 0.0
        for x in site.float_inputs:
            exact = site.compute(x, layer.weight, layer.bias)
            signal += float(exact.square().sum())
            total += float((site.compute(x, rounded, folded.bias) - exact).square().sum())
        noise[site.identity] = total / signal if signal else 0.0

    lockstep(prepared, calls, visit, quantized=False)
    return noise
