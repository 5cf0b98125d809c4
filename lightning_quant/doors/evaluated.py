"""`quantize(..., evaluate=)`: metrics by a function of the user's, of the float module and of exported files."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calls.calls import Call
from lightning_quant.doors.settings import Settings
from lightning_quant.errors import EvaluationError, NoEffectWarning, QuantizationError
from lightning_quant.machine.timed import timed
from lightning_quant.measure.contributions import Contributions, Metrics, differences, of_samples
from lightning_quant.measure.sensitivity import NUM_CALLS
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe import recipe as recipes
from lightning_quant.report.make_report import opened
from lightning_quant.report.metrics import MetricRow
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.checks import check_metrics
from lightning_quant.search.files import Files
from lightning_quant.search.find import Budget
from lightning_quant.search.judge import Judge
from lightning_quant.search.objective import LATENCY
from lightning_quant.search.record import find_on_record, fingerprint
from lightning_quant.search.relaxations import relaxations
from lightning_quant.search.section import SearchSection
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

Function = Callable[[nn.Module], Any]
# What a function is called by that gives a number and no dict.
METRIC = "metric"


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A function of the user's, and what it says of the float module.

    Attributes:
        function: of a module to its metrics; None where there is none.
        floating: metrics of the float module.
        settings: with limits.
    """

    function: Function | None
    floating: Metrics
    settings: Settings

    def of_file(self, model: PlannedModel, artifact: Artifact) -> Metrics:
        """Return the metrics of an exported file.

        Raises:
            EvaluationError: the function fails on it, or gives no metrics.
        """
        if self.function is None:
            return Metrics()
        try:
            return metrics_of(self.function, opened(model, artifact, self.settings.threads or torch.get_num_threads()))
        except QuantizationError:
            raise
        # Whatever the user's own code raises: what was tried before must not be lost for it.
        except Exception as error:
            raise EvaluationError(f"Expected `evaluate` to take the exported module, but {error!r}.") from error

    def rows(self, model: PlannedModel, artifact: Artifact) -> tuple[tuple[MetricRow, ...], tuple[str, ...], Metrics]:
        """Return rows of a report, why there are none where the function fails, and the metrics of the file."""
        judge = Judge(self.settings.limits, {})
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
        check_metrics(settings.limits, settings.objective, floating, {})
    return Evaluated(function, floating, settings)


@torch.no_grad()
def metrics_of(function: Function, module: nn.Module) -> Metrics:
    """Return what a function gives: a number, values of all samples, or a dict of either.

    Raises:
        EvaluationError: it is something else.
    """
    with evaluation_mode(module):
        given = function(module)
    named = given if isinstance(given, Mapping) else {METRIC: given}
    values, parts = dict[str, float](), dict[str, Contributions]()
    for name, value in named.items():
        try:
            numbers = value.detach().cpu().double() if isinstance(value, Tensor) else torch.as_tensor(value).double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise EvaluationError(
                f"Expected `evaluate` to return numbers, values of samples, or a dict of them, but got {value!r:.60}."
            ) from error
        values[str(name)] = float(numbers.mean()) if numbers.numel() else math.nan
        if numbers.numel() > 1:
            parts[str(name)] = of_samples(numbers.flatten().tolist())
    return Metrics(values, contributions=parts)


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
    judge, objective = Judge(settings.limits, {}), settings.objective or ""
    candidates = rank = None
    if isinstance(whole, Prepared):
        candidates = Candidates(whole, calls, settings.selection)
        by_time = objective == LATENCY
        rank = functools.partial(relaxations, whole, (held or calls[-NUM_CALLS:])[:NUM_CALLS], by_time=by_time)
    files = Files(judged.floating, judged.of_file, lambda made: made.on_host(), whole.on_host(), candidates, rank)
    files.timed, files.threads = judge.on_speed or objective == LATENCY, settings.threads
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
