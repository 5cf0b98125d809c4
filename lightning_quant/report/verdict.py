"""One sentence on an artifact, with what to do next."""

from typing import Any

from lightning_quant.artifact.recorded_report import best_float_ms
from lightning_quant.terminal.figures import fixed

# What a failure or warning has in it to what helps; of several the first.
_NEXT = {
    "parity FAILED": 'try runtime="auto", which keeps to runtimes whose parity holds',
    "limits FAILED": 'try recipe="int8_accurate", keep the worst operators in float, or train through rounding',
    " FAILED": "look at what stays float and why, below",
    "larger than the float model": "look at what stays float, below; a toy's file holds more graph than weights",
    "slower than float": "time it with `lightning-quant bench` at your batch and number of threads",
    "still run in float": "the figures hold for the file as it is",
}
# Share of a metric by which two artifacts may differ without a reader caring.
_NOTHING = 5e-5


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """Return how an artifact stands, "bad", "fair" or "good", and one sentence with what to do next."""
    if report["failures"]:
        return "bad", f"Do not deploy this file: {_sentence(report['failures'][0])}"
    if report["warnings"]:
        more = len(report["warnings"]) - 1
        others = f" {more} more warning{'s stand' if more > 1 else ' stands'} below." if more else ""
        return "fair", f"It computes what was simulated, but {_sentence(report['warnings'][0])}{others}"
    gained = [f"{report['size_ratio']:.2f} of the bytes"]
    gained += [f"{speedup(report['latency'][0]):.3g} times as fast"] if report["latency"] else []
    gained += [_changed(row) for row in report["metrics"][:1] if delta(row) is not None]
    return "good", f"Ready to deploy: {', '.join(gained)}, and it computes what was simulated."


def speedup(row: dict[str, Any]) -> float:
    """Return how many times faster than its best float peer an artifact is at one batch size."""
    return best_float_ms(row) / float(row["artifact"]["median_ms"])


def delta(row: dict[str, Any]) -> float | None:
    """Return artifact minus float of a metric; None where one of them is not known."""
    values = row["float_value"], row["artifact"]
    return None if any(not isinstance(value, float) for value in values) else values[1] - values[0]


def margin(row: dict[str, Any]) -> float | None:
    """Return half the width of the interval of `delta`; None where it is not known."""
    return row.get("margin") if delta(row) is not None and isinstance(row.get("margin"), float) else None


def _sentence(text: str) -> str:
    """Return a text with what helps against it, where it does not say so itself."""
    text = text.rstrip(".")
    helps = next((helps for what, helps in _NEXT.items() if what in text), "")
    return f"{text}{f'; {helps}' if helps else ''}."


def _changed(row: dict[str, Any]) -> str:
    change = delta(row) or 0.0
    unchanged = abs(change) <= _NOTHING * max(abs(row["artifact"]), abs(row["float_value"]))
    changed = "unchanged" if unchanged else fixed(change, row["artifact"], sign=True)
    return f"{row['name']} {changed} at {fixed(row['artifact'])}"
