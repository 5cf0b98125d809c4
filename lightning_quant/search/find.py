"""The search itself: from the whole recipe to as few operators in float as the limits ask for, by validations alone.

The number of steps of a ranking is bisected on validations of exported files. A set that is cheaper by the model of the
ranking is tried with what is left.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lightning_quant.errors import QuantizationError
from lightning_quant.search.choice import Choice, Measured, Trial, Verdict
from lightning_quant.search.objective import COSTS, LATENCY, SIZE

# Time by float's above which integers do not pay.
_WORTH = 1.0
# Time by that of the quicker of all in integers and all in float that a file may take.
_BOUND = 1.02
# Validations beside those of the bisection: the whole recipe, a safer calibration of it, a cheaper set.
_BESIDE = 3


class Space(Protocol):
    """What can be tried."""

    def measure(self, choice: Choice) -> Measured:
        """Export a choice and validate the file."""

    def accurate(self) -> Choice | None:
        """Return the whole recipe with more done for accuracy; None where there is no more."""

    def steps(self) -> Sequence[Choice]:
        """Return choices that keep more and more out of the recipe, ranked once."""

    def cheaper(self, fails: Choice, keeps: Choice) -> Choice | None:
        """Return a choice cheaper than one that keeps the limits, and likely to keep them, too."""

    def quicker(self, base: Choice) -> Choice | None:
        """Return a choice whose file takes less time on this machine, with more in float; the base where none does."""

    def all_float(self) -> Choice | None:
        """Return what keeps everything in float; None where that is none of the choices."""

    def times(self, choices: Sequence[Choice]) -> list[float]:
        """Return the time of each choice's file, all timed in turn."""


class SpentError(Exception):
    """Nothing more may be tried."""


@dataclass
class Budget:
    """What a search may spend.

    Attributes:
        max_validations: of exported files; None for as many as the bisection of its steps takes.
        deadline: `time.monotonic()` after which nothing more is tried.
    """

    max_validations: int | None = None
    deadline: float = math.inf

    @classmethod
    def of(cls, max_validations: int | None, seconds: float | None) -> "Budget":
        """Return what may be spent from now on; None is without end."""
        return cls(max_validations, math.inf if seconds is None else time.monotonic() + seconds)

    def check(self, number: int) -> None:
        """Raise once nothing is left after a number of validations."""
        if self.max_validations is not None and number >= self.max_validations:
            raise SpentError(f"its budget of validations spent, {self.max_validations}")
        if time.monotonic() >= self.deadline:
            raise SpentError("its time budget spent")


@dataclass
class SearchRecord:
    """What a search has found out by now.

    Attributes:
        trials: in the order in which they were tried.
        num_steps: of the ranking; 0 while it was not needed.
        ended: why it ended, in words.
        failed: whether that was an error.
        quicker: what was quicker than the best by latency when both were timed in turn, at the end.
    """

    trials: list[Trial] = field(default_factory=list)
    num_steps: int = 0
    ended: str = ""
    failed: bool = False
    quicker: Choice | None = None

    @property
    def nothing(self) -> str:
        """Why there is no file to choose, in words."""
        return f"the search tried no file: {self.trials[-1].error if self.trials else self.ended}"

    def best(self, objective: str, better: Callable[[str], bool | None]) -> Trial | None:
        """Return the best by the objective of all that keep the limits; else the one that misses least."""
        made = [trial for trial in self.trials if trial.measured is not None]
        keeping = [trial for trial in made if trial.keeps_all]
        if objective == LATENCY and (quicker := [trial for trial in keeping if trial.choice == self.quicker]):
            return quicker[0]
        if keeping:
            return min(keeping, key=lambda trial: _cost(trial, objective, better))
        return min(made, key=lambda trial: (*trial.misses, _cost(trial, SIZE, better)), default=None)


def find(
    space: Space,
    judge: Callable[[Measured, int], tuple[Verdict, ...]],
    objective: str = SIZE,
    budget: Budget | None = None,
    *,
    record: SearchRecord | None = None,
    note: Callable[[SearchRecord], None] | None = None,
) -> SearchRecord:
    """Search a space; end with what was found when the budget is spent, the user interrupts, or something fails.

    Args:
        space: what can be tried.
        judge: gives a verdict for each limit, of what was measured as the so manieth on the same data.
        objective: "size", "latency", or a metric.
        budget: what may be spent; by default as many validations as a bisection takes.
        record: gets the trials; those in it are known and not run again.
        note: called after every trial.
    """
    search = _Search(space, judge, budget or Budget(), record if record is not None else SearchRecord(), note)
    try:
        search.record.ended = search.cheapest() if objective in COSTS else search.dearest()
        if objective == LATENCY:
            search.record.ended += search.quickest()
            search.record.ended += search.rechecked()
    except SpentError as spent:
        search.record.ended = str(spent)
    except KeyboardInterrupt:
        search.record.ended = "an interruption"
    # Libraries and the user's own code run in every trial: what was found before must not be lost for one of them.
    except Exception as error:
        search.record.ended, search.record.failed = f"an error: {error!r}", True
    return search.record


class _Search:
    def __init__(
        self,
        space: Space,
        judge: Callable[[Measured, int], tuple[Verdict, ...]],
        budget: Budget,
        record: SearchRecord,
        note: Callable[[SearchRecord], None] | None,
    ) -> None:
        self.space, self.judge, self.budget, self.record, self.note = space, judge, budget, record, note
        # What an interrupted search has tried is not tried again, but counts.
        self._known = {trial.choice: trial for trial in record.trials}
        record.trials = []

    def cheapest(self) -> str:
        """Find the first step at which the metrics keep their limits."""
        whole = self._try(Choice())
        if whole.keeps(on_metrics=True):
            return "the whole recipe keeps the limits on metrics"
        accurate = self.space.accurate()
        if accurate is not None and self._try(accurate).keeps(on_metrics=True):
            return "the whole recipe keeps the limits on metrics with more done for accuracy"
        steps = self._steps()
        at = self._bisect(steps, lambda trial: trial.keeps(on_metrics=True))
        if at == len(steps):
            everything = self.space.all_float()
            if everything is not None and self._has_left() and self._try(everything).keeps(on_metrics=True):
                return "nothing in integers that keeps the limits on metrics"
            return "no number of steps keeps the limits on metrics"
        fails, keeps = (steps[at - 1] if at else Choice()), steps[at]
        while self._has_left() and (other := self.space.cheaper(fails, keeps)) is not None:
            if self._try(other).keeps(on_metrics=True):
                keeps = other
            else:
                fails = other
        return "the least in float that keeps the limits on metrics"

    def dearest(self) -> str:
        """Find the last step at which size and speed keep their limits: more in float is better by a metric."""
        if not self._try(Choice()).keeps(on_metrics=False):
            return "the whole recipe misses the limits on size and speed, and what is kept float only costs more"
        steps = self._steps()
        self._bisect(steps, lambda trial: not trial.keeps(on_metrics=False))
        return "the most in float that keeps the limits on size and speed"

    def quickest(self) -> str:
        """Keep in float what is slower in integers here, and everything where that is quicker than any mix."""
        kept = self._quickest_kept()
        choice = None if kept is None else self.space.quicker(kept.choice)
        if kept is not None and choice not in (None, kept.choice):
            self._try(choice)
            kept = self._quickest_kept()
        everything = self.space.all_float()
        if everything is not None and (kept is None or kept.measured.relative_time > _WORTH):  # type: ignore[union-attr]
            self._try(everything)
            return ", and nothing in integers that is measurably quicker than float" if kept else ""
        return ", without what is slower in integers here" if choice not in (None, Choice()) and kept else ""

    def rechecked(self) -> str:
        """Time the best beside all in integers and all in float, in turn, and take the quicker of these if it is slow.

        What was measured of trials was measured at other times, and of some operators alone.
        """
        best = self.record.best(LATENCY, lambda _: None)
        if best is None or not best.keeps_all:
            return ""
        whole = [trial.choice for trial in self.record.trials if trial.choice == Choice() and trial.keeps_all]
        ends = [end for end in (*whole, self.space.all_float()) if end not in (None, best.choice)]
        try:
            times = self.space.times([best.choice, *ends]) if ends else []
        except QuantizationError:  # Not every runtime has a file of nothing in integers.
            return ""
        if not times or times[0] <= _BOUND * min(times[1:]):
            return ""
        quicker = ends[times.index(min(times[1:])) - 1]
        tried = quicker in [trial.choice for trial in self.record.trials]
        if not (tried or self._has_left()) or not self._try(quicker).keeps_all:
            return f", though {quicker} takes {min(times[1:]) / times[0]:.3f} of its time"
        self.record.quicker = quicker
        return f", but in a last run {quicker} takes {min(times[1:]) / times[0]:.3f} of its time and is taken"

    def _quickest_kept(self) -> Trial | None:
        keeping = [trial for trial in self.record.trials if trial.keeps(on_metrics=True)]
        return min(keeping, key=lambda trial: _cost(trial, LATENCY, lambda _: None), default=None)

    def _steps(self) -> Sequence[Choice]:
        steps = self.space.steps()
        self.record.num_steps = len(steps)
        if self.budget.max_validations is None:
            # Everything in float, which no step is, may be what is left in the end.
            self.budget.max_validations = math.ceil(math.log2(len(steps) + 1)) + _BESIDE
        return steps

    def _bisect(self, steps: Sequence[Choice], is_far_enough: Callable[[Trial], bool]) -> int:
        """Return the first index that is far enough, if all behind it are; their number where none is."""
        low, high = -1, len(steps)
        while high - low > 1:
            middle = (low + high) // 2
            if is_far_enough(self._try(steps[middle])):
                high = middle
            else:
                low = middle
        return high

    def _has_left(self) -> bool:
        return self.budget.max_validations is None or len(self.record.trials) < self.budget.max_validations

    def _try(self, choice: Choice) -> Trial:
        self.budget.check(len(self.record.trials))
        trial = self._known.get(choice) or self._measure(choice)
        if all(trial.choice != other.choice for other in self.record.trials):
            self.record.trials.append(trial)
        if self.note is not None:
            self.note(self.record)
        return trial

    def _measure(self, choice: Choice) -> Trial:
        started = time.monotonic()
        try:
            measured = self.space.measure(choice)
        except QuantizationError as error:
            return Trial(choice, None, (), time.monotonic() - started, str(error))
        return Trial(choice, measured, self.judge(measured, len(self.record.trials) + 1), time.monotonic() - started)


def _cost(trial: Trial, objective: str, better: Callable[[str], bool | None]) -> float:
    measured = trial.measured
    if measured is None:
        return math.inf
    if objective == LATENCY:
        # Timed at other times, trials are comparable by what float took meanwhile.
        return measured.relative_time
    if objective == SIZE:
        return measured.size_bytes
    value = measured.metrics.get(objective, math.nan)
    return math.inf if math.isnan(value) else -value if better(objective) is not False else value
