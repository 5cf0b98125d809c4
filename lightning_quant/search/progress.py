"""What a search may spend, what it has found by now, and which of that is best."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lightning_quant.search.choice import Choice, Trial
from lightning_quant.search.objective import LATENCY, SIZE


class SpentError(Exception):
    """Nothing more may be tried."""


@dataclass
class Budget:
    """What a search may spend.

    Attributes:
        max_validations: of exported files, as many as would read the data so often; None for what the bisection of its
            steps takes.
        deadline: `time.monotonic()` after which nothing more is tried.
    """

    max_validations: int | None = None
    deadline: float = math.inf

    @classmethod
    def of(cls, max_validations: int | None, seconds: float | None) -> "Budget":
        """Return what may be spent from now on; None is without end."""
        return cls(max_validations, math.inf if seconds is None else time.monotonic() + seconds)

    def has_left(self, spent: float, more: float = 1) -> bool:
        """Tell whether there may be so many validations more."""
        return self.max_validations is None or spent + more <= self.max_validations

    @property
    def is_late(self) -> bool:
        """Whether its time is spent."""
        return time.monotonic() >= self.deadline

    def check(self, spent: float) -> None:
        """Raise once nothing is left after so many validations."""
        if not self.has_left(spent):
            raise SpentError(f"its budget of validations spent, {self.max_validations}")
        if self.is_late:
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
        is_over: whether no trial is to be validated any more.
    """

    trials: list[Trial] = field(default_factory=list)
    num_steps: int = 0
    ended: str = ""
    failed: bool = False
    quicker: Choice | None = None
    is_over: bool = False

    @property
    def validations(self) -> float:
        """How often the validation data were read in all."""
        return sum(trial.validations for trial in self.trials)

    @property
    def nothing(self) -> str:
        """Why there is no file to choose, in words."""
        return f"the search tried no file: {self.trials[-1].error if self.trials else self.ended}"

    def best(self, objective: str, better: Callable[[str], bool | None]) -> Trial | None:
        """Return the best by the objective of all that keep the limits; else the one that misses least.

        In the end, what keeps them on all data comes before what does so on a part, however much better that is.
        """
        made = [trial for trial in self.trials if trial.measured is not None]
        keeping = [trial for trial in made if trial.keeps_all]
        if self.is_over:
            keeping = [trial for trial in keeping if trial.is_whole] or keeping
        if objective == LATENCY and (quicker := [trial for trial in keeping if trial.choice == self.quicker]):
            return quicker[0]
        if keeping:
            return min(keeping, key=lambda trial: cost_of(trial, objective, better))
        return min(made, key=lambda trial: (*trial.misses, cost_of(trial, SIZE, better)), default=None)


def cost_of(trial: Trial, objective: str, better: Callable[[str], bool | None]) -> float:
    """Return what a trial costs by an objective: less is better."""
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
