"""Options of the command, and what was meant by one that there is not."""

import importlib.util
import re

import lightning_models  # noqa: F401  makes exporting quick
import pytest

from lightning_quant import __version__
from lightning_quant.cli import cli

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*max_epochs.*:UserWarning"),
]


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["quantize", "--config", "any.yaml"]) == 2
    assert "pip install 'lightning_quant[cli]'" in capsys.readouterr().err


def test_unknown_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(["verify", "folder", "--surprise"])
    assert refusal.value.code == 2
    assert "--surprise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantise", "x"), "invalid choice: 'quantise' .* Did you mean 'quantize'"),
        (("verify", "x", "--jsn"), r"unrecognized arguments: --jsn\. Did you mean '--json'"),
        (("report", "x", "--max-drop", "0.1"), "expected METRIC=AMOUNT such as val_f1=0.01, but got '0.1'"),
        (("report", "x", "--max-drop", "val_f1=much"), "expected METRIC=AMOUNT"),
    ],
)
def test_mistakes_of_spelling(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        cli.main(list(arguments))
    assert refusal.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"lightning-quant {__version__}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["quantize", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "--recipe numerics: a name out of `lightning_quant.recipe.RECIPES`" in said
    assert "list[str], or tuple[str, ...], default: ('*',))" in said
    assert "one of int8, int8_accurate, " in said
    assert "--num_batches training batches to calibrate with. (int, default: 32)" in said
    assert "--max-drop METRIC=AMOUNT" in said
