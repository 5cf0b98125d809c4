"""Lines printed after an interruption make the same callback again; a state is found wherever the artifact goes."""

import copy
import dataclasses
import enum
import inspect
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning_models import Classifier

import lightning_quant as lq

SHARED = {
    "module": "net",
    "output_dir": "somewhere",
    "include": ["Conv2d", "head"],
    "exclude": ("head.0",),
    "example": "example_input_array",
    "weights": "best",
    "evaluate": False,
    "limit_eval_batches": 0.5,
    "score_every": 2,
    "score_batches": 0.5,
    "score_with": "runtime",
    "threads": 2,
    "dynamic_shapes": {"x": {2: "height"}},
    "sensitivity": True,
    "name": "mine",
    "limits": {"max_size_ratio": 0.3},
    "objective": "latency",
    "max_validations": 5,
    "time_budget_s": 60.0,
    "show_samples": False,
}
KINDS: dict[type[Any], dict[str, Any]] = {
    lq.QuantizationAwareTraining: {
        "schedule": lq.Schedule(fake_quantize=2, freeze_observers=3, unit="epochs"),
        "distill": {"weight": 0.3},
        "evaluate": True,
        "only_if_needed": {"val_acc": -0.005},
    },
    lq.PostTrainingQuantization: {"calibration": {"num_batches": 3, "data": "validation"}},
}


def again(callback: Any, folder: Path) -> Any:
    """Run the line that makes the callback."""
    checkpoint = folder / "last.ckpt"
    checkpoint.touch()
    saving = SimpleNamespace(last_model_path=str(checkpoint))
    text = callback.way_back(SimpleNamespace(checkpoint_callbacks=[saving]))
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith("callback = "))
    names: dict[str, Any] = {"lq": lq}
    exec(line, names)
    return names["callback"]


class Choice(enum.Enum):
    """A hyperparameter of a class of the project's own."""

    LARGE = "large"


class Configured(Classifier):
    """Saves hyperparameters of any class, as projects do."""

    def __init__(self, size: Choice = Choice.LARGE) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("module", "expected"), [(Classifier, ()), (Configured, ("trust_checkpoint=True",))], ids=["plain", "any class"]
)
def test_the_printed_lines_make_the_artifact(
    module: type[Any], expected: tuple[str, ...], tmp_path: Path, unmeasured: None
) -> None:
    callback = lq.PostTrainingQuantization(output_dir=tmp_path / "artifact", calibration={"num_batches": 1})
    model = module()
    train_dataloaders, val_dataloaders = model.train_dataloader(), model.val_dataloader()
    trainer = Trainer(
        max_steps=1, limit_val_batches=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(model, train_dataloaders, val_dataloaders)
    callback.path, callback.last_folder = "net", tmp_path / "artifact"
    lines = callback.way_back(trainer)

    said = ("train_dataloaders=train_dataloaders", "val_dataloaders=val_dataloaders", "limit_val_batches=1", *expected)
    assert [part for part in said if part not in lines] == []
    assert ("trust_checkpoint" in lines) == bool(expected)
    names = {"model": module(), "train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
    exec("\n".join(line.strip() for line in lines.splitlines() if line.startswith("    ")), names)
    assert (tmp_path / "artifact" / "manifest.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_printed_line_makes_an_equal_callback(kind: type[Any], tmp_path: Path) -> None:
    given = SHARED | KINDS[kind] | {"output_dir": str(tmp_path / "artifact")}
    unsaid = set(inspect.signature(kind).parameters) - set(given) - {"recipe", "runtime", "engine"}
    assert not unsaid
    callback = kind("int8_reduce_range", "openvino", **given)
    callback.path, callback.last_folder = "net", tmp_path / "artifact"

    assert again(callback, tmp_path).settings == callback.settings


@pytest.mark.parametrize("kind", KINDS)
def test_own_recipes_and_engines_are_in_the_line(kind: type[Any], tmp_path: Path) -> None:
    recipe = dataclasses.replace(lq.Recipe(name="own"), batch_norm_batches=3)
    callback = kind(recipe, "torch", engine="onednn", output_dir=str(tmp_path / "artifact"))
    callback.last_folder = tmp_path / "artifact"

    assert again(callback, tmp_path).settings == callback.settings


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_copies_know_their_arguments(duplicate: Any, tmp_path: Path) -> None:
    callback = duplicate(lq.PostTrainingQuantization(threads=3, output_dir=str(tmp_path)))
    callback.last_folder = tmp_path

    assert again(callback, tmp_path).threads == 3
