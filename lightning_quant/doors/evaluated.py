"""`quantize(..., evaluate=)`: metrics by a function of the user's, of the float module and of exported files."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calls.calls import Call
from lightning_quant.doors.settings import Settings
from lightning_quant.doors.yielded import Yielded, counted_samples, given_whole
from lightning_quant.errors import EvaluationError, NoEffectWarning, QuantizationError
from lightning_quant.machine.timed import timed
from lightning_quant.measure.contributions import Metrics, differences
from lightning_quant.measure.interim import Decides, Interim, PartialMetrics
from lightning_quant.measure.sensitivity import NUM_CALLS
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe import recipe as recipes
from lightning_quant.report.make_report import opened
from lightning_quant.report.metrics import MetricRow
from lightning_quant.search.candidates import candidates
from lightning_quant.search.checks import check_metrics
from lightning_quant.search.files import Files
from lightning_quant.search.judge import Judge
from lightning_quant.search.objective import LATENCY
from lightning_quant.search.progress import Budget
from lightning_quant.search.record import find_on_record, fingerprint
from lightning_quant.search.section import SearchSection
from lightning_quant.surgery.routing import evaluation_mode

Function = Callable[[nn.Module], Any]


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A function of the user's, and what it says of the float module.

    Attributes:
        function: of a module to its metrics; None where there is none.
        floating: metrics of the float module.
        settings: with limits.
        known: metrics by `model_digest` of what was evaluated whole: a search's file is not for its report again.
    """

    function: Function | None
    floating: Metrics
    settings: Settings
    known: dict[str, Metrics] = dataclasses.field(default_factory=dict)

    def of_file(self, model: PlannedModel, artifact: Artifact, decides: Decides | None = None) -> Metrics:
        """Return the metrics of an exported file, of no more parts than decide where the function gives parts.

        Raises:
            EvaluationError: the function fails on it, or gives no metrics.
        """
        if self.function is None:
            return Metrics()
        if artifact.model_digest in self.known:
            return self.known[artifact.model_digest]
        module = opened(model, artifact, self.settings.threads or torch.get_num_threads())
        try:
            metrics = metrics_of(self.function, module, self._interim(decides))
        except QuantizationError:
            raise
        # Whatever the user's own code raises: what was tried before must not be lost for it.
        except Exception as error:
            raise EvaluationError(f"Expected `evaluate` to take the exported module, but {error!r}.") from error
        if not isinstance(metrics, PartialMetrics):
            self.known[artifact.model_digest] = metrics
        return metrics

    def _interim(self, decides: Decides | None) -> Interim | None:
        numbers = [parts.number for parts in self.floating.contributions.values()]
        # In the order that the function gives, of which nothing is known: what it promises is decided on all data.
        return None if decides is None or not numbers else Interim(self.floating, decides, range(max(numbers)))

    def rows(self, model: PlannedModel, artifact: Artifact) -> tuple[tuple[MetricRow, ...], tuple[str, ...], Metrics]:
        """Return rows of a report, why there are none where the function fails, and the metrics of the file."""
        judge = Judge(self.settings.limits, self.floating.higher_is_better)
        try:
            values = self.of_file(model, artifact)
        except QuantizationError as error:
            return (), (f"the metrics of the file are missing: {error}".rstrip("."),), Metrics()
        margins = {name: one.margin for name, one in differences(values, self.floating).items()}
        rows = tuple(
            MetricRow(name, value, None, values.get(name), None, None, judge.direction(name), margins.get(name))
            for name, value in self.floating.items()
        )
        return rows, (), values


def evaluated(function: Function | None, module: nn.Module, settings: Settings) -> Evaluated:
    """Return what a function says of the float module, and refuse limits on what it does not say.

    Raises:
        QuantizationError: it gives no metrics, or the limits are on others or in another direction.
    """
    if function is None:
        return Evaluated(None, Metrics(), settings)
    if not callable(function):
        raise QuantizationError(
            f"Expected `evaluate` to be a function of a module to its metrics, but got {function!r:.60}."
        )
    floating = metrics_of(function, module)
    if settings.searches:
        check_metrics(settings.limits, settings.objective, floating, floating.higher_is_better)
    return Evaluated(function, floating, settings)


@torch.no_grad()
def metrics_of(function: Function, module: nn.Module, interim: Interim | None = None) -> Metrics:
    """Return what a function gives: a number, values of all samples, a metric, or a dict of these; or yields by parts.

    Args:
        function: of a module.
        module: which it is called with.
        interim: ends a function that yields parts where these decide.

    Raises:
        EvaluationError: it is something else.
    """
    with evaluation_mode(module), counted_samples(module) as count:
        given = function(module)
        if not isinstance(given, Iterator):
            return given_whole(given)
        seen = Yielded()
        for part in given:
            seen.add(part, count())
            if interim is not None and interim.look(seen.number, seen.contributions):
                break
    return seen.metrics() if interim is None or interim.metrics is None else interim.metrics


def searched(
    judged: Evaluated, whole: PlannedModel, calls: list[Call], held: list[Call], folder: Path, seconds: dict[str, float]
) -> tuple[PlannedModel, SearchSection | None]:
    """Return the best model that was found, and how; the whole recipe where no file could be made.

    Args:
        judged: what decides.
        whole: calibrated on the calls, with the whole recipe.
        calls: that ranges were learned from.
        held: calls that were held back.
        folder: the artifact's.
        seconds: gets the time that it took.
    """
    settings = judged.settings
    judge, objective = Judge(settings.limits, judged.floating.higher_is_better), settings.objective or ""
    makes, few = candidates(whole, calls, settings.selection), (held or calls[-NUM_CALLS:])[:NUM_CALLS]
    rank = functools.partial(makes.ranked, few, by_time=objective == LATENCY)
    files = Files(judged.floating, judged.of_file, lambda made: made.on_host(), whole.on_host(), makes, rank)
    files.timed, files.threads = judge.on_speed or objective == LATENCY, settings.threads
    files.weighed, files.weighs_float = judge.on_memory, settings.limits.max_peak_memory_ratio is not None
    files.dynamic_shapes, files.engine = settings.dynamic_shapes, settings.engine
    said = settings.as_code(output_dir=None, threads=None, max_validations=None, time_budget_s=None)
    mark = fingerprint(whole.root, said, recipes.spelled(settings.recipe), whole.plan.runtime, judged.floating)
    budget = Budget.of(settings.max_validations, settings.time_budget_s)
    with timed(seconds, "search"):
        record = find_on_record(files, judge, objective, budget, folder, mark)
    best = record.best(objective, judge.direction)
    if best is None:
        warnings.warn(f"{folder}: {record.nothing}.", NoEffectWarning, stacklevel=3)
        return whole, None
    return files.model(best.choice), SearchSection(objective, record, best)
