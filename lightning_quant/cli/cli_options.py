"""Options of the command `lightning-quant`: its parser, its help, and what was meant by an option that there is not."""

import argparse
import importlib.util
import inspect
import os
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any

from lightning_quant import __version__
from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.errors import QuantizationError
from lightning_quant.report.limits import Limits

NAME = "lightning-quant"
CLI_PACKAGES = ("jsonargparse", "docstring_parser", "typeshed_client")


class Parser(argparse.ArgumentParser):
    """A parser that says what was meant."""

    def error(self, message: str) -> typing.NoReturn:
        """End with the message and the closest of what there is."""
        options = list(self._option_string_actions)
        if choice := re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message):
            message += "." + did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif unknown := re.search(r"unrecognized arguments: (--[\w-]+)", message):
            message += "." + did_you_mean(unknown[1], options)
        super().error(message)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser of the command, and those of its subcommands by name."""
    parser = Parser(prog=NAME, description="Quantize PyTorch Lightning models truthfully.")
    parser.add_argument("--version", action="version", version=f"{NAME} {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands = {**_commands_on_models(subparsers), **_commands_on_artifacts(subparsers)}
    for name, command in commands.items():
        command.add_argument("--json", action="store_true", help="print JSON for machines")
        if name not in ("verify", "sign", "inspect"):
            _add_limits(command)
    return parser, commands


def _commands_on_models(subparsers: Any) -> dict[str, Parser]:
    commands: dict[str, Parser] = {}
    for name, usage, text in (
        ("quantize", "", "quantize a checkpoint with the model, data and Trainer of a LightningCLI configuration"),
        ("sweep", "", "the same with several recipes or for several runtimes, and one table, the recommended first"),
        ("inspect", " [CKPT_OR_CONFIG]", "say what would be quantized and why the rest would not, before any training"),
    ):
        # No abbreviations, since `--model` is an option of LightningCLI and no short form of `--model-class`.
        command = subparsers.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            usage=f"{NAME} {name} [-h]{usage} [--config CONFIG] [options]",
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help message and exit")
        command.add_argument("--config", metavar="FILE", help="YAML file of LightningCLI")
        command.add_argument("--model-class", metavar="PATH", help="import path, when the configuration names no class")
        command.add_argument("--data-class", metavar="PATH", help="likewise, of the LightningDataModule")
        command.add_argument(
            "--trust",
            action="store_true",
            help="run code of a checkpoint: load any class from it, import what it and a config.yaml beside it name",
        )
        commands[name] = command
    return commands


def _commands_on_artifacts(subparsers: Any) -> dict[str, Parser]:
    commands: dict[str, Parser] = {}
    for name, text in (
        ("verify", "rerun the golden batch on this machine"),
        ("sign", "sign an artifact, so that `verify` can tell who made it"),
        ("report", "print what was measured"),
        ("bench", "latency, throughput and memory on this machine"),
        ("compare", "one table over artifacts"),
    ):
        commands[name] = subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    for name in ("verify", "sign", "report"):
        commands[name].add_argument("path", help="the artifact's folder")
    commands["verify"].add_argument("--key", metavar="FILE", help="public key that the artifact must be signed with")
    commands["sign"].add_argument("--key", metavar="FILE", required=True, help="private key of Ed25519")
    for name in ("bench", "compare"):
        commands[name].add_argument("paths", nargs="+", help="the artifacts' folders")
    for name in ("report", "compare"):
        commands[name].add_argument("--html", metavar="FILE", help="write it as a page of its own")
        commands[name].add_argument("--open", action="store_true", help="show that page in a browser")
    bench = commands["bench"]
    bench.add_argument("--batches", type=_positive, nargs="+", metavar="N", help="those in the reports by default")
    bench.add_argument("--threads", type=_positive, nargs="+", metavar="N", help="those in the reports by default")
    bench.add_argument("--against", choices=["float"], help="compare with the float peer in the report")
    return commands


def limits_of(options: argparse.Namespace) -> Limits:
    """Return the limits that a command line sets.

    Raises:
        QuantizationError: one is no number.
    """
    return Limits(
        dict(options.max_drop),
        options.max_accuracy_drop,
        options.max_size_ratio,
        options.min_speedup,
        options.higher_is_better,
        options.lower_is_better,
    )


def require_cli_packages(command: str) -> None:
    """Make sure that what LightningCLI needs is installed.

    Raises:
        QuantizationError: it is not; the message has the pip command.
    """
    if any(importlib.util.find_spec(package) is None for package in CLI_PACKAGES):
        raise QuantizationError(
            f"Expected jsonargparse for `{NAME} {command}`, but it is missing: pip install 'lightning_quant[cli]'"
        )


def _add_limits(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("limits", "exit code 1 when one is missed, or on something not measured")
    group.add_argument(
        "--max-drop",
        type=_metric_limit,
        action="append",
        default=[],
        metavar="METRIC=AMOUNT",
        help="by how much a metric may get worse than float, in its own unit: val_f1=0.01; for several, several times",
    )
    for which in ("higher", "lower"):
        group.add_argument(
            f"--{which}-is-better",
            action="append",
            default=[],
            metavar="METRIC",
            help="of a metric of --max-drop for which neither torchmetrics nor a monitoring callback says so",
        )
    for name, text in (
        ("--max-accuracy-drop", "by how much every metric with `acc` in its name may fall"),
        ("--max-size-ratio", "largest share of float's bytes"),
        ("--min-speedup", "least times as fast as the best float peer"),
    ):
        group.add_argument(name, type=float, metavar="NUMBER", help=text)


def _metric_limit(text: str) -> tuple[str, float]:
    name, equals, amount = text.rpartition("=")
    try:
        return name, float(amount if equals and name else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected METRIC=AMOUNT such as val_f1=0.01, but got {text!r}") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, but got {text!r}")
    return int(text)


class _Help(argparse.Action):
    """Prints help with the options that LightningCLI reads from the signature of the subcommand's method."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and end."""
        parser.epilog = _method_options(parser.prog.rpartition(" ")[2])
        parser.print_help()
        sys.exit(0)


def _method_options(command: str) -> str:
    """Return the options of `QuantizationCLI`'s subcommand with types, defaults and choices."""
    require_cli_packages(command)
    from docstring_parser import parse

    from lightning_quant.cli.quantize_command import Quantizing

    method = getattr(Quantizing, command)
    texts = {p.arg_name: p.description or "" for p in parse(method.__doc__ or "").params}
    hints = typing.get_type_hints(method)
    lines = [f"options of `python main.py {command}` with QuantizationCLI as well:"]
    for name, parameter in inspect.signature(method).parameters.items():
        if name in ("self", "model", "datamodule"):
            continue
        default = "" if parameter.default is None else f", default: {parameter.default}"
        text = " ".join(texts[name].split())
        lines += [f"  --{name}", *_wrapped(f"{text} ({_type_text(hints[name])}{default})")]
    lines += ["", "All options of LightningCLI are taken as well, such as --model.width or --trainer.accelerator."]
    return "\n".join(lines)


def _type_text(hint: Any) -> str:
    """Return a type as a reader of help wants it: the choices of a name, and no None."""
    whole = (list, dict, tuple, os.PathLike, typing.Literal)
    parts: Sequence[Any] = typing.get_args(hint) if typing.get_origin(hint) not in whole else ()
    if not parts:
        if typing.get_origin(hint) is typing.Literal:
            return f"one of {', '.join(map(str, typing.get_args(hint)))}"
        return (
            hint.__name__
            if isinstance(hint, type) and typing.get_origin(hint) is None
            else str(hint).replace("typing.", "")
        )
    has_choices = any(typing.get_origin(part) is typing.Literal for part in parts)
    shown = [part for part in parts if part is not type(None) and not (has_choices and part is str)]
    return ", or ".join(map(_type_text, shown))


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
