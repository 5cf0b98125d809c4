"""`lightning-quant quantize`, `sweep` and `inspect`: what a command line means, and running it."""

import inspect
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_quant.arguments.choice import did_you_mean
from lightning_quant.capture.checkpoint import read_checkpoint
from lightning_quant.cli.quantize_command import OWN_SUBCOMMANDS, QuantizationCLI, Quantizing, import_class
from lightning_quant.errors import QuantizationError
from lightning_quant.report.limits import Limits

_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_OWN_MAIN = "use QuantizationCLI there in place of LightningCLI, and `python main.py quantize`"


def run_subcommand(
    name: str,
    config: str | None,
    classes: dict[str, str],
    arguments: list[str],
    source: str | None = None,
    *,
    trust: bool = False,
) -> QuantizationCLI:
    """Run a subcommand of `QuantizationCLI` on the classes that a configuration or its caller names, and return it.

    Args:
        name: of the subcommand.
        config: file that LightningCLI wrote or reads; `class_path`s in it name the classes.
        classes: "model" and "data" to an import path, for configurations that name no classes.
        arguments: the rest of the command line.
        source: a configuration, or a checkpoint, whose configuration is looked for beside it when there is none.
        trust: whether to import what is named by a checkpoint and the configuration beside it, and to load more of it
            than tensors and plain values.

    Raises:
        QuantizationError: LightningCLI refuses the command line or the configuration.
    """
    if source is not None and Path(source).suffix in _CONFIG_SUFFIXES:
        config = source
    elif source is not None:
        arguments = [*arguments, f"--ckpt_path={source}"]
        if config is None and (trust or "model" not in classes):
            config = _config_beside(source, trust=trust)
        if config is None and "model" not in classes:
            classes = {**classes, "model": _class_in(source, trust=trust)}
    if trust:
        arguments = [*arguments, "--trust=true"]
    content = _content(config) if config is not None else {}
    _check_names_classes(config, content, classes, arguments)
    if name == "inspect" and not any(argument.startswith("--ckpt_path") for argument in arguments):
        arguments = [*arguments, *_without_missing_checkpoint(content)]
    given = {kind: import_class(path) for kind, path in classes.items()}
    options = ["--config", config] if config is not None else []
    # LightningCLI warns of arguments given beside those of the command.
    before, sys.argv = sys.argv, ["lightning-quant", name, *options, *arguments]
    try:
        return _Command(
            given.get("model"),
            given.get("data"),
            save_config_callback=None,
            trainer_defaults={"logger": False, "enable_progress_bar": False},
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, **{own: {"exit_on_error": False} for own in OWN_SUBCOMMANDS}},
        )
    except ArgumentError as error:
        raise QuantizationError(_refusal(name, str(error), given)) from error
    finally:
        sys.argv = before


class _Command(QuantizationCLI):
    """Leaves exit codes to the command, which knows further limits."""

    @override
    def end_missed(self) -> None:
        """Go on."""


def _refusal(name: str, error: str, classes: dict[str, Any]) -> str:
    """Return in few words what LightningCLI refuses, and the name that was meant, or whose the option may be."""
    where = error.strip().splitlines()[0]
    if missing := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", error):
        there = vars(sys.modules[missing[1]]) if missing[1] in sys.modules else ()
        return f"{where} {missing[0]}.{did_you_mean(missing[2], there)}"
    if inside := re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", error):
        names = inspect.signature(import_class(inside[1])).parameters
        return f"{where} option {inside[2]!r} is not accepted by {inside[1]}.{did_you_mean(inside[2], names)}"
    wrong = re.search(r'Parser key "(\w+)":.*Subtypes: (.*?)\n.*Given value: (.*)', error, re.DOTALL)
    wrong = wrong or re.search(r'Parser key "(\w+)":\s+Expected a (<class.*?>)\. Got value: (.*)', error)
    if wrong is not None and (kinds := _in_words(wrong[2])):
        return f"Expected `--{wrong[1]}` to be {kinds}, but got {wrong[3]!r:.80}."
    if beside := re.search(r"unrecognized arguments: (\w+)", error):
        several = "Several values are a list: `--recipe '[int8,int8_dynamic]'`."
        return f"Expected an option, but got {beside[1]!r}. {several}"
    unknown = re.search(r"(unrecognized arguments: --|does not accept option ')([\w.]+)", error)
    if unknown is None:
        return "\n".join(line for line in error.splitlines() if line.strip())
    prefix = "--" if unknown[1].endswith("--") else ""
    hint = did_you_mean(f"{prefix}{unknown[2]}", [f"{prefix}{option}" for option in _options(name, classes)])
    return f"{where}.{hint}" if hint else f"{where}\nIf your own main.py takes this, {_OWN_MAIN}."


def _in_words(types: str) -> str:
    """Return what values jsonargparse takes, of the types that it names; empty for classes alone."""
    kinds = {"list[": "a list such as '[a,b]'", "dict[": "a mapping such as '{\"name\": 1}'", "'bool'": "true or false"}
    kinds |= {"'int'": "an integer", "'float'": "a number", "'str'": "a text", "Literal[": "a name"}
    outer = re.sub(r"(list|dict|Literal)\[.*", r"\1[", types)
    return " or ".join(words for kind, words in kinds.items() if kind in outer)


def _options(name: str, classes: dict[str, Any]) -> list[str]:
    """Return what a subcommand takes, as LightningCLI writes it."""
    known = [*inspect.signature(getattr(Quantizing, name)).parameters, "model_class", "data_class", "config", "json"]
    known += [f"trainer.{option}" for option in inspect.signature(Trainer).parameters]
    known += [f"{kind}.{option}" for kind, made in classes.items() for option in inspect.signature(made).parameters]
    return [*known, *(field.name for field in fields(Limits))] if name in ("quantize", "sweep") else known


def _config_beside(ckpt_path: str, *, trust: bool) -> str | None:
    """Return the configuration that LightningCLI saved with a run, which has the checkpoint below it."""
    read_checkpoint(ckpt_path, trust=trust)
    parents = list(Path(ckpt_path).absolute().parents)[:2]
    config = next((parent / "config.yaml" for parent in parents if (parent / "config.yaml").is_file()), None)
    if config is not None and not trust:
        raise QuantizationError(
            f"Expected to be told that {config} may be used, since what it names is imported, and so run. Name it, "
            f"`--config {config}`, or add `--trust` if whoever wrote it and the checkpoint is somebody you trust."
        )
    return None if config is None else str(config)


def _class_in(ckpt_path: str, *, trust: bool) -> str:
    class_path = read_checkpoint(ckpt_path, trust=trust).get("hyper_parameters", {}).get("_class_path")
    if class_path is not None and not trust:
        raise QuantizationError(
            f"Expected to be told that {class_path!r}, which {ckpt_path} names, may be imported, and so run. Name it, "
            f"`--model-class {class_path}`, or add `--trust` if whoever wrote the checkpoint is somebody you trust."
        )
    if class_path is None:
        raise QuantizationError(
            f"Expected {ckpt_path} to say of which class it is, or a config.yaml of LightningCLI beside it, but found "
            "neither. Add `--config config.yaml`, or `--model-class my_project.Model --data-class my_project.Data`."
        )
    return class_path


def _content(config: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise QuantizationError(f"Expected {config} to be a configuration of LightningCLI, but {error}.") from error
    if not isinstance(content, dict):
        raise QuantizationError(
            f"Expected {config} to be a configuration of LightningCLI, but it holds {content!r:.80}."
        )
    return content


def _check_names_classes(
    config: str | None, content: dict[str, Any], classes: dict[str, str], arguments: list[str]
) -> None:
    named = {**content, **classes}
    if "model" not in named and not any(argument.startswith("--model") for argument in arguments):
        raise QuantizationError(
            "Expected a configuration of LightningCLI that names a `model` (`--config config.yaml`), or classes "
            f"(`--model-class my_project.Model --data-class my_project.Data`), but {config or 'the command'} has none."
        )
    for kind in ("model", "data"):
        value = named.get(kind)
        if isinstance(value, dict) and "class_path" not in value:
            raise QuantizationError(
                f"Expected {config} to name the class of `{kind}`, but it has arguments only, as of a main.py that "
                f"names the classes. Add `--{kind}-class my_project.{kind.title()}`, or {_OWN_MAIN}."
            )


def _without_missing_checkpoint(content: dict[str, Any]) -> list[str]:
    """Plan without the checkpoint that a configuration names when it is still to be trained."""
    path = content.get("ckpt_path")
    if path is None or Path(path).is_file():
        return []
    print(
        f"lightning-quant inspect: {path} is not there yet, so weights and hyperparameters are not its own.",
        file=sys.stderr,
    )
    return ["--ckpt_path=null"]
