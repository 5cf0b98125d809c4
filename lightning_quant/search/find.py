"""The search itself: from the whole recipe to as few operators in float as the limits ask for, by validations alone.

The number of steps of a ranking is bisected on validations of exported files. A set that is cheaper by the model of the
ranking is tried with what is left. A validation ends early where an interval on a part of the data decides already;
the file that is taken is validated whole.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from lightning_quant.errors import QuantizationError
from lightning_quant.measure.contributions import Difference
from lightning_quant.measure.interim import SHARES, Decides
from lightning_quant.search.choice import Choice, Measured, Trial
from lightning_quant.search.judge import Judge
from lightning_quant.search.objective import COSTS, LATENCY, SIZE
from lightning_quant.search.progress import Budget, SearchRecord, SpentError, cost_of

# Time by float's above which integers do not pay.
_WORTH = 1.0
# Time by that of the quicker of all in integers and all in float that a file may take.
_BOUND = 1.02
# Validations beside those of the bisection: the whole recipe, a safer calibration of it, a cheaper set.
_BESIDE = 3


class Space(Protocol):
    """What can be tried."""

    def measure(self, choice: Choice, decides: Decides | None = None) -> Measured:
        """Export a choice and validate the file, on no more data than decide."""

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


def find(
    space: Space,
    judge: Judge,
    objective: str = SIZE,
    budget: Budget | None = None,
    *,
    record: SearchRecord | None = None,
    note: Callable[[SearchRecord], None] | None = None,
) -> SearchRecord:
    """Search a space; end with what was found when the budget is spent, the user interrupts, or something fails.

    Args:
        space: what can be tried.
        judge: gives a verdict for each limit.
        objective: "size", "latency", or a metric.
        budget: what may be spent; by default as many validations as a bisection takes.
        record: gets the trials; those in it are known and not run again.
        note: called after every trial.
    """
    record = SearchRecord() if record is None else record
    search = _Search(space, judge, objective, budget or Budget(), record, note)
    for step in (search.run, search.confirm):
        try:
            record.ended = step() or record.ended
        except SpentError as spent:
            record.ended, search.is_over = str(spent), True
        except KeyboardInterrupt:
            record.ended, search.is_over = "an interruption", True
        # Libraries and the user's own code run in every trial: what was found before must not be lost for one of them.
        except Exception as error:
            record.ended, record.failed, search.is_over = f"an error: {error!r}", True, True
    record.is_over = True
    return record


class _Search:
    def __init__(
        self,
        space: Space,
        judge: Judge,
        objective: str,
        budget: Budget,
        record: SearchRecord,
        note: Callable[[SearchRecord], None] | None,
    ) -> None:
        self.space, self.judge, self.objective, self.budget = space, judge, objective, budget
        self.record, self.note = record, note
        # What an interrupted search has tried is not tried again, but counts.
        self._known = {trial.choice: trial for trial in record.trials}
        record.trials = []
        # Whether something cut the search short.
        self.is_over = False

    def run(self) -> str:
        """Search, and return in words what ended it."""
        if self.objective not in COSTS:
            return self.dearest()
        ended = self.cheapest()
        if self.objective == LATENCY:
            self.confirm()
            ended += self.quickest()
            ended += self.rechecked()
        return ended

    def confirm(self) -> str:
        """Validate on all data what would be taken, until that keeps there what it kept on a part of them.

        A search that was cut short has one validation more for this, which the artifact's report has no need to repeat.
        """
        number = 0
        while (best := self._best()) is not None and not best.is_whole:
            if number and (self.is_over or self.budget.is_late):
                break
            self._complete(self.record.trials.index(best))
            number += 1
        return ""

    def cheapest(self) -> str:
        """Find the first step at which the metrics keep their limits."""
        whole = self._try(Choice(), (False,))
        if whole.keeps(on_metrics=True):
            return "the whole recipe keeps the limits on metrics"
        accurate = self.space.accurate()
        if accurate is not None and self._try(accurate, (False,)).keeps(on_metrics=True):
            return "the whole recipe keeps the limits on metrics with more done for accuracy"
        steps = self._steps()
        at = self._bisect(steps, lambda trial: trial.keeps(on_metrics=True), early=True)
        if at == len(steps):
            everything = self.space.all_float()
            if everything is not None and self._has_left() and self._try(everything).keeps(on_metrics=True):
                return "nothing in integers that keeps the limits on metrics"
            return "no number of steps keeps the limits on metrics"
        fails, keeps = (steps[at - 1] if at else Choice()), steps[at]
        while self._has_left() and (other := self.space.cheaper(fails, keeps)) is not None:
            if self._try(other, (False,)).keeps(on_metrics=True):
                keeps = other
            else:
                fails = other
        return "the least in safer schemes that keeps the limits on metrics"

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
        best = self._best()
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
        return min(keeping, key=lambda trial: cost_of(trial, LATENCY, lambda _: None), default=None)

    def _steps(self) -> Sequence[Choice]:
        steps = self.space.steps()
        self.record.num_steps = len(steps)
        if self.budget.max_validations is None:
            # Everything in float, which no step is, may be what is left in the end.
            self.budget.max_validations = math.ceil(math.log2(len(steps) + 1)) + _BESIDE
        return steps

    def _bisect(self, steps: Sequence[Choice], is_far_enough: Callable[[Trial], bool], *, early: bool = False) -> int:
        """Return the first index that is far enough, if all behind it are; their number where none is."""
        low, high = -1, len(steps)
        while high - low > 1:
            middle = (low + high) // 2
            # The last of those that keep the limits is likely to be the artifact, and is validated whole at once.
            ends = ((False,) if middle - low == 1 else (False, True)) if early else ()
            if is_far_enough(self._try(steps[middle], ends)):
                high = middle
            else:
                low = middle
        return high

    def _best(self) -> Trial | None:
        return self.record.best(self.objective, lambda _: None)

    @property
    def _spent(self) -> float:
        """How often the data were read, and will be for what would be taken now."""
        best = self._best()
        return self.record.validations + (best is not None and not best.is_whole)

    def _has_left(self) -> bool:
        return self.budget.has_left(self._spent)

    def _try(self, choice: Choice, early: tuple[bool, ...] = ()) -> Trial:
        """Return the trial of a choice, which is made once.

        Args:
            choice: what is tried.
            early: whether limits on metrics are kept: what ends its validation where a part of the data says so.
        """
        trials = self.record.trials
        at = next((place for place, trial in enumerate(trials) if trial.choice == choice), len(trials))
        if at == len(trials):
            self.budget.check(self._spent)
            # A part pays where there is room for it, for another file, and for this one on all data in the end.
            room = self.budget.has_left(self.record.validations, SHARES[-1] + 2)
            trials.append(self._known.get(choice) or self._measure(choice, at + 1, early if room else ()))
        if not early:
            self._complete(at)
        if self.note is not None:
            self.note(self.record)
        return trials[at]

    def _complete(self, at: int) -> None:
        """Validate on all data what was validated on a part of them."""
        part = self.record.trials[at]
        if not part.is_whole:
            trial = self._measure(part.choice, at + 1)
            seconds, read = part.seconds + trial.seconds, part.validations + trial.validations
            self.record.trials[at] = replace(trial, seconds=seconds, validations=read)

    def _measure(self, choice: Choice, look: int, early: tuple[bool, ...] = ()) -> Trial:
        started = time.monotonic()

        def decides(differences: Mapping[str, Difference]) -> bool:
            return self.judge.decides(differences, look) in early

        try:
            measured = self.space.measure(choice, decides if early else None)
        except QuantizationError as error:
            return Trial(choice, None, (), time.monotonic() - started, str(error))
        verdicts = self.judge(measured, look)
        return Trial(choice, measured, verdicts, time.monotonic() - started, validations=measured.share)
