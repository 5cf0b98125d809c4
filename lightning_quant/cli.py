"""The command `lightning-quant`: quantize, inspect, verify, bench, report and compare.

Exit codes: 0 all is well, 1 an artifact's report says FAILED, or it missed a limit or computes something else here, 2
nothing could be done.
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_quant.artifact import Artifact, read
from lightning_quant.errors import QuantizationError
from lightning_quant.limits import cell, failures_in, missed_limits, summary
from lightning_quant.tables import text_table

if TYPE_CHECKING:
    from lightning_quant.bench import BenchRow
    from lightning_quant.graph.plan import Plan

_NAME = "lightning-quant"
_CLI_PACKAGES = ("jsonargparse", "docstring_parser", "typeshed_client")
_WITH_CLASSES = ("quantize", "inspect")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options, rest = _parser().parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if rest and options.command not in _WITH_CLASSES:
        _parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _COMMANDS[options.command](options, rest)
    except (QuantizationError, _Misconfiguration()) as error:
        print(f"{_NAME} {options.command}: {error}", file=sys.stderr)
        return 2
    except SystemExit as ended:  # by QuantizationCLI, which has said why
        return int(ended.code or 0)


def _quantize(options: argparse.Namespace, rest: list[str]) -> int:
    artifact: Artifact = _with_lightning("quantize", options, rest)
    failures = missed_limits(artifact, options.max_accuracy_drop, options.max_size_ratio, options.min_speedup)
    if options.json:
        print(json.dumps({**summary(artifact), "missed": failures}))
    else:
        print(f"Artifact: {artifact.path}")
    return _fail(failures)


def _inspect(options: argparse.Namespace, rest: list[str]) -> int:
    plan: Plan = _with_lightning("inspect", options, rest)
    print(json.dumps(plan.to_dict()) if options.json else plan)
    return 0


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from lightning_quant.verification import verify

    result = verify(options.path)
    values = {**dataclasses.asdict(result), "failures": result.failures}
    print(json.dumps(_plain(values)) if options.json else result)
    failures = [f"{options.path}: {text}" for text in failures_in(read(options.path).report or {})]
    return max(_fail(failures), int(bool(result.failures)))


def _bench(options: argparse.Namespace, rest: list[str]) -> int:
    from lightning_quant.bench import as_dict, bench

    rows = bench(options.paths, options.batches, options.threads)
    if options.json:
        print(json.dumps([as_dict(row) for row in rows]))
    else:
        print(_bench_table(rows, against_float=options.against == "float"))
    limits = (options.max_accuracy_drop, options.max_size_ratio, None)
    failures = [failure for path in options.paths for failure in missed_limits(read(path), *limits)]
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
        time, memory = f"{r.median_ms:.3g} ({r.low_ms:.3g} to {r.high_ms:.3g})", f"{r.peak_bytes / 2**20:.1f}"
        cells.append([r.path, r.runtime, str(r.threads), str(r.batch), time, f"{r.samples_per_s:,.0f}", memory])
        if against_float:
            cells[-1].append("-" if r.speedup is None else f"{r.speedup:.2f}")
    return text_table([*header, "times faster than float when written"] if against_float else header, cells)


def _report(options: argparse.Namespace, rest: list[str]) -> int:
    artifact = read(options.path)
    if artifact.report is None or artifact.report_path is None:
        raise QuantizationError(f"Expected {options.path} to hold a report, but nothing was measured of it.")
    print(json.dumps(artifact.report) if options.json else artifact.report_path.read_text(encoding="utf-8"))
    return _fail(missed_limits(artifact, options.max_accuracy_drop, options.max_size_ratio, options.min_speedup))


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    artifacts = [read(path) for path in options.paths]
    summaries = [summary(artifact) for artifact in artifacts]
    if options.json:
        print(json.dumps(summaries))
    else:
        columns = list(dict.fromkeys(name for summary in summaries for name in summary))
        print(text_table(columns, [[cell(summary.get(name)) for name in columns] for summary in summaries]))
    limits = (options.max_accuracy_drop, options.max_size_ratio, options.min_speedup)
    return _fail([failure for artifact in artifacts for failure in missed_limits(artifact, *limits)])


def _with_lightning(name: str, options: argparse.Namespace, rest: list[str]) -> Any:
    if any(importlib.util.find_spec(package) is None for package in _CLI_PACKAGES):
        raise QuantizationError(
            f"Expected jsonargparse for `{_NAME} {name}`, but it is missing: pip install 'lightning_quant[cli]'"
        )
    from lightning_quant.run_subcommand import run_subcommand

    # Like `python main.py`, which finds the user's modules where it is called.
    sys.path.insert(0, str(Path.cwd()))
    classes = {kind: path for kind in ("model", "data") if (path := getattr(options, f"{kind}_class")) is not None}
    arguments, source = [_underscored(argument) for argument in rest], None
    if name == "inspect":
        arguments, source = _split_source(arguments)
    return run_subcommand(name, options.config, classes, arguments, source)


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
        print(f"{_NAME}: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and v - v != 0 else v for k, v in values.items()}


def _Misconfiguration() -> type[Exception]:  # noqa: N802
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return MisconfigurationException


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_NAME, description="Quantize PyTorch Lightning models truthfully.")
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--json", action="store_true", help="print JSON for machines")
    limits = argparse.ArgumentParser(add_help=False)
    limits.add_argument("--max-accuracy-drop", type=float, help="fail when a metric named acc... fell by more")
    limits.add_argument(
        "--max-size-ratio", type=float, help="fail when the artifact has a larger share of float's bytes"
    )
    limits.add_argument("--min-speedup", type=float, help="fail when it is less times as fast as the best float peer")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, usage, text in (
        ("quantize", "", "quantize a checkpoint with the model, data and Trainer of a LightningCLI configuration"),
        ("inspect", " [CKPT_OR_CONFIG]", "say what would be quantized and why the rest would not, before any training"),
    ):
        usage = f"{_NAME} {name} [-h]{usage} [--config CONFIG] [options]"
        # No abbreviations, since `--model` is an option of LightningCLI and no short form of `--model-class`.
        command = commands.add_parser(
            name,
            parents=[output, *[limits] * (name == "quantize")],
            help=text,
            usage=usage,
            epilog=_EPILOG,
            allow_abbrev=False,
        )
        command.add_argument("--config", help="YAML file of LightningCLI")
        command.add_argument("--model-class", help="import path, when the configuration names no class")
        command.add_argument("--data-class", help="likewise, of the LightningDataModule")
    commands.add_parser("verify", parents=[output], help="rerun the golden batch on this machine").add_argument("path")
    both = [output, limits]
    commands.add_parser("report", parents=both, help="print what was measured").add_argument("path")
    command = commands.add_parser("bench", parents=both, help="latency, throughput and memory on this machine")
    command.add_argument("paths", nargs="+")
    command.add_argument("--batches", type=_positive, nargs="+", help="those in the reports by default")
    command.add_argument("--threads", type=_positive, nargs="+", help="those in the reports by default")
    command.add_argument("--against", choices=["float"], help="compare with the float peer in the report")
    commands.add_parser("compare", parents=both, help="one table over artifacts").add_argument("paths", nargs="+")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


_EPILOG = (
    "Options of both commands: --ckpt_path, --recipe, --runtime, --module, --include, --exclude; of `quantize`: "
    "--output, --num_batches, --evaluate, --threads, --sensitivity, --engine. All options of LightningCLI are taken as "
    "well, such as --model.width or --trainer.accelerator."
)
_COMMANDS = {
    "quantize": _quantize,
    "inspect": _inspect,
    "verify": _verify,
    "bench": _bench,
    "report": _report,
    "compare": _compare,
}


if __name__ == "__main__":
    sys.exit(main())
