"""Progress: a bar in a terminal, a line now and then in a log."""

import sys
from types import ModuleType

import pytest

from lightning_quant.terminal import progress


@pytest.fixture(autouse=True)
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY_S", 0)


def run() -> str:
    with progress.shown("Exporting"):
        assert list(progress.tracked(range(3), "Calibrating", "batch")) == [0, 1, 2]
    return ""


def test_nothing_is_written_to_a_log_in_the_first_minute(capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert capsys.readouterr().err == ""


def test_a_log_gets_whole_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0)
    with progress.bar("AdaRound", "layer", total=2) as bar:
        bar.set_postfix_str("conv1", refresh=False)
        bar.update()
    lines = capsys.readouterr().err.replace("\r", "").splitlines()

    assert lines[-1].startswith("AdaRound: 1 of 2, 00:0")
    assert "to go" in lines[-1]
    assert "conv1" in lines[-1]


@pytest.mark.parametrize("where", ["terminal", "notebook"])
def test_there_is_a_bar_in_a_terminal_and_in_a_notebook(
    where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel.zmqshell", ModuleType("ipykernel.zmqshell"))
    else:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run()
    assert "Calibrating" in capsys.readouterr().err
