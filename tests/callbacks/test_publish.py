import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, WithoutValidation, decibels, fit, seeded, validate_by_hand

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load
from lightning_quant.callbacks.publish import tell

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Recorder(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, float]] = []

    def log_metrics(self, metrics: Any, step: int | None = None, *args: Any, **kwargs: Any) -> None:
        found = {name: value for name, value in metrics.items() if name.startswith("quant/")}
        self.seen += [found] if found else []


@pytest.fixture
def callbacks(tmp_path: Path) -> Any:
    """Return a maker of post-training callbacks, each with a folder of its own."""
    folders = (tmp_path / f"artifact{number}" for number in range(9))
    return lambda recipe="int8_weight_only", runtime="torch", **options: PostTrainingQuantization(
        recipe, runtime, output_dir=next(folders), threads=1, evaluate=False, **options
    )


def test_keys_of_several_callbacks_are_told_apart(callbacks: Any) -> None:
    logger = Recorder()
    several = callbacks("float16"), callbacks(), callbacks("float16"), callbacks(name="mine")
    fit(seeded(WithoutValidation), *several, logger=logger, max_epochs=1)
    first, second, third, named = logger.seen

    assert "quant/float16-torch-net/size_ratio" in first
    assert "quant/int8_weight_only-torch/size_ratio" in second
    assert "quant/float16-torch-net-2/size_ratio" in third
    assert "quant/mine/size_ratio" in named
    assert len({*first, *second, *third, *named}) == len(first) + len(second) + len(third) + len(named)


def test_one_callback_has_short_keys_and_others_can_read_them_from_the_trainer(callbacks: Any) -> None:
    logger = Recorder()
    trainer = fit(seeded(WithoutValidation), callbacks(), logger=logger, max_epochs=1)
    (logged,) = logger.seen

    assert "quant/size_ratio" in logged
    assert {name: value.item() for name, value in trainer.callback_metrics.items() if name in logged} == pytest.approx(
        logged
    )


@pytest.mark.parametrize("name", ["", "a/b", 3])
def test_names_that_are_no_keys_are_refused(name: Any) -> None:
    with pytest.raises(MisconfigurationException, match="Expected `name` to be a text"):
        PostTrainingQuantization(name=name)


def test_report_has_the_metrics_from_before_rounding_began(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Watched(Classifier):
        def on_validation_end(self) -> None:
            if not self.trainer.sanity_checking:
                seen.append(validate_by_hand(self.net, self.val_dataloader()))

    schedule = {"observe": 0, "fake_quantize": 1, "freeze_observers": 2, "freeze_batch_norm": 2, "unit": "epochs"}
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=schedule, threads=1)
    trainer = fit(seeded(Watched), callback, max_epochs=3)
    rows = {row["name"]: row for row in callback.artifact.report["metrics"]}

    for name, value in seen[0].items():
        assert rows[name]["before"] == pytest.approx(value, abs=1e-4)
        assert rows[name]["before"] != rows[name]["float_value"]
    # Noise is that of the weights without rounding against the file, on data that chose no range.
    noise = callback.artifact.report["noise"]
    assert noise["base"] == "the first call of validation, which chose no range"
    assert noise["outputs"][0]["name"] == "output"
    net, (x, _) = seeded(Watched).net, next(iter(seeded(Watched).val_dataloader()))
    net.load_state_dict(trainer.lightning_module.net.state_dict())
    with torch.no_grad():
        assert decibels(net.eval()(x), load(callback.artifact.path)(x)) == pytest.approx(
            noise["outputs"][0]["db"], abs=0.1
        )
    text = callback.artifact.report_path.read_text()
    assert "| float, before rounding began | trained weights without rounding |" in text
    assert callback.state_dict()["metrics_before"] == pytest.approx({**callback.metrics_before})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_report_is_drawn_by_rich_where_lightning_writes_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("rich")
    report, line = "# int8\n\n| a | b |\n|---|--:|\n| x | 1 |", "Artifact: /a_b_c"
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger.name):
        tell(report, line)
    assert "|--" not in terminal.getvalue()
    assert "──" in terminal.getvalue()
    assert set(caplog.messages) == {line}

    with caplog.at_level(logging.WARNING, logger.name):
        monkeypatch.setattr(sys, "stderr", terminal := Terminal())
        tell(report, line)
    assert terminal.getvalue() == ""

    caplog.clear()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with caplog.at_level(logging.INFO, logger.name):
        tell(report, line)
    assert set(caplog.messages) == {f"{report}\n{line}"}
