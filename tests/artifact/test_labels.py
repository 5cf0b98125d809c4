from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning_models
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, quantize
from lightning_quant.artifact.artifact import read
from lightning_quant.artifact.labels import class_labels

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

LABELS = ["cat", "dog", "owl"]


@pytest.mark.parametrize("name", ["classes", "class_names", "labels"])
@pytest.mark.parametrize("kind", [list, tuple])
def test_names_that_users_give_labels(name: str, kind: type) -> None:
    assert class_labels(SimpleNamespace(**{name: kind(LABELS)})) == tuple(LABELS)


def test_labels_of_a_transformers_configuration() -> None:
    config = SimpleNamespace(id2label={1: "dog", 0: "cat"})

    assert class_labels(SimpleNamespace(config=config)) == ("cat", "dog")


@pytest.mark.parametrize("value", [None, [], 3, "cat", torch.zeros(3), [0, 1], {"cat": 0}])
def test_other_things_of_these_names_are_no_labels(value: Any) -> None:
    assert class_labels(SimpleNamespace(classes=value, config=value)) is None
    assert class_labels(SimpleNamespace(classes=value), SimpleNamespace(class_names=LABELS)) == tuple(LABELS)


class Asked:
    """Has labels no more."""

    @property
    def classes(self) -> list[str]:
        raise RuntimeError("the data set was closed")


def test_labels_are_had_in_one_line_of_printable_text_or_not_at_all() -> None:
    odd = SimpleNamespace(classes=["great  white\n", "a\x00b", "\ud800"])

    assert class_labels(Asked(), odd) == ("great white", "a\N{REPLACEMENT CHARACTER}b", "\N{REPLACEMENT CHARACTER}")
    assert class_labels(Asked(), SimpleNamespace(config=SimpleNamespace(id2label={0: "a", "1": "b"}))) is None


def test_model_that_knows_its_classes(tmp_path: Path) -> None:
    model = nn.Linear(6, 3)
    model.class_names = LABELS
    artifact = quantize(model, calibration_data=[torch.randn(8, 6)], output_dir=tmp_path)

    assert read(tmp_path).classes == artifact.classes == tuple(LABELS)


def test_labels_without_a_score_for_each_are_left_out(tmp_path: Path) -> None:
    model = nn.Linear(6, 4)
    model.class_names = LABELS
    artifact = quantize(model, calibration_data=[torch.randn(8, 6)], output_dir=tmp_path)

    assert artifact.classes is None
    assert "classes" not in artifact.manifest


def test_data_set_that_knows_its_classes(tmp_path: Path) -> None:
    class Labelled(lightning_models.Classifier):
        def train_dataloader(self) -> Any:
            dataset = lightning_models.images(16)
            dataset.classes = [f"class {index}" for index in range(4)]
            return DataLoader(dataset, batch_size=8)

    callback = PostTrainingQuantization(output_dir=tmp_path, evaluate=False)
    Trainer(
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    ).fit(Labelled())

    assert read(tmp_path).classes == ("class 0", "class 1", "class 2", "class 3")
