"""The report as one HTML file that opens from disk: without a network, light and dark, on paper and on a phone."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lightning_quant.artifact.manifest import REPORTS
from lightning_quant.report import monitored
from lightning_quant.report.metrics import MARGIN
from lightning_quant.report.network import bars, drawn
from lightning_quant.report.scatter import Chart, Dot, scatter
from lightning_quant.report.summary import columns
from lightning_quant.report.verdict import delta, margin, speedup, verdict
from lightning_quant.terminal.figures import figures, fixed

_KB = 1000


def to_html(manifest: dict[str, Any], standalone: str) -> str:
    """Return the page; every text of layers, metrics and labels is escaped.

    Args:
        manifest: the artifact's, with its report and the hash of every file.
        standalone: lines that run the model without this package.
    """
    # Lists and texts as report.json has them.
    report = json.loads(json.dumps(manifest["report"]))
    # What a report from before these sections lacks.
    report = {"numbers": [], "operator_ms": {}, "changed": None, "looks": [], **report}
    rows = _rows(report)
    return _template("report.html").render(
        m=manifest,
        r=report,
        rows=rows,
        network=drawn(rows),
        monitored=monitored.drawn(report["looks"]),
        drawn=sorted(
            (one for one in report["numbers"] if one["weight"] or one["output"]), key=lambda one: float(one["own_db"])
        ),
        unnamed_ms=sum(report["operator_ms"].values()) - sum(row["ms"] or 0 for row in rows),
        classes=manifest.get("classes") or [],
        verdict=verdict(report),
        about_margin=MARGIN,
        tiles=_tiles(report),
        parity=_parity(report["parity"] or {}),
        standalone=standalone.strip(),
        files={role: name for role, name in manifest["files"].items() if role not in REPORTS},
    )


def comparison(summaries: list[dict[str, Any]], missed: list[str]) -> str:
    """Return a page of several artifacts side by side; every text is escaped.

    Args:
        summaries: of each artifact, see `summary.summary`.
        missed: limits that artifacts miss, in words.
    """
    cells = [columns(summary) for summary in summaries]
    headings = list(dict.fromkeys(heading for row in cells for heading in row))
    rows = [[row.get(heading, "-") for heading in headings] for row in cells]
    warned = [(summary["artifact"], [f"{text}." for text in summary["warnings"]]) for summary in summaries]
    chart = _kept_for_bytes(summaries)
    return table_page(
        f"{len(rows)} artifacts compared",
        [name for _, name in headings],
        rows,
        charts=[] if chart is None else [chart],
        lists=[("Missed", missed), *warned],
    )


def table_page(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    said: str = "",
    charts: Sequence[Chart] = (),
    lists: Sequence[tuple[str, Sequence[str]]] = (),
    texts: int = 3,
) -> str:
    """Return a page of one table over artifacts; every text is escaped.

    Args:
        title: of the page.
        header: of the table.
        rows: of the table.
        said: what stands above it.
        charts: stand below it.
        lists: heading and lines of what comes last; without a line there is no heading.
        texts: how many columns, from the left, are no numbers.
    """
    how = {"title": title, "said": said, "header": header, "rows": rows}
    return _template("compare.html").render(**how, charts=charts, lists=lists, texts=texts)


def _kept_for_bytes(summaries: list[dict[str, Any]]) -> Chart | None:
    """Draw the first metric that artifacts have in common against their bytes."""
    known = [{n: v["artifact"] for n, v in one["metrics"].items() if v["artifact"] is not None} for one in summaries]
    shared = [name for name in (known[0] if known else {}) if all(name in one for one in known)]
    if not shared:
        return None
    dots = [
        Dot(PurePath(one["artifact"]).name, one["bytes"], values[shared[0]], "front")
        for one, values in zip(summaries, known, strict=True)
        # Whoever wrote a report may have written texts.
        if isinstance(one["bytes"], int) and isinstance(values[shared[0]], float)
    ]
    return scatter("bytes", shared[0], dots)


@functools.cache
def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("lightning_quant", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bars": bars,
        "broken": broken,
        "coded": coded,
        "figures": figures,
        "size": size,
        "share": share,
        "speedup": speedup,
        "delta": delta,
        "margin": margin,
        "fixed": fixed,
    }
    return environment.get_template(name)


def coded(text: str) -> Markup:
    """Return an escaped text in which what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def broken(name: str) -> Markup:
    """Return an escaped path of a module that lines may end in, behind its dots and underscores."""
    return Markup(re.sub(r"(?<=[._])(?=[^._])", "<wbr>", str(escape(name))))


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


def _tiles(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return heading, figure and detail of what stands on top."""
    sizes = f"{size(report['artifact_bytes'])}, of {size(report['float_bytes'])}"
    tiles = [("size", f"{report['size_ratio']:.2f} x", sizes)]
    for row in report["metrics"][:2]:
        before, change, wide = row["float_value"], delta(row), margin(row)
        detail = f"float {figures(before)}"
        detail += "" if change is None else f", change {fixed(change, before, sign=True)}"
        detail += "" if wide is None else f" ±{fixed(wide, before)}"
        tiles.append((row["name"], figures(row["artifact"]), detail))
    for row in report["latency"][:1]:
        detail = f"faster than the best float peer, {figures(row['artifact']['median_ms'])} ms at batch {row['batch']}"
        tiles.append(("speed", f"{figures(speedup(row))} x", detail))
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
    integers = parity.get("integers")
    if integers:
        said = [] if integers["alone"] else said
        said.append(
            f"{share(1 - integers['artifact'])} of its integer outputs are those of its simulation, which has "
            f"{share(1 - integers['quantization'])} of those of float."
        )
    if parity.get("worst_share") is not None:
        said.append(f"Every operator has at least {share(parity['worst_share'])} of its values within one step.")
    if parity["equal_argmax"] is not None:
        said.append(f"{share(parity['equal_argmax'])} of the predictions are equal.")
    return said


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the network with their shares, and with what was measured of each operator."""
    rows = report["plan"]["rows"]
    layers = {layer["name"]: layer for layer in (report["sensitivity"] or {"layers": []})["layers"]}
    numbers = {one["name"]: one for one in report["numbers"]}
    times = report["operator_ms"]
    totals = {what: max(sum(row[what] for row in rows), 1) for what in ("macs", "weights")}
    shown = []
    for row in _parts_behind(rows):
        name, action = row["name"], row["action"]
        row_layer = layers.get(name, {})
        shown.append(
            {
                **row,
                "runs": action if action in ("float", "fused") else "integers",
                "macs_share": row["macs"] / totals["macs"],
                "weights_share": row["weights"] / totals["weights"],
                "weight_bytes": _weight_bytes(row),
                "own_db": row_layer.get("own_db", numbers.get(name, {}).get("own_db")),
                "db": numbers.get(name, {}).get("db"),
                "clipped": row_layer.get("clipped"),
                "ms": times.get(name) if action != "fused" else None,
            }
        )
    return shown


def _parts_behind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows with those of a part that has a graph of its own behind the row of the part."""
    names = {row["name"] for row in rows}
    inside: dict[str, list[dict[str, Any]]] = {}
    outer: list[dict[str, Any]] = []
    for row in rows:
        place = row["name"].rpartition(".")[0]
        while place and place not in names:
            place = place.rpartition(".")[0]
        (inside.setdefault(place, []) if place else outer).append(row)

    def unfolded(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield row
        for part in inside.pop(row["name"], ()):
            yield from unfolded(part)

    return [part for row in outer for part in unfolded(row)]


def _weight_bytes(row: dict[str, Any]) -> float | None:
    """Return what a row's weights take in the file, scales left out; None where its scheme does not tell."""
    bits = re.match(r"b?float(16)|float$|int(4|8)", row["action"])
    if bits is None:
        return None
    return row["weights"] * int(next((group for group in bits.groups() if group), 32)) / 8
