"""What a search tried, whether the artifact keeps the limits, and what each relaxation would buy."""

from dataclasses import dataclass
from typing import Any

from lightning_quant.report.section import Section
from lightning_quant.search.choice import Measured, Trial, Verdict
from lightning_quant.search.progress import SearchRecord
from lightning_quant.search.record import as_dict
from lightning_quant.terminal.tables import text_table


@dataclass(frozen=True)
class SearchSection(Section):
    """A search and its end.

    Attributes:
        objective: what was made best.
        record: all that was tried.
        chosen: what the artifact is.
    """

    objective: str
    record: SearchRecord
    chosen: Trial

    def text(self) -> str:
        """Return what ended the search, and tables of limits, of trials, and of what relaxations would buy."""
        steps = f", over a ranking of {self.record.num_steps} steps" if self.record.num_steps else ""
        number = len(self.record.trials)
        cut = sum(not trial.is_whole or trial.validations != 1 for trial in self.record.trials)
        part = f", {cut} of them cut short, in {self.record.validations:.3g} readings of the data" if cut else ""
        head = (
            f"Searched for the best {self.objective} that keeps the limits, in {number} "
            f"validation{'s' * (number != 1)} of exported files{part}{steps}. It ended with {self.record.ended}. "
            f"The artifact is {self.chosen.choice}{self._transitions()}."
        )
        parts = [head]
        if self.chosen.verdicts:
            header = ("limit on", "allowed", "reached", "estimate", "kept", "decided on")
            parts.append(text_table(header, [_limit_row(verdict) for verdict in self.chosen.verdicts]))
        if number > 1:
            parts.append(self._trials())
        if rows := relaxed(self.record, self.chosen):
            header = ("missed limit", "allowed", "reached", "next option", "reaches", "its price")
            parts.append(text_table(header, rows))
        return "\n\n".join(parts)

    def failures(self) -> list[str]:
        """Name every limit that is missed with confidence taken into account, though the estimate keeps it."""
        return [
            f"limits FAILED: {v.limit} may get worse by {v.reached:.4g}, more than {v.allowed:g}, by the {v.basis}"
            for v in self.chosen.verdicts
            if not v.kept
            and v.estimate is not None
            and v.reached is not None
            and v.on_metric
            and v.estimate <= v.allowed
        ]

    def warnings(self) -> list[str]:
        """Say what cut a search short."""
        return [f"the search ended before it was through, with {self.record.ended}"] if self.record.failed else []

    def scalars(self) -> dict[str, float | None]:
        """Return how many files were validated, how often that read the data, and how many operators are kept out."""
        return {
            "search_validations": float(len(self.record.trials)),
            "search_readings": self.record.validations,
            "search_kept": float(len(self.chosen.choice.kept)),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return all trials, and which of them the artifact is."""
        return {
            "search": {
                "objective": self.objective,
                "ended": self.record.ended,
                "num_steps": self.record.num_steps,
                "chosen": self.chosen.choice.to_dict(),
                "verdicts": as_dict(self.chosen)["verdicts"],
                "relaxations": [list(row) for row in relaxed(self.record, self.chosen)],
                "trials": [as_dict(trial) for trial in self.record.trials],
            }
        }

    def _transitions(self) -> str:
        measured = self.chosen.measured
        if measured is None or not measured.latency_ms:
            return ""
        number = measured.transitions
        return f", with {number} transition{'s' * (number != 1)} between integers and float in its time"

    def _trials(self) -> str:
        limits = [verdict.limit for verdict in self.chosen.verdicts]
        rows = []
        for trial in self.record.trials:
            reached = {verdict.limit: verdict.reached for verdict in trial.verdicts}
            size = "-" if trial.measured is None else f"{trial.measured.size_bytes:,}"
            kept = "yes" if trial.keeps_all else f"not made: {trial.error[:60]}" if trial.error else "no"
            rows.append(
                (
                    *(str(trial.choice), kept, *(_number(reached.get(n)) for n in limits), size),
                    *(f"{trial.validations:.3g}", f"{trial.seconds:.0f}"),
                )
            )
        return text_table(("tried", "keeps all", *limits, "bytes", "of the data", "s"), rows)


def relaxed(record: SearchRecord, chosen: Trial) -> list[tuple[str, ...]]:
    """Return a row for each missed limit: the cheapest trial that is nearer to it, and what that costs.

    A limit on a metric is paid for in size or time, one on those in metrics.
    """
    rows: list[tuple[str, ...]] = []
    for verdict in chosen.verdicts:
        if verdict.kept or chosen.measured is None:
            continue
        better = [(trial, other) for trial in record.trials if (other := _nearer(trial, verdict)) is not None]
        head = (verdict.limit, f"{verdict.allowed:g}", _number(verdict.reached))
        if not better:
            rows.append((*head, "nothing that was tried comes nearer", "-", "-"))
            continue
        trial, other = min(better, key=lambda pair: (not pair[1].kept, _price(pair[0], verdict), pair[1].miss))
        if trial.measured is not None:
            rows.append((*head, str(trial.choice), _number(other.reached), _paid(chosen.measured, trial.measured)))
    return rows


def _nearer(trial: Trial, missed: Verdict) -> Verdict | None:
    return next((v for v in trial.verdicts if v.limit == missed.limit and v.miss < missed.miss), None)


def _price(trial: Trial, missed: Verdict) -> float:
    if trial.measured is None:
        return float("inf")
    return float(trial.measured.size_bytes) if missed.on_metric else sum(v.miss for v in trial.verdicts if v.on_metric)


def _paid(before: Measured, after: Measured) -> str:
    words = [f"{after.size_bytes - before.size_bytes:+,} bytes"]
    # Each of the same data as float, which may be a part of all.
    words += [
        f"{name} {after.differences[name].value - one.value:+.4g}"
        for name, one in before.differences.items()
        if name in after.differences
    ]
    for batch, ms in before.latency_ms.items():
        if batch in after.latency_ms:
            words.append(f"{after.latency_ms[batch] - ms:+.3g} ms at batch {batch}")
    return ", ".join(words)


def _limit_row(verdict: Verdict) -> tuple[str, ...]:
    kept = "yes" if verdict.kept else "no"
    return (
        verdict.limit,
        f"{verdict.allowed:g}",
        _number(verdict.reached),
        _number(verdict.estimate),
        kept,
        verdict.basis,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
