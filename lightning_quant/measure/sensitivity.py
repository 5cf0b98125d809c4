"""Which layer costs what: quantize one operator at a time, and all but one, and measure the module's output."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.measure.advice import Advice, advise
from lightning_quant.measure.own_statistics import error_of, own_statistics
from lightning_quant.measure.rounded_parts import all_but, name_of, own_parts
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import moved_call
from lightning_quant.surgery.routing import device_of, evaluation_mode
from lightning_quant.terminal.figures import figures, fixed
from lightning_quant.terminal.progress import tracked
from lightning_quant.terminal.tables import one_line, text_table

Score = Callable[[list[Any]], float]
# Calls on which reports rank operators.
NUM_CALLS = 2
# What is printed as 0.0000.
_SMALLEST_GAIN = 5e-5


@dataclass(frozen=True)
class OperatorSensitivity:
    """What quantizing one operator does.

    Errors are noise over signal power of the module's output: 0.01 is 20 dB.

    Attributes:
        name: of the operator.
        kind: its kind.
        weight_error: error with nothing but its weight quantized; zero without a weight.
        activation_error: error with nothing but its output quantized and what it reads of float operators; zero when
            there is neither.
        only_error: error with weight and activations and nothing else quantized.
        without_error: error with everything but that quantized: what it contributes. Keeping it float may gain less, as
            long as another operator needs the same tensor rounded; `Sensitivity.advice` is about that.
        own_db: signal-to-noise ratio of its own output with nothing else quantized, in decibels.
        low: lower end of its output's range; of its input's where the output stays float.
        high: upper end of that range.
        clipped: share of those values outside that range, in [0, 1].
        widest: widest range of a weight's output channel over the median one; 1 without a weight.
        spread: largest magnitude of the widest activation channel over the median channel's, of the values of `low`.
        float_bytes: how many bytes more the file takes with its weight in float, scales and zero points left out.
        score_gain: by how much the given score rises with nothing of this operator quantized; None without one.
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
        layers: sorted by how much the error falls with nothing of the operator quantized.
        error: noise over signal power of the output with everything quantized.
        advice: what to keep float against the most harmful one; None where nothing is gained or left to quantize.
        gains: validation metric to how it changes with what the advice keeps in float.
    """

    layers: tuple[OperatorSensitivity, ...]
    error: float
    advice: Advice | None = None
    gains: dict[str, float] = field(default_factory=dict)

    def with_gains(
        self, gains: dict[str, float], higher_is_better: Mapping[str, bool | None] | None = None
    ) -> "Sensitivity":
        """Return the same with what the advice does to validation metrics; without it where it makes none better.

        Args:
            gains: metric to how it changes.
            higher_is_better: of metrics of which that is known. Losses count where there is nothing else.
        """
        known = {"acc": True, "loss": False} | dict(higher_is_better or {})
        signs = {name: _sign(name, known) for name in gains}
        judged = [name for name in gains if "loss" not in name.lower()] or list(gains)
        better = [gains[name] * signs[name] if signs[name] else abs(gains[name]) for name in judged]
        helps = not gains or max(better) >= _SMALLEST_GAIN
        return replace(self, gains=gains, advice=self.advice if helps else None)

    def explanation(self) -> str:
        """Say in one line where the loss comes from, and what to do about it."""
        worst = self.layers[0]
        share = max(0.0, 1 - worst.without_error / self.error) if self.error else 0.0
        in_weights = worst.weight_error > worst.activation_error
        part, times = ("weights", worst.widest) if in_weights else ("activations", worst.spread)
        detail = f"range {times:.0f} times its median channel" if times >= 2 else f"{worst.kind}"
        line = f"{share:.0%} of the error comes from {worst.name}, {part}, {detail}"
        return f"{line}; {self._way_out()}."

    def _way_out(self) -> str:
        if self.advice is None and self.gains:
            moved = ", ".join(f"{name} {fixed(value, sign=True)}" for name, value in self.gains.items())
            return f"keeping it float makes no metric better ({moved})"
        if self.advice is None:
            return "no part of the net gains by being kept float for its sake"
        names = ", ".join(f'"{name}": "float"' for name in self.advice.names)
        which = "it" if len(self.advice.names) == 1 else "it and what shares its tensors"
        gains = [] if self.advice.score_gain is None else [f"{100 * self.advice.score_gain:+.1f} points"]
        gains += [f"{name} {fixed(value, sign=True)}" for name, value in self.gains.items()]
        gains += [f"{10 * math.log10(self.error / self.advice.error):+.1f} dB"] if self.advice.error else []
        kilobytes = f"{self.advice.float_bytes / 1000:+.0f} KB"
        return f"keep {which} float with `overrides={{{names}}}`: {', '.join(gains)}, {kilobytes}"

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
                f"{figures(layer.low)} to {figures(layer.high)}",
                f"{layer.clipped:.3%}",
            )
            for layer in self.layers
        ]
        return f"{one_line(self.explanation())}\n\n{text_table(header, rows)}"


@torch.no_grad()
@exact_arithmetic()
def sensitivity(prepared: Prepared, calls: list[Call], *, score: Score | None = None) -> Sensitivity:
    """Measure every operator of a calibrated module: four runs of all calls for each, six with a weight.

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

        def measure(quantized: frozenset[str]) -> tuple[float, float | None]:
            outputs = run(quantized)
            return error_of(exact, outputs), None if score is None else score(outputs)

        error, score_of_all = measure(everything)
        own = own_statistics(prepared, calls)
        layers = []
        for identity, operator in tracked(prepared.operators.items(), "Sensitivity", "operator"):
            weight, edges = own_parts(prepared, identity)
            without, without_score = measure(everything - weight - edges)
            only = measure(weight | edges)[0]
            layers.append(
                OperatorSensitivity(
                    name=name_of(prepared, identity),
                    kind=operator.kind,
                    weight_error=only if not edges else measure(weight)[0] if weight else 0.0,
                    activation_error=only if not weight else measure(edges)[0] if edges else 0.0,
                    only_error=only,
                    without_error=without,
                    score_gain=None if without_score is None or score_of_all is None else without_score - score_of_all,
                    **own[identity],
                )
            )
        layers.sort(key=lambda layer: layer.without_error)
        sizes = {layer.name: layer.float_bytes for layer in layers}
        return Sensitivity(tuple(layers), error, advise(prepared, layers[0].name, measure, sizes))


def _sign(name: str, known: Mapping[str, bool | None]) -> int:
    """Return 1 for metrics that are better when higher, -1 for others, 0 where that is not known."""
    sign = known.get(name)
    if sign is None:
        sign = next((known[part] for part in ("loss", "acc") if part in name.lower()), None)
    return 0 if sign is None else 1 if sign else -1


def check_rankable(recipe: AnyRecipe, *, sensitivity: bool) -> None:
    """Refuse to rank the layers of a recipe that has no graph.

    Raises:
        QuantizationError: sensitivity is wanted of such a recipe.
    """
    if sensitivity and not recipe.needs_calibration:
        raise QuantizationError(
            f"Expected a recipe that is calibrated for `sensitivity`, such as 'int8', but got {recipe.name!r}, whose "
            "plan has the signal-to-noise ratios of layers that kept a safer scheme."
        )


def rank_operators(prepared: Prepared, calls: list[Call]) -> Sensitivity:
    """Measure every operator on the first calls, in float32; in another precision of the module, on the CPU."""
    parameters = prepared.root.parameters()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in parameters):
        prepared = prepared.on_host()
    device = device_of(prepared.root)
    return sensitivity(prepared, [moved_call(*call, device) for call in calls[:NUM_CALLS]])
