"""What is refused before the first training batch, by both callbacks, and what the message says."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import BATCH, Classifier, ConvNet, Recorder, WithoutValidation, fit, images, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, Schedule, quantize
from lightning_quant.errors import CalibrationError

Kind = type[QuantizationAwareTraining] | type[PostTrainingQuantization]


@pytest.fixture(params=[QuantizationAwareTraining, PostTrainingQuantization])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "artifact"


def refuse(callback: Any, match: str, module: Any = None, **options: Any) -> None:
    """Fit, and check that it was refused before any batch and without touching module or disk."""
    module = Classifier() if module is None else module
    before = snapshot(Path(callback.output_dir))
    recorder = Recorder()
    with pytest.raises(MisconfigurationException, match=match):
        fit(module, callback, recorder, **options)

    assert recorder.num_batches == 0
    assert snapshot(Path(callback.output_dir)) == before
    assert not any("forward" in child.__dict__ for child in module.modules())


def snapshot(path: Path) -> Any:
    """Return all files and folders at or under a path with their content, or None when there is none."""
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    return {str(item): item.read_bytes() if item.is_file() else None for item in sorted(path.rglob("*"))}


def test_the_check_itself_notices_a_run_that_was_not_refused(folder: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        refuse(StopsAtOnce(output_dir=folder), "anything")


class StopsAtOnce(PostTrainingQuantization):
    def on_fit_end(self, *_: Any) -> None:
        pass


# --- names


def test_unknown_module(kind: Kind, folder: Path) -> None:
    refuse(kind(module="nett", output_dir=folder), r"`module` .*Classifier.* got 'nett'\. Did you mean 'net'")


def test_module_that_training_step_never_calls(kind: Kind, folder: Path) -> None:
    refuse(kind(module="net.bn1", output_dir=folder), r"to call `module`|something to quantize")
    refuse(kind(module="accuracy", output_dir=folder), r"Expected the training step to call `module` 'accuracy'")


def test_unknown_recipe(kind: Kind) -> None:
    with pytest.raises(MisconfigurationException, match=r"`recipe` to be one of .*'int8'.* got 'int3'"):
        kind("int3")
    with pytest.raises(MisconfigurationException, match=r"`recipe` to have fields out of .*'weight'.*'weights'"):
        kind({"weights": {"bits": 8}})


def test_unknown_runtime(kind: Kind) -> None:
    with pytest.raises(MisconfigurationException, match=r"`runtime` to be one of .*'onnxruntime'.* got 'onnxrt'"):
        kind(runtime="onnxrt")


def test_runtime_that_is_not_installed(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest)
    )
    refuse(kind(output_dir=folder), r"onnxruntime is missing: pip install .*onnxruntime")


@pytest.mark.parametrize(("argument", "value"), [("weights", "better"), ("example", "batch")])
def test_unknown_choice(kind: Kind, argument: str, value: str) -> None:
    with pytest.raises(MisconfigurationException, match=rf"`{argument}` to be one of .*{value}"):
        kind(**{argument: value})


# --- the folder


def test_folder_with_files_that_are_not_ours(kind: Kind, folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    refuse(kind(output_dir=folder), r"`output_dir` to be empty or an artifact of ours.*Choose another folder")


def test_folder_with_a_manifest_that_is_not_ours(kind: Kind, folder: Path) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web app"}')
    refuse(kind(output_dir=folder), r"manifest of lightning_quant")


def test_folder_that_is_a_file(kind: Kind, folder: Path) -> None:
    folder.write_text("a file")
    refuse(kind(output_dir=folder), r"`output_dir` .* to be a folder that can be written, but .*File exists")


def test_folder_that_cannot_be_made(kind: Kind, folder: Path) -> None:
    folder.write_text("a file")
    refuse(
        kind(output_dir=folder / "below"), r"`output_dir` .* to be a folder that can be written, but .*Not a directory"
    )


def test_folder_without_permission(kind: Kind, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by chmod, which does not bind an administrator.
    def deny(*_: Any, **options: Any) -> Iterator[Any]:
        raise PermissionError(f"Permission denied: {options.get('dir')}")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", deny)
    refuse(kind(output_dir=folder), r"`output_dir` .* to be a folder that can be written, but Permission denied")


def test_working_directory_stays_as_it_is(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse(kind(module="nett", output_dir="relative/folder"), "Did you mean")
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_folder_of_our_own_is_kept_until_the_new_artifact_is_there(kind: Kind, folder: Path) -> None:
    quantize(nn.Sequential(nn.Linear(4, 2)), calibration_data=[torch.randn(8, 4)], output_dir=folder)
    refuse(kind(module="nett", output_dir=folder), "Did you mean")


# --- the model


class NoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4).flatten(1) * self.scale


class OnlyUnsupported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean((2, 3))


class Untraceable(nn.Module):
    """Branches on values and hands its layer's weight to a function, so that there is no smaller part to trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return F.linear(x.flatten(1), self.layer.weight, self.layer.bias)


class Unexportable(nn.Module):
    """Traces well, but uses an operation that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(self.layer(x)).mean(-1)


def test_module_without_layers(kind: Kind, folder: Path) -> None:
    refuse(
        kind(output_dir=folder),
        r"layers to quantize in its training step, but it has no weights\. Build it of layers",
        Classifier(NoLayers()),
    )
    refuse(kind(module="net", output_dir=folder), "something to quantize, but there is nothing", Classifier(NoLayers()))


def test_layers_that_the_runtime_does_not_have_in_integers(folder: Path) -> None:
    text = r"something to quantize, but there is nothing: up \(ConvTranspose2d\): {}.*Quantized after training"
    trained = QuantizationAwareTraining(output_dir=folder)
    refuse(trained, text.format("ONNX Runtime has no integer kernel"), Classifier(OnlyUnsupported()))
    without = PostTrainingQuantization(runtime="inductor", output_dir=folder)
    refuse(without, text.format("Inductor computes it in float"), Classifier(OnlyUnsupported()))


def test_everything_excluded(kind: Kind, folder: Path) -> None:
    refuse(kind(output_dir=folder, exclude=["*"]), r'something to quantize, .*excluded by "\*"')


def test_forward_that_cannot_be_traced_at_all(kind: Kind, folder: Path) -> None:
    refuse(kind(output_dir=folder), r"cannot be traced: ", Classifier(Untraceable()))


def test_module_that_does_not_export(kind: Kind, folder: Path) -> None:
    refuse(kind(output_dir=folder), r"exporter to ONNX to take .*svd.*(`module=|exclude)", Classifier(Unexportable()))


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_pattern_that_matches_nothing(kind: Kind, folder: Path, argument: str) -> None:
    callback = kind(output_dir=folder, **{argument: ["*", "encoder.*"]})
    nothing = r"'encoder\.\*', which matches nothing\. Names here are conv1"
    refuse(callback, rf"`{argument}`( and `overrides`)? to hold patterns .*{nothing}")


class OwnLayers(Classifier):
    """Never calls its net, only the layers inside it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net.head(self.net.features(x)), y)


def test_training_step_that_calls_only_parts(kind: Kind, folder: Path) -> None:
    refuse(
        kind(output_dir=folder), r"3 independent ones: 'net\.conv1' \(.*, 'net\.conv2' .*, 'net\.head' ", OwnLayers()
    )


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_forward_that_something_else_has_replaced(folder: Path) -> None:
    module = Classifier()
    module.net.forward = lambda x: ConvNet.forward(module.net, x)
    with pytest.raises(MisconfigurationException, match=r"to have its own forward.*Remove it before quantizing"):
        fit(module, QuantizationAwareTraining(output_dir=folder))

    assert "forward" in module.net.__dict__


# --- the data


class Empty(Classifier):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(0), BATCH)


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning")
def test_loader_without_batches(kind: Kind, folder: Path) -> None:
    refuse(kind(output_dir=folder), "train dataloader to yield a batch, but it yields none", Empty())


def test_limit_of_no_batches(kind: Kind, folder: Path) -> None:
    refuse(kind(output_dir=folder), r"train data", limit_train_batches=0)


def test_validation_data_for_calibration_that_is_not_there(folder: Path) -> None:
    callback = PostTrainingQuantization(output_dir=folder, calibration={"data": "validation"})
    refuse(callback, "validation data", WithoutValidation())


def not_finite(value: float) -> DataLoader:
    """Return two batches of which the second has a value that is not finite."""
    x, y = images(2 * BATCH, seed=1).tensors
    x[-1, 0, 0, 0] = value
    return DataLoader(TensorDataset(x, y), BATCH)


class NotFiniteTraining(Classifier):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def train_dataloader(self) -> DataLoader:
        return not_finite(self.value)


class NotFiniteValidation(NotFiniteTraining):
    train_dataloader = Classifier.train_dataloader

    def val_dataloader(self) -> DataLoader:
        return not_finite(self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_while_calibrating(value: float, folder: Path) -> None:
    with pytest.raises(CalibrationError, match=r"Expected finite values at \S*x"):
        fit(NotFiniteValidation(value), PostTrainingQuantization(output_dir=folder, calibration={"data": "validation"}))
    assert not (folder / "manifest.json").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_while_observing(value: float, folder: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=folder, schedule=Schedule(0, 1, 2, 2, unit="steps"))
    with pytest.raises(CalibrationError, match=r"Expected finite values at \S*x"):
        fit(NotFiniteTraining(value), callback)
    assert not (folder / "manifest.json").exists()


# --- the schedule


def test_schedule_that_never_reaches_fake_quantization(folder: Path) -> None:
    schedule = {"observe": 0, "fake_quantize": 1, "freeze_observers": 2, "freeze_batch_norm": 3, "unit": "epochs"}
    callback = QuantizationAwareTraining(output_dir=folder, schedule=schedule)
    refuse(callback, r"`schedule` to reach fake quantization in this run, .* 1 epochs .* Train longer or begin earlier")


def test_fractions_of_an_endless_run(folder: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=folder)
    refuse(callback, r"run of known length.*'epochs' or 'steps'", max_epochs=-1)


@pytest.mark.parametrize(
    "schedule",
    [{"unit": "batches"}, {"fake_quantize": 1.5, "freeze_observers": 2, "freeze_batch_norm": 2}, {"observe": 0.9}],
)
def test_schedule_that_is_wrong_in_itself(schedule: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="schedule"):
        QuantizationAwareTraining(schedule=schedule)


def test_other_stages_are_not_checked(kind: Kind, folder: Path) -> None:
    folder.mkdir()
    (folder / "other.txt").write_text("not ours")
    trainer = make_trainer(kind(module="nett", output_dir=folder))

    assert trainer.validate(Classifier(), verbose=False)
