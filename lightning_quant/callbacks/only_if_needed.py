"""Training through rounding only where it is needed: the exported file of quantization without it is tried first."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_quant.callbacks.announce import warn
from lightning_quant.callbacks.deployment import Deployment, Known, choose_weights
from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.file_metrics import evaluate_artifact
from lightning_quant.callbacks.forecast import forecast
from lightning_quant.callbacks.search_checks import first_metrics
from lightning_quant.callbacks.training_data import borrowed_loaders
from lightning_quant.callbacks.untrained import calibrated
from lightning_quant.calls.calls import Call
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.export.export import export
from lightning_quant.machine.disk import scratch_folder
from lightning_quant.measure.contributions import Metrics, differences
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.limits import Limits
from lightning_quant.report.scored_weights import ScoredWeights, WeightsSection
from lightning_quant.search.checks import check_metrics
from lightning_quant.search.choice import Measured, Verdict
from lightning_quant.search.judge import Judge
from lightning_quant.search.record import save_beside
from lightning_quant.surgery.host import moved
from lightning_quant.surgery.routing import clone, resolve

if TYPE_CHECKING:
    from lightning_quant.callbacks.qat import QuantizationAwareTraining

WITHOUT_TRAINING = "weights are those with which rounding began, quantized without training"


@dataclass(frozen=True)
class Tried:
    """Some weights as an exported file.

    Attributes:
        deployment: the weights and the model over them.
        verdicts: one for each limit.
        floating: metrics of the weights in float.
        file: those of the file.
        size_bytes: of the model files.
    """

    deployment: Deployment
    verdicts: tuple[Verdict, ...]
    floating: Metrics
    file: Metrics
    size_bytes: int

    @property
    def keeps(self) -> bool:
        """Whether every limit is kept."""
        return all(verdict.kept for verdict in self.verdicts)

    @property
    def missed(self) -> tuple[float, float]:
        """How much of the limits is missed, and used up where they are kept: less is better."""
        used = [math.inf if v.reached is None else v.reached / max(abs(v.allowed), 1e-9) for v in self.verdicts]
        return sum(verdict.miss for verdict in self.verdicts), max(used, default=0.0)

    def row(self, *, is_artifact: bool) -> ScoredWeights:
        """Return what a report says of these weights."""
        words = " and ".join(self.deployment.notes) or "weights are the last ones"
        return ScoredWeights(words, is_artifact, dict(self.file), str(self), self.keeps, self.size_bytes)

    def __str__(self) -> str:
        return ", ".join(
            f"{v.limit} gets worse by {v.reached:.4g} of {v.allowed:g} allowed" if v.reached is not None else v.basis
            for v in self.verdicts
        )


@dataclass
class Need:
    """What is known of whether training through rounding is needed.

    Attributes:
        limits: that the file is to keep.
        needed: None until quantization after training was tried.
        tried: what came of that, unless it failed or the run was resumed since.
        before: metrics in float at that point.
        directions: metric to whether it is better when higher, where that is known.
        looks: files that were judged on the validation data.
        gaps: by how much each validation under rounding misses the limits on its simulated metrics.
    """

    limits: Limits
    needed: bool | None = None
    tried: Tried | None = None
    before: Metrics = field(default_factory=Metrics)
    directions: dict[str, bool] = field(default_factory=dict)
    looks: int = 0
    gaps: list[float] = field(default_factory=list)

    def phase(
        self, callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, phase: str
    ) -> str:
        """Return the phase of a schedule; where rounding would begin and is not needed, the one before that."""
        if phase in ("off", "observe"):
            return phase
        if self.needed is None:
            self._try(callback, trainer, pl_module)
        return phase if self.needed else "observe"

    def validated(self, callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a validation under rounding, forecast, and end training once the exported file keeps the limits."""
        if not self.needed or trainer.sanity_checking or not callback.require_prepared().quantizes:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        verdicts = Judge(self.limits, self.directions)(_measured(Metrics(logged), Metrics(self.before)))
        on_metrics = [v for v in verdicts if v.reached is not None]
        self.gaps.append(max((v.reached - v.allowed for v in on_metrics), default=math.inf))  # type: ignore[operator]
        rank_zero_info(f"QuantizationAwareTraining: {forecast(self.gaps)}.")
        if self.gaps[-1] > 0:
            return
        tried = _attempted("the file", tried_with_ranges, callback, trainer, pl_module, self)
        if tried is not None and tried.keeps:
            rank_zero_info(f"QuantizationAwareTraining: the file keeps the limits ({tried}), so training ends.")
            trainer.should_stop = True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"needed": self.needed, "before": dict(self.before), "looks": self.looks, "gaps": self.gaps}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint held."""
        self.needed, self.before = state["needed"], Metrics(state["before"])
        self.looks, self.gaps = state["looks"], list(state["gaps"])

    def _try(self, callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule) -> None:
        tried = _attempted("quantization without training", tried_after_training, callback, trainer, pl_module, self)
        if tried is None:
            self.needed = True
            self.before = Metrics({name: float(value) for name, value in trainer.callback_metrics.items()})
            return
        self.needed, self.before = not tried.keeps, tried.floating
        self.tried = tried
        outcome = "training through rounding begins" if self.needed else "the run goes on in float"
        rank_zero_info(f"QuantizationAwareTraining: quantized without it, {tried}: {outcome}.")


def need_of(
    callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, limits: Limits
) -> Need:
    """Return what is known when fit begins; refuse limits that no validation tells of.

    Raises:
        QuantizationError: there is no validation, a metric is not logged, or a limit has another direction.
    """
    with borrowed_loaders(trainer):
        logged = first_metrics(callback, trainer, pl_module, "only_if_needed")
    directions = watched(trainer, callback._checkpoint) | logged.higher_is_better
    check_metrics(limits, None, logged, directions)
    return Need(limits, directions=directions)


def tried_after_training(
    callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, need: Need
) -> Tried:
    """Quantize the weights of now without training, export them, and validate the file."""
    with isolated_rng():
        duplicate = clone(pl_module, unrouted=True, convert=_copied)
        deployment = Deployment(duplicate, calibrated(callback, trainer, duplicate), None, ())
        return _measure(callback, trainer, deployment, need)


def tried_with_ranges(
    callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, need: Need
) -> Tried:
    """Export the weights of now with the ranges that training has learned, and validate the file."""
    with isolated_rng():
        duplicate = clone(pl_module, unrouted=True, convert=_copied)
        bound = callback.require_prepared().apart(resolve(duplicate, callback.path)).on_host()
        return _measure(callback, trainer, Deployment(duplicate, bound, None, ()), need)


def without_rounding(
    callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, need: Need
) -> Deployment:
    """Return the weights at the end, quantized without training; those of the earlier trial where they miss a limit."""
    chosen = choose_weights(callback, trainer, pl_module, with_ranges=False)
    model = calibrated(callback, trainer, chosen.pl_module)
    chosen = dataclasses.replace(chosen, model=model)
    last = _attempted("the file of the last weights", _measure, callback, trainer, chosen, need)
    tried = [one for one in (last, need.tried) if one is not None]
    if not tried:
        return chosen
    kept = next((one for one in tried if one.keeps), tried[0])
    note = f"nothing was trained through rounding, since it is not needed: {kept}"
    if kept is not last:
        note = f"weights are those of an earlier step, whose file keeps the limits: {kept}; of the last: {last}"
    return dataclasses.replace(kept.deployment, notes=(*kept.deployment.notes, note))


def better_weights(
    callback: "QuantizationAwareTraining", trainer: Trainer, pl_module: LightningModule, last: Deployment, need: Need
) -> Deployment:
    """Return the last weights, the best, or those of before rounding, whichever file keeps the limits better."""
    of_last = _attempted("the file of the last weights", _measure, callback, trainer, last, need)
    if of_last is None:
        return last
    tried = [of_last]
    prepared = callback.require_prepared()
    state = copy.deepcopy(prepared.state_dict())
    best = choose_weights(callback, trainer, pl_module, with_ranges=True, weights="best")
    if any(note.startswith("weights are the best ones") for note in best.notes):
        of_best = _attempted("the file of the best weights", _measure, callback, trainer, best, need)
        tried += [] if of_best is None else [of_best]
    if (first := need.tried) is not None:
        untrained = dataclasses.replace(first.deployment, notes=(WITHOUT_TRAINING,))
        tried.append(dataclasses.replace(first, deployment=untrained))
    kept = min(tried, key=lambda one: one.missed)
    callback.trains_rounded = WITHOUT_TRAINING not in kept.deployment.notes
    if kept is tried[0]:
        prepared.load_state_dict(state)
    scored = WeightsSection(
        tuple(one.row(is_artifact=one is kept) for one in sorted(tried, key=lambda o: o is not kept))
    )
    save_beside(callback.last_folder, scored.to_dict(), anew=not callback.settings.searches)
    return dataclasses.replace(kept.deployment, scored=scored)


def _attempted(what: str, measure: Callable[..., Tried], *args: Any) -> Tried | None:
    """Return what comes of a trial; None where it fails, whatever that is: it costs neither training nor artifact."""
    try:
        return measure(*args)
    except Exception as error:
        warn(f"QuantizationAwareTraining: {what} could not be tried: {error!r}")
        return None


def _measure(callback: "QuantizationAwareTraining", trainer: Trainer, deployment: Deployment, need: Need) -> Tried:
    settings, calls = callback.settings, list[Call]()
    model: PlannedModel = deployment.model
    how: dict[str, Any] = {"limit_batches": settings.limit_eval_batches, "recorded": calls, "contributions": True}
    with deployment.as_trained():
        floating = evaluate(trainer, deployment.pl_module, callback.path, **how)
    model.observe_unreached()
    with scratch_folder() as folder:
        artifact = export(model, folder / "trial", dynamic_shapes=settings.dynamic_shapes, engine=settings.engine)
        file = evaluate_artifact(callback, trainer, deployment, artifact, contributions=True)
        known, size = Known(floating, calls, {artifact.model_digest: file}), artifact.size_bytes
    # Weights that were trained through rounding are held against those before it.
    directions = need.directions | watched(trainer, callback._checkpoint) | floating.higher_is_better
    need.looks += 1
    judged = _measured(file[0], need.before if need.needed else floating)
    verdicts = Judge(need.limits, directions)(judged, need.looks)
    return Tried(dataclasses.replace(deployment, known=known), verdicts, floating, file[0], size)


def _measured(file: Metrics, floating: Metrics) -> Measured:
    return Measured(dict(file), differences(file, floating), 0, math.nan)


def _copied(tensor: Tensor) -> Tensor:
    """Return a copy of its own on the CPU: training goes on with the original."""
    values = moved(tensor).detach().clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
