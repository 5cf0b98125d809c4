"""Progress: a bar in a terminal, a line now and then in a log."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from lightning_models import Classifier, fit

from lightning_quant import PostTrainingQuantization
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


@pytest.fixture
def display() -> Iterator[Any]:
    rich = pytest.importorskip("rich.progress")
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True, width=100)
    shown = rich.Progress(console=console, refresh_per_second=100)
    progress.follow(SimpleNamespace(progress=shown))
    yield shown
    shown.stop()
    progress.follow(None)


def test_bars_are_rows_of_a_display_that_is_there(display: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with display:
        for number in progress.tracked(range(3), "Calibrating", "batch"):
            display.refresh()
            assert display.tasks[0].description.startswith("Calibrating")
            assert display.tasks[0].completed <= number
            assert display.tasks[0].total == 3
        assert not display.tasks
        with progress.shown("Exporting"):
            assert [task.description for task in display.tasks] == ["Exporting"]
        assert not display.tasks
    assert "Calibrating" in display.console.file.getvalue()
    assert capsys.readouterr().err == ""


def test_a_display_that_has_ended_is_left_alone(display: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0)
    assert list(progress.tracked(range(2), "Calibrating", "batch")) == [0, 1]
    assert not display.tasks


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_a_fit_shows_its_bars_where_the_trainer_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from lightning.pytorch.callbacks import RichProgressBar

    output = io.StringIO()
    trainer_bar = RichProgressBar(console_kwargs={"file": output, "force_terminal": True, "width": 120})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    callback = PostTrainingQuantization(output_dir=tmp_path / "quantized", evaluate=False)
    fit(Classifier(), callback, trainer_bar, enable_progress_bar=True)

    assert "Calibrating" in output.getvalue()
    assert progress._followed is None
