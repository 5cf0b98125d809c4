"""The command `lightning-quant`: quantize, sweep, inspect, verify, sign, bench, report and compare.

Exit codes: 0 success, 1 an artifact's report says FAILED, or it missed a limit or computes something else here, 2
nothing could be done.
"""

import argparse
import dataclasses
import json
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant.artifact.artifact import Artifact, page_of, read
from lightning_quant.cli.cli_options import NAME, limits_of, make_parser, require_cli_packages
from lightning_quant.errors import QuantizationError
from lightning_quant.machine.disk import lasting_scratch_folder
from lightning_quant.report.limits import failures_in, missed_limits
from lightning_quant.report.page import comparison, to_html
from lightning_quant.report.summary import SCHEMA_VERSION, columns, summary
from lightning_quant.terminal.figures import figures
from lightning_quant.terminal.shown_report import print_markdown
from lightning_quant.terminal.tables import text_table

if TYPE_CHECKING:
    from lightning_quant.graph.plan import Plan
    from lightning_quant.measure.bench import BenchRow

_WITH_CLASSES = ("quantize", "sweep", "inspect")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser, commands = make_parser()
    options, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if rest and options.command not in _WITH_CLASSES:
        commands[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[options.command](options, rest)
    except (QuantizationError, _Misconfiguration()) as error:
        print(f"{NAME} {options.command}: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # by QuantizationCLI, which has said why
        return int(ended.code or 0)


def _quantize(options: argparse.Namespace, rest: list[str]) -> int:
    return _made("quantize", options, rest)


def _sweep(options: argparse.Namespace, rest: list[str]) -> int:
    return _made("sweep", options, rest)


def _made(name: str, options: argparse.Namespace, rest: list[str]) -> int:
    """Run a subcommand, and say what it made: one artifact, or the recommended of several with the table of all."""
    limits = limits_of(options)
    run = _with_lightning(name, options, rest)
    from lightning_quant.search.sweep import Sweep

    artifact: Artifact = run.result
    failures = list(dict.fromkeys([*run.missed, *missed_limits(artifact, limits)]))
    several = artifact.to_dict() if isinstance(artifact, Sweep) else {}
    if options.json:
        _print_json({**summary(artifact), "missed": failures, **({"sweep": several} if several else {})})
    else:
        if several:
            print_markdown(str(artifact))
        print(f"Artifact: {artifact.path}")
    return _fail(failures)


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    run = _with_lightning("inspect", options, rest)
    plan: Plan = run.result
    if options.json:
        _print_json({**plan.to_dict(), "captured": run.captured})
    else:
        shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in run.captured.items())
        print_markdown(f"{plan}\n\nMultiply-adds are those of the captured batch: {shapes}.")
    return 0


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from lightning_quant.measure.verification import verify

    result = verify(options.path, key=options.key)
    values = {**dataclasses.asdict(result), "failures": result.failures}
    if options.json:
        _print_json(values)
    else:
        print(result)
    failures = [f"{options.path}: {text}" for text in failures_in(read(options.path).report or {})]
    return max(_fail(failures), int(bool(result.failures)))


def _sign(options: argparse.Namespace, rest: list[str]) -> int:
    from lightning_quant.artifact.signing import sign

    path = sign(options.path, options.key)
    print(json.dumps({"signature": str(path)}) if options.json else f"Signature: {path}")
    return 0


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    from lightning_quant.measure.bench import as_dict, bench

    rows = bench(options.paths, options.batches, options.threads)
    if options.json:
        print(json.dumps([{"schema_version": SCHEMA_VERSION, **as_dict(row)} for row in rows]))
    else:
        print_markdown(_bench_table(rows, against_float=options.against == "float"))
    limits = dataclasses.replace(limits_of(options), min_speedup=None)
    failures = [failure for path in options.paths for failure in missed_limits(read(path), limits)]
    return _fail([*failures, *_too_slow(rows, options.min_speedup)])


def _too_slow(rows: "list[BenchRow]", min_speedup: float | None) -> list[str]:
    if min_speedup is None:
        return []
    missed = []
    for row in rows:
        where = f"{row.path}: at batch {row.batch} on {row.threads} thread{'s' * (row.threads > 1)}"
        if row.speedup is None:
            missed.append(f"{where} its report has no time of float on this processor, so no speed-up is known")
        elif not row.speedup >= min_speedup:
            missed.append(
                f"{where} it is {row.speedup:.2f} times as fast as float when written, less than {min_speedup}"
            )
    return missed


def _bench_table(rows: "list[BenchRow]", *, against_float: bool) -> str:
    header = ["artifact", "runtime", "threads", "batch", "ms", "samples/s", "peak MB"]
    cells = []
    for r in rows:
        time = f"{figures(r.median_ms)} ({figures(r.low_ms)} to {figures(r.high_ms)})"
        memory = f"{r.peak_bytes / 2**20:.1f}"
        cells.append([r.path, r.runtime, str(r.threads), str(r.batch), time, f"{r.samples_per_s:,.0f}", memory])
        if against_float:
            cells[-1].append("-" if r.speedup is None else f"{r.speedup:.2f}")
    return text_table([*header, "times faster than float when written"] if against_float else header, cells)


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    artifact = read(options.path)
    if artifact.report is None or artifact.report_path is None:
        raise QuantizationError(f"Expected {options.path} to hold a report, but nothing was measured of it.")
    if options.json:
        _print_json(artifact.report)
    else:
        print_markdown(artifact.report_path.read_text(encoding="utf-8"))
    if options.html or options.open:
        # Made anew: the page in the folder is a file like others, which may come from anywhere.
        _show(page_of(artifact, to_html), options)
    return _fail(missed_limits(artifact, limits_of(options)))


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    artifacts = [read(path) for path in options.paths]
    summaries = [summary(artifact) for artifact in artifacts]
    limits = limits_of(options)
    missed = [failure for artifact in artifacts for failure in missed_limits(artifact, limits)]
    if options.json:
        print(json.dumps(summaries))
    else:
        rows = [columns(summary) for summary in summaries]
        headings = list(dict.fromkeys(heading for row in rows for heading in row))
        names = [name for _, name in headings]
        print_markdown(text_table(names, [[row.get(heading, "-") for heading in headings] for row in rows]))
    if options.html or options.open:
        _show(comparison(summaries, missed), options)
    return _fail(missed)


def _show(page: str, options: argparse.Namespace) -> None:
    """Write a page where `--html` says, and open it in a browser where `--open` does."""
    where = Path(options.html or lasting_scratch_folder() / f"{options.command}.html").absolute()
    try:
        where.write_text(page, encoding="utf-8")
    except OSError as error:
        raise QuantizationError(f"Expected `--html` to name a file that can be written, but {error}.") from error
    if options.open:
        webbrowser.open(where.as_uri())


def _with_lightning(name: str, options: argparse.Namespace, rest: list[str]) -> Any:
    require_cli_packages(name)
    from lightning_quant.cli.run_subcommand import run_subcommand

    # Like `python main.py`, which finds the user's modules where it is called.
    sys.path.insert(0, str(Path.cwd()))
    classes = {kind: path for kind in ("model", "data") if (path := getattr(options, f"{kind}_class")) is not None}
    arguments, source = [_underscored(argument) for argument in rest], None
    if name == "inspect":
        arguments, source = _split_source(arguments)
    return run_subcommand(name, options.config, classes, arguments, source, trust=options.trust)


def _split_source(arguments: list[str]) -> tuple[list[str], str | None]:
    """Take out the first argument that is neither an option nor the value of the one before."""
    for i, argument in enumerate(arguments):
        before = arguments[i - 1] if i else ""
        if not argument.startswith("--") and (not before.startswith("--") or "=" in before):
            return arguments[:i] + arguments[i + 1 :], argument
    return arguments, None


def _underscored(argument: str) -> str:
    """Write an option as LightningCLI does: `--ckpt-path` is `--ckpt_path`."""
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if name.startswith("--") else argument


def _fail(failures: list[str]) -> int:
    for failure in failures:
        print(f"{NAME}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _print_json(values: Mapping[str, Any]) -> None:
    print(json.dumps({"schema_version": SCHEMA_VERSION, **_plain(values)}))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}


def _Misconfiguration() -> type[Exception]:  # noqa: N802
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException


_COMMANDS = {
    "quantize": _quantize,
    "sweep": _sweep,
    "inspect": _inspect,
    "verify": _verify,
    "sign": _sign,
    "bench": _bench,
    "report": _report,
    "compare": _compare,
}


if __name__ == "__main__":
    sys.exit(main())
