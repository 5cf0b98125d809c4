"""What fails that is measured for a report alone costs what it measures, and nothing else."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from lightning_models import Classifier, fit, images, seeded

from lightning_quant import PostTrainingQuantization, load
from lightning_quant.callbacks import ptq
from lightning_quant.errors import EvaluationError, NoEffectWarning
from lightning_quant.measure.attempts import noting
from lightning_quant.report import make_report


def test_what_fails_is_noted_in_words_of_ours_or_of_others() -> None:
    missing: list[str] = []
    for error in (EvaluationError("Expected a metric."), KeyError("x")):
        with noting(missing, "metrics are"):
            raise error

    assert missing == ["metrics are missing: Expected a metric", "metrics are missing: KeyError('x')"]
    with pytest.raises(KeyError), noting(missing, "metrics are", alone=False):
        raise KeyError("x")
    with pytest.raises(KeyboardInterrupt), noting(missing, "metrics are"):
        raise KeyboardInterrupt


class Ends(Classifier):
    """Validates as long as it trains."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.state.fn != "fit":
            raise RuntimeError("the run is over")
        super().validation_step(batch, batch_idx)


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no memory")


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_an_end_where_everything_fails_has_the_artifact_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptq, "rank_operators", fails)
    monkeypatch.setattr(make_report, "measure_latency", fails)
    callback = PostTrainingQuantization(output_dir=tmp_path, sensitivity=True)
    fit(seeded(Ends), callback, max_epochs=1)
    report = callback.artifact.report  # type: ignore[union-attr]

    for what in ("the metrics of validation", "sensitivities", "latencies"):
        assert any(text.startswith(f"{what} are missing: RuntimeError(") for text in report["warnings"])
    assert report["metrics"] == report["latency"] == []
    assert not any("logs none" in note for note in report["notes"])
    assert load(tmp_path)(images(2).tensors[0]).shape == (2, 4)


class Recorder(DummyLogger):
    """Keeps the names of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def log_metrics(self, metrics: Any, *args: Any, **kwargs: Any) -> None:
        self.names |= set(metrics)


@pytest.mark.filterwarnings("error::lightning_quant.errors.NoEffectWarning")
def test_where_warnings_are_errors_all_is_written_and_logged_first(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(
        "int8_weight_only", "torch", output_dir=tmp_path, limits={"max_size_ratio": 0.01}
    )
    with pytest.raises(NoEffectWarning, match="limits FAILED"):
        fit(seeded(), callback, max_epochs=1, logger=(logger := Recorder()))

    assert callback.artifact is not None
    assert callback.artifact.report["failures"]
    assert "quant/size_ratio" in logger.names
