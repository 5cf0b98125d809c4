"""Validation that samples: metrics are compared with equal random numbers, and the report says how far they vary."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_models import Classifier, fit, seeded

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks.by_chance import in_words

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
_DRAWS: dict[str, Any] = {
    "torch": lambda: float(torch.randn(())),
    "numpy": lambda: np.random.normal(),
    "python": random.random,
    "none": lambda: 0.5,
}


@pytest.mark.parametrize("source", _DRAWS)
def test_the_report_says_which_metrics_are_random_and_how_much(source: str, tmp_path: Path) -> None:
    class Sampling(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("sampled", _DRAWS[source]())

    callback = PostTrainingQuantization("int8_dynamic", "torch", output_dir=tmp_path / "artifact")
    fit(seeded(Sampling), callback)
    report: Any = callback.artifact.report  # type: ignore[union-attr]
    notes = [note for note in report["notes"] if "draws random numbers" in note]
    sampled = next(row for row in report["metrics"] if row["name"] == "sampled")
    assert sampled["artifact"] == sampled["float_value"]
    assert bool(notes) == (source != "none")
    if notes:
        assert "with 3 seeds float alone has sampled from" in notes[0]
        assert "val_loss" not in notes[0]


def test_metrics_that_do_not_depend_on_the_draws_are_said_to_be_the_same() -> None:
    assert "the same with 2 seeds" in in_words([{"a": 1.0}, {"a": 1.0, "b": 2.0}])
