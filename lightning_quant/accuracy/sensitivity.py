"""Which layer costs what: quantize one operator at a time, and all but one, and measure the module's output."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from lightning_quant.accuracy.edge_statistics import edge_statistics
from lightning_quant.accuracy.lockstep import Site, lockstep
from lightning_quant.accuracy.recalibrate import Call
from lightning_quant.accuracy.rescale import folded_layer
from lightning_quant.calls import map_tensors
from lightning_quant.convert import signal_to_noise
from lightning_quant.errors import QuantizationError
from lightning_quant.export import in_float32_on_cpu
from lightning_quant.fake_quantize import fake_quantize
from lightning_quant.graph.plan import identify, path_of
from lightning_quant.prepared import Prepared
from lightning_quant.recipe import AnyRecipe, Recipe
from lightning_quant.routing import evaluation_mode
from lightning_quant.tables import text_table

Score = Callable[[list[Any]], float]
# Calls on which reports rank operators.
NUM_CALLS = 2


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one operator does.

    Errors are noise over signal power of the module's output: 0.01 is 20 dB.

    Attributes:
        name: of the operator.
        kind: its kind.
        weight_error: error with nothing but its weight quantized; zero without a weight.
        activation_error: error with nothing but its output quantized and what it reads of float operators; zero when
            there is neither.
        only_error: error with weight and activations and nothing else quantized.
        without_error: error with everything but this operator quantized.
        own_db: signal-to-noise ratio of its own output with nothing else quantized, in decibels.
        low: lower end of its output's range; of its input's where the output stays float.
        high: upper end of that range.
        clipped: share of those values outside that range, in [0, 1].
        widest: widest range of a weight's output channel over the median one; 1 without a weight.
        spread: largest magnitude of the widest activation channel over the median channel's, of the values of `low`.
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
    spread: float
    float_bytes: int
    score_gain: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """All operators of a module, the most harmful first.

    Attributes:
        layers: sorted by how much the error falls with the operator in float.
        error: noise over signal power of the output with everything quantized.
        gains: validation metric to how it changes with the most harmful operator in float.
    """

    layers: tuple[LayerSensitivity, ...]
    error: float
    gains: dict[str, float] = field(default_factory=dict)

    def explanation(self) -> str:
        """Say in one line where the loss comes from, and what to do about it."""
        worst = self.layers[0]
        share = max(0.0, 1 - worst.without_error / self.error) if self.error else 0.0
        in_weights = worst.weight_error > worst.activation_error
        part, times = ("weights", worst.widest) if in_weights else ("activations", worst.spread)
        detail = f"range {times:.0f} times its median channel" if times >= 2 else f"{worst.kind}"
        gains = [] if worst.score_gain is None else [f"{100 * worst.score_gain:+.1f} points"]
        gains += [f"{name} {value:+.4f}" for name, value in self.gains.items()]
        gains += [f"{10 * math.log10(self.error / worst.without_error):+.1f} dB"] if worst.without_error else []
        return (
            f"{share:.0%} of the error comes from {worst.name}, {part}, {detail}; keep it float with "
            f'`overrides={{"{worst.name}": "float"}}`: {", ".join(gains)}, {worst.float_bytes / 1000:+.0f} KB.'
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)

    def __str__(self) -> str:
        header = ("layer", "kind", "error falls by", "only weight", "only activations", "own dB", "range", "clipped")
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
        everything = all_but(prepared)

        def run(quantized: frozenset[str]) -> list[Any]:
            with prepared.simulation.quantizing_only(quantized), prepared.attached("frozen"):
                return [prepared.root(*args, **kwargs) for args, kwargs in calls]

        outputs = run(everything)
        score_of_all = None if score is None else score(outputs)
        own = _own_statistics(prepared, calls)
        layers = []
        for identity, operator in tqdm(prepared.operators.items(), desc="sensitivity", leave=False, disable=None):
            weight, edges = _own(prepared, identity)
            without = run(everything - weight - edges)
            layers.append(
                LayerSensitivity(
                    name=_name(prepared, identity),
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


def check_rankable(recipe: AnyRecipe, *, sensitivity: bool) -> None:
    """Refuse to rank the layers of a recipe that has no graph.

    Raises:
        QuantizationError: sensitivity is wanted of such a recipe.
    """
    if sensitivity and not isinstance(recipe, Recipe):
        raise QuantizationError(
            f"Expected a recipe that is calibrated for `sensitivity`, such as 'int8', but got {recipe.name!r}, whose "
            "plan has the signal-to-noise ratios of layers that kept a safer scheme."
        )


def rank_operators(prepared: Prepared, calls: list[Call]) -> Sensitivity:
    """Measure every operator on the first calls, in float32 on the CPU."""

    def moved(tensor: Tensor) -> Tensor:
        return in_float32_on_cpu([tensor])[0]

    return sensitivity(prepared, [map_tensors(moved, call) for call in calls[:NUM_CALLS]])


def all_but(prepared: Prepared, name: str = "") -> frozenset[str]:
    """Return what `Prepared.quantizing_only` takes for everything but one operator."""
    left_out = [part for i in prepared.operators if _name(prepared, i) == name for part in _own(prepared, i)]
    return (frozenset(prepared.operators) | frozenset(prepared.ranges.edges)).difference(*left_out)


def _name(prepared: Prepared, identity: str) -> str:
    return ".".join(part for part in (path_of(identity), prepared.operators[identity].key) if part)


def _own(prepared: Prepared, identity: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return an operator's weight, and the edges that are its own: its output and what float operators hand it."""
    operator, path = prepared.operators[identity], path_of(identity)
    weight = frozenset({identity}) if operator.weight else frozenset()
    output = {identify(path, operator.output)} if operator.quantized_output else set()
    return weight, frozenset(output | _read_from_float(prepared, identity))


def _read_from_float(prepared: Prepared, identity: str) -> set[str]:
    """Return the input edges that no operator writes: they are quantized for the sake of those that read them."""
    path = path_of(identity)
    written = {identify(path_of(i), o.output) for i, o in prepared.operators.items() if o.quantized_output}
    inputs = {identify(path, key) for key in prepared.operators[identity].inputs}
    return {edge for edge in inputs & set(prepared.ranges.observers) if edge not in written}


def _error(exact: list[Any], actual: list[Any]) -> float:
    decibels = signal_to_noise(pytree.tree_leaves(exact), pytree.tree_leaves(actual))
    return 10 ** (-decibels / 10)


def _own_statistics(prepared: Prepared, calls: list[Call]) -> dict[str, dict[str, Any]]:
    """Return for each operator its own signal-to-noise ratio, its range, and how far its channels differ."""
    seen, weight_noise = edge_statistics(prepared, calls), _weight_noise(prepared, calls)
    statistics: dict[str, dict[str, Any]] = {}
    quant_max = prepared.recipe.activation.quant_max
    for identity, operator in prepared.operators.items():
        edge = identify(path_of(identity), operator.output if operator.quantized_output else operator.inputs[0])
        found, ratio = seen.get(edge), weight_noise.get(identity, 0.0)
        if found is not None and found.power and operator.quantized_output:
            ratio += found.noise / found.power
        low = high = 0.0
        if edge in prepared.ranges.edges:
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
            "clipped": 0.0 if found is None else found.outside / found.number,
            "widest": widest,
            "spread": 1.0 if found is None else found.spread,
            "float_bytes": extra,
        }
    return statistics


def _weight_noise(prepared: Prepared, calls: list[Call]) -> dict[str, float]:
    """Return noise over signal at each weighted operator's output from its weight and what it reads of float ones."""
    noise: dict[str, float] = {}
    quant_max = prepared.recipe.activation.quant_max

    def visit(site: Site) -> None:
        layer = folded_layer(prepared, site.identity)
        folded = prepared.folded(site.identity)
        integers = prepared.weight_integers(site.identity, folded)
        rounded = integers * folded.scale.view(-1, *[1] * (integers.dim() - 1))
        edge = identify(path_of(site.identity), site.operator.inputs[0])
        reads_float = edge in _read_from_float(prepared, site.identity)
        signal = total = 0.0
        for x in site.float_inputs:
            exact = site.compute(x, layer.weight, layer.bias)
            x = fake_quantize(x, *prepared.ranges.parameters(edge), quant_max) if reads_float else x
            signal += float(exact.square().sum())
            total += float((site.compute(x, rounded, folded.bias) - exact).square().sum())
        noise[site.identity] = total / signal if signal else 0.0

    lockstep(prepared, calls, visit, quantized=False)
    return noise
