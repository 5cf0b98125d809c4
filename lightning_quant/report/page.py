"""The report as one HTML file that opens from disk: without a network, light and dark, on paper and on a phone."""

import functools
import json
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_quant.artifact.manifest import REPORTS
from lightning_quant.report.limits import columns

# Metrics by which two artifacts may differ without a reader caring.
_NOTHING = 5e-5
_KB = 1000


def to_html(manifest: dict[str, Any], standalone: str) -> str:
    """Return the page; every text of layers, metrics and labels is escaped.

    Args:
        manifest: the artifact's, with its report and the hash of every file.
        standalone: lines that run the model without this package.
    """
    # Lists and texts as report.json has them.
    report = json.loads(json.dumps(manifest["report"]))
    rows = [_row(row, report) for row in report["plan"]["rows"]]
    return _template("report.html").render(
        m=manifest,
        r=report,
        rows=rows,
        verdict=verdict(report),
        tiles=_tiles(report),
        parity=_parity(report["parity"] or {}),
        standalone=standalone.strip(),
        files={role: name for role, name in manifest["files"].items() if role not in REPORTS},
    )


def comparison(summaries: list[dict[str, Any]], missed: list[str]) -> str:
    """Return a page of several artifacts side by side; every text is escaped.

    Args:
        summaries: of each artifact, see `limits.summary`.
        missed: limits that artifacts miss, in words.
    """
    rows = [columns(summary) for summary in summaries]
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    return _template("compare.html").render(rows=rows, headings=headings, summaries=summaries, missed=missed)


def verdict(report: dict[str, Any]) -> tuple[str, str]:
    """Return how an artifact stands, "bad", "fair" or "good", and one sentence with what to do next."""
    if report["failures"]:
        return "bad", f"Do not deploy this file: {_sentence(report['failures'][0])}"
    if report["warnings"]:
        more = len(report["warnings"]) - 1
        others = f" {more} more warning{'s stand' if more > 1 else ' stands'} below." if more else ""
        return "fair", f"It computes what was simulated, but {_sentence(report['warnings'][0])}{others}"
    gained = [f"{report['size_ratio']:.2f} of the bytes"]
    gained += [f"{_speedup(report['latency'][0]):.3g} times as fast"] if report["latency"] else []
    gained += [_changed(row) for row in report["metrics"][:1] if _delta(row) is not None]
    return "good", f"Ready to deploy: {', '.join(gained)}, and it computes what was simulated."


@functools.cache
def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("lightning_quant", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figures": figures, "size": size, "share": share, "speedup": _speedup, "delta": _delta}
    return environment.get_template(name)


def figures(value: float | str | None) -> str:
    """Return a number with three significant digits, or a dash for none; infinities are texts already."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:.3g}" if value else "0"


def size(value: int) -> str:
    """Return bytes in the unit that leaves one to three digits before the point."""
    number, unit = float(value), "B"
    for larger in ("kB", "MB", "GB"):
        if number < _KB:
            break
        number, unit = number / _KB, larger
    return f"{number:.3g} {unit}"


def share(value: float | None) -> str:
    """Return a share as percent."""
    return "-" if value is None else f"{value:.3g}%" if (value := 100 * value) < 99.95 else "100%"


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


def _speedup(row: dict[str, Any]) -> float:
    peers = [row[name]["median_ms"] for name in ("torch_float", "runtime_float") if row[name] is not None]
    return min(peers) / row["artifact"]["median_ms"]


def _delta(row: dict[str, Any]) -> float | None:
    values = row["float_value"], row["artifact"]
    return None if any(not isinstance(value, float) for value in values) else values[1] - values[0]


def _changed(row: dict[str, Any]) -> str:
    change = _delta(row) or 0.0
    return f"{row['name']} {'unchanged' if abs(change) < _NOTHING else f'{change:+.4f}'} at {row['artifact']:.4g}"


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return heading, figure and detail of what stands on top."""
    sizes = f"{size(report['artifact_bytes'])}, of {size(report['float_bytes'])}"
    tiles = [("size", f"{report['size_ratio']:.2f} x", sizes)]
    for row in report["metrics"][:2]:
        change = _delta(row)
        detail = f"float {figures(row['float_value'])}" + ("" if change is None else f", change {change:+.4f}")
        tiles.append((row["name"], figures(row["artifact"]), detail))
    for row in report["latency"][:1]:
        detail = f"faster than the best float peer, {figures(row['artifact']['median_ms'])} ms at batch {row['batch']}"
        tiles.append(("speed", f"{figures(_speedup(row))} x", detail))
    outputs = report["noise"]["outputs"] if report["noise"] else []
    worst = min((o for o in outputs if isinstance(o["db"], float)), key=lambda o: o["db"], default=None)
    if worst is not None:
        tiles.append(("signal to noise", f"{worst['db']:.1f} dB", f"float against the file, at {worst['name']}"))
    tiles.append(("as the recipe asks", share(report["plan"]["coverage"]), "of the multiply-adds"))
    return tiles


def _parity(parity: dict[str, Any]) -> list[str]:
    """Return sentences on the file against its simulation."""
    if not parity:
        return []
    costs = f"float is {figures(parity['quantization_db'])} dB from it"
    said = [f"The file is {figures(parity['artifact_db'])} dB from its simulation; {costs}."]
    if parity["artifact_db"] == "inf":
        said = [f"The file computes what was simulated to the bit; {costs}."]
    if parity.get("worst_share") is not None:
        said.append(f"Every operator has at least {share(parity['worst_share'])} of its values within one step.")
    if parity["equal_argmax"] is not None:
        said.append(f"{share(parity['equal_argmax'])} of the predictions are equal.")
    return said


def _row(row: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """Return a row of the network with its shares, and with what sensitivity says of it."""
    rows = report["plan"]["rows"]
    found = [layer for layer in (report["sensitivity"] or {"layers": []})["layers"] if layer["name"] == row["name"]]
    action = "float" if row["action"] == "float" else "fused" if row["action"] == "fused" else "integers"
    return {
        **row,
        "runs": action,
        "macs_share": row["macs"] / max(sum(other["macs"] for other in rows), 1),
        "weights_share": row["weights"] / max(sum(other["weights"] for other in rows), 1),
        "own_db": found[0]["own_db"] if found else None,
        "clipped": found[0]["clipped"] if found else None,
    }
