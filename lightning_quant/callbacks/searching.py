"""The search of callbacks: trials are validated with the user's own loop, on the weights that will be exported."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.callbacks.after_training import calls_of_copy
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.deployment import Deployment, Known
from lightning_quant.callbacks.directions import watched
from lightning_quant.callbacks.file_metrics import evaluate_artifact
from lightning_quant.callbacks.float_metrics import float_metrics
from lightning_quant.calls.calls import Call
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.measure.attempts import noting
from lightning_quant.measure.contributions import Metrics
from lightning_quant.measure.evaluate import evaluate
from lightning_quant.measure.interim import Decides, Interim, PartialMetrics, is_indifferent, random_order
from lightning_quant.measure.sensitivity import NUM_CALLS
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe import recipe as recipes
from lightning_quant.search.candidates import candidates
from lightning_quant.search.files import Files
from lightning_quant.search.judge import Judge
from lightning_quant.search.objective import LATENCY
from lightning_quant.search.progress import Budget, SearchRecord
from lightning_quant.search.record import find_on_record, fingerprint
from lightning_quant.search.relaxations import Relaxations
from lightning_quant.search.section import SearchSection
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# Training batches from which another plan learns ranges that training through rounding has not.
NUM_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What candidates are calibrated and ranked on.

    Attributes:
        whole: the whole recipe over a copy of the module on the device; of a recipe of layers, which are made on the
            CPU, over the module that is exported.
        calls: of that copy, which ranges were learned from.
        held: calls that chose nothing; where there are none, the last of the others.
    """

    whole: PlannedModel
    calls: list[Call]
    held: list[Call]

    @property
    def to_rank(self) -> list[Call]:
        """Few calls that are enough to rank operators."""
        return (self.held or self.calls[-NUM_CALLS:])[:NUM_CALLS]


def calibrated_and_recorded(prepared: Prepared, steps: Iterator[Callable[[], Any]], number: int) -> Recorded:
    """Calibrate a model on the first steps, record their calls, and hold back those of the others."""
    with recorded_calls(prepared.root) as calls:
        calibrate(prepared, itertools.islice(steps, number))
    with recorded_calls(prepared.root) as held, evaluation_mode(prepared.root), torch.no_grad():
        for step in steps:
            step()
    return Recorded(prepared, calls, held)


def searched(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, recorded: Recorded | None
) -> Deployment:
    """Return the deployment with the best model that was found, and how it was.

    Args:
        callback: whose settings say what is searched.
        trainer: whose validation counts.
        deployment: with the whole recipe.
        recorded: None where nothing was calibrated: layers are tried on the captured call.
    """
    started, settings = time.perf_counter(), callback.settings
    known = float_metrics(callback, trainer, deployment)
    directions = watched(trainer, callback._checkpoint) | known.floating.higher_is_better
    judge = Judge(settings.limits, directions)
    objective = settings.objective or ""
    files = _files(callback, trainer, deployment, recorded, known, list(judge.drops(known.floating)))
    files.timed = judge.on_speed or objective == LATENCY
    files.weighed, files.weighs_float = judge.on_memory, settings.limits.max_peak_memory_ratio is not None
    mark = _mark(callback, deployment, known)
    budget, tell = Budget.of(settings.max_validations, settings.time_budget_s), functools.partial(_tell, callback)
    record = find_on_record(files, judge, objective, budget, callback.last_folder, mark, tell)
    callback.seconds["search"] = time.perf_counter() - started
    best = record.best(objective, judge.direction)
    if best is None:
        return dataclasses.replace(deployment, known=known, notes=(*deployment.notes, record.nothing))
    section = SearchSection(objective, record, best)
    return dataclasses.replace(deployment, model=files.model(best.choice), known=known, search=section)


def _files(
    callback: QuantizationCallback,
    trainer: Trainer,
    deployment: Deployment,
    recorded: Recorded | None,
    known: Known,
    names: list[str],
) -> Files:
    settings, root = callback.settings, deployment.model.root
    captured = Call(*deployment.model.call())
    whole, calls = (deployment.model, [captured]) if recorded is None else (recorded.whole, recorded.calls)
    order = functools.cache(functools.partial(_order, callback, trainer, deployment, known.floating, names))

    def validate(model: PlannedModel, artifact: Artifact, decides: Decides | None) -> Metrics:
        if not known.floating:
            return Metrics()
        tried = dataclasses.replace(deployment, model=model)
        interim = None if decides is None or not order() else Interim(known.floating, decides, order())
        metrics, number = evaluate_artifact(callback, trainer, tried, artifact, contributions=True, interim=interim)
        if not isinstance(metrics, PartialMetrics):
            known.files[artifact.model_digest] = metrics, number
        return metrics

    def on_host(made: PlannedModel) -> PlannedModel:
        return (made if made.root is root else made.bound_to(root)).on_host()

    how: dict[str, Any] = {"dynamic_shapes": settings.dynamic_shapes, "engine": settings.engine}
    how["threads"] = settings.threads
    makes = candidates(whole, calls, settings.selection, trained=callback.trains_rounded)

    def rank() -> Relaxations:
        few = _calls_beside(callback, trainer, deployment) if recorded is None else recorded.to_rank
        return makes.ranked(few or [captured], by_time=settings.objective == LATENCY)

    return Files(known.floating, validate, on_host, deployment.model, makes, rank, **how)


def _calls_beside(callback: QuantizationCallback, trainer: Trainer, deployment: Deployment) -> list[Call]:
    """Return a few calls of training batches, without labels, to rank layers on; none where that fails."""
    calls: list[Call] = []
    # Whatever the user's own step raises.
    with noting(callback.missing, "calls of more than one batch to rank layers on are"):
        _, calls = calls_of_copy(trainer, deployment, callback.path, NUM_CALLS)
    if callback.loss_inputs is None:
        return calls
    bound = [callback.loss_inputs.split(*call)[0] for call in calls]
    return [Call(one.args, one.kwargs) for one in bound]


def _order(
    callback: QuantizationCallback, trainer: Trainer, deployment: Deployment, floating: Metrics, names: list[str]
) -> list[int]:
    """Return the order in which batches come where validation may be cut short; none where it may not."""
    order = random_order(trainer.val_dataloaders, floating, names) if callback.group.size == 1 else []
    if order:
        probe, part = Interim(floating, lambda _: True, order), Metrics()
        how: dict[str, Any] = {"limit_batches": callback.settings.limit_eval_batches, "contributions": True}
        # Whatever another order breaks: validations are whole then.
        with noting([], "validations that are cut short are"), deployment.as_trained():
            part = evaluate(trainer, deployment.pl_module, callback.path, interim=probe, **how)
        order = order if is_indifferent(floating, part, order, names) else []
    return order


def _mark(callback: QuantizationCallback, deployment: Deployment, known: Known) -> str:
    """Return what a search has to have in common with this one to be gone on with."""
    settings = callback.settings
    said = {
        name: value
        for name, value in vars(settings).items()
        if name not in ("recipe", "output_dir", "name", "max_validations", "time_budget_s", "threads")
        and not name.startswith("score_")
    }
    recipe, runtime = recipes.spelled(settings.recipe), callback.chosen_runtime
    return fingerprint(
        deployment.model.root, recipe, runtime, callback.path, sorted(map(repr, said.items())), known.floating
    )


def _tell(callback: QuantizationCallback, record: SearchRecord) -> None:
    if record.trials and not record.ended:
        trial = record.trials[-1]
        outcome = trial.error or ("keeps the limits" if trial.keeps_all else "misses a limit")
        rank_zero_info(f"{type(callback).__name__}: search, {len(record.trials)}: {trial.choice}: {outcome}.")
