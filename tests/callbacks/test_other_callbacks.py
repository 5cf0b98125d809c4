"""Beside other callbacks of Lightning, in either order of the list."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import (
    BATCH,
    NUM_TRAIN,
    Classifier,
    ConvNet,
    decibels,
    equal_tensors,
    fit,
    images,
    make_trainer,
    seeded,
    tensors_of,
)
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]
in_either_order = pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "ours-last"])


class AtTrainEnd(Callback):
    """Keeps what training ended with, after every other callback."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.tensors = tensors_of(pl_module)


def fit_beside(kind: Any, folder: Path, ours_first: bool, other: Any, module: Any = None, **options: Any) -> Any:
    """Fit beside another callback, check the artifact against the module, and return the callback and the module."""
    arguments = options.pop("arguments", {})
    callback = kind(output_dir=folder / "artifact", evaluate=False, **arguments)
    module = seeded() if module is None else module
    keep = AtTrainEnd()
    callbacks = [callback, other] if ours_first else [other, callback]
    fit(module, *callbacks, keep, default_root_dir=folder, **({"max_epochs": 3} | options))
    x = images(BATCH, seed=1).tensors[0]

    assert equal_tensors(tensors_of(module), keep.tensors)
    assert not any("forward" in child.__dict__ for child in module.modules())
    with torch.no_grad():
        assert decibels(module.net.eval()(x), load(folder / "artifact")(x)) > 15
    return callback, module


@in_either_order
@feature("Other callbacks", "EMAWeightAveraging")
def test_exponential_average(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this version of Lightning has no EMAWeightAveraging")
    _, module = fit_beside(kind, tmp_path, ours_first, callbacks.EMAWeightAveraging(decay=0.5))
    plain = seeded()
    fit(plain, max_epochs=3)

    assert not torch.equal(module.net.conv1.weight, plain.net.conv1.weight)


@in_either_order
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen-batch-norm"])
@feature("Other callbacks", "StochasticWeightAveraging", note="also with `freeze_batch_norm`")
def test_stochastic_weight_averaging(kind: Any, ours_first: bool, freeze: bool, tmp_path: Path) -> None:
    schedule = {"fake_quantize": 4, "freeze_observers": 10, "unit": "steps"}
    if freeze and kind is PostTrainingQuantization:
        pytest.skip("nothing to freeze in post-training quantization")
    if freeze:
        schedule["freeze_batch_norm"] = 10
    arguments = {"schedule": schedule} if kind is QuantizationAwareTraining else {}
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=1)
    callback, module = fit_beside(kind, tmp_path, ours_first, averaging, max_epochs=4, arguments=arguments)
    x, y = images(NUM_TRAIN, seed=1).tensors

    # Its last epoch measures the statistics of BatchNorm for the averaged weights; reset ones would be 0 and 1.
    with torch.no_grad():
        features = module.net.conv1(x)
    assert torch.allclose(module.net.bn1.running_mean, features.mean((0, 2, 3)), atol=0.02)
    with torch.no_grad():
        assert (load(callback.artifact.path)(x).argmax(1) == y).float().mean() > 0.8


@in_either_order
@feature("Other callbacks", "ModelPruning: zeros stay zero in the artifact")
def test_pruning(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    module = seeded()
    pruning = ModelPruning("l1_unstructured", [(module.net.conv2, "weight")], amount=0.5, apply_pruning=_first_epoch)
    callback, _ = fit_beside(kind, tmp_path, ours_first, pruning, module)
    weights = [numpy_helper.to_array(item) for item in onnx.load(callback.artifact.model_path).graph.initializer]
    (exported,) = [weight for weight in weights if weight.shape == (4, 4, 3, 3)]

    assert (module.net.conv2.weight == 0).sum() == 72
    assert (exported[(module.net.conv2.weight == 0).numpy()] == 0).all()
    assert (exported != 0).sum() > 50


def _first_epoch(epoch: int) -> bool:
    return epoch == 0


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net.conv1)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net.conv1, optimizer)


class TrainsWhatLearns(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), self.lr)


@in_either_order
@feature("Other callbacks", "BaseFinetuning")
def test_finetuning(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    before = seeded().net.conv1.weight.clone()
    _, module = fit_beside(kind, tmp_path, ours_first, Unfreezing(), seeded(TrainsWhatLearns))

    assert not torch.equal(module.net.conv1.weight, before)


class WithBackbone(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.net = nn.Sequential(self.backbone, nn.Linear(256, 4))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), self.lr)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
@in_either_order
@feature("Other callbacks", "BackboneFinetuning")
def test_backbone_finetuning(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    finetuning = BackboneFinetuning(1, lambda epoch: 1.0, verbose=False)
    _, module = fit_beside(kind, tmp_path, ours_first, finetuning, seeded(WithBackbone))

    assert not torch.equal(module.backbone[0].weight, seeded(WithBackbone).backbone[0].weight)


@in_either_order
@feature("Other callbacks", "GradientAccumulationScheduler")
def test_accumulation_schedule(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    fit_beside(kind, tmp_path, ours_first, GradientAccumulationScheduler({0: 1, 1: 2}))


@in_either_order
@feature("Other callbacks", "LearningRateFinder")
def test_learning_rate_finder_sees_the_float_model_and_moves_no_range(
    kind: Any, ours_first: bool, tmp_path: Path
) -> None:
    options = {"max_epochs": 6, "enable_checkpointing": True}
    plain = seeded()
    fit(
        plain,
        LearningRateFinder(num_training_steps=20, early_stop_threshold=None),
        default_root_dir=tmp_path,
        **options,
    )
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    callback, module = fit_beside(kind, tmp_path, ours_first, finder, **options)

    assert module.lr == plain.lr != 0.02
    if kind is QuantizationAwareTraining:
        # 24 batches, of which the last fifth moves nothing: the twenty of the finder are not among them.
        assert {state["num_updates"] for state in callback.state_dict()["observers"].values()} == {20}


class SizedBatches(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 2

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(NUM_TRAIN, seed=1), self.batch_size)


@in_either_order
@feature("Other callbacks", "BatchSizeFinder")
def test_batch_size_finder(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    finder = BatchSizeFinder(max_trials=2, steps_per_trial=1)
    _, module = fit_beside(kind, tmp_path, ours_first, finder, seeded(SizedBatches), enable_checkpointing=True)

    assert module.batch_size > 2


@in_either_order
@feature("Other callbacks", "EarlyStopping")
def test_early_stopping(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    module = seeded(best_epoch=1)
    schedule = {"fake_quantize": 1, "freeze_observers": 2, "unit": "epochs"}
    arguments = {"schedule": schedule} if kind is QuantizationAwareTraining else {}
    stopping = EarlyStopping("score", mode="max", patience=1)
    callback, _ = fit_beside(kind, tmp_path, ours_first, stopping, module, max_epochs=20, arguments=arguments)

    assert stopping.stopped_epoch == 2
    assert callback.artifact is not None


@in_either_order
@feature("Other callbacks", "ModelCheckpoint(save_last=True, save_top_k=2)")
def test_model_checkpoint(kind: Any, ours_first: bool, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "ckpt", monitor="val_loss", save_top_k=2, save_last=True)
    _, module = fit_beside(kind, tmp_path, ours_first, saving, enable_checkpointing=True)
    restored = Classifier.load_from_checkpoint(saving.last_model_path, weights_only=True)

    assert equal_tensors(tensors_of(restored), tensors_of(module))
    assert len(saving.best_k_models) == 2


# --- two of ours


class TwoNets(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.other = ConvNet()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + nn.functional.cross_entropy(self.other(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("other_loss", nn.functional.cross_entropy(self.other(batch[0]), batch[1]))


@feature("Two of our callbacks", "on two modules of one LightningModule")
def test_two_callbacks_on_two_modules(kind: Any, tmp_path: Path) -> None:
    first, second = (kind(module=name, output_dir=tmp_path / name) for name in ("net", "other"))
    module = seeded(TwoNets)
    fit(module, first, second, max_epochs=2)
    x = images(BATCH, seed=1).tensors[0]
    metrics = [{row["name"]: row for row in c.artifact.report["metrics"]} for c in (first, second)]

    with torch.no_grad():
        assert decibels(module.net.eval()(x), load(tmp_path / "net")(x)) > 15
        assert decibels(module.other.eval()(x), load(tmp_path / "other")(x)) > 15
    # Each measures its own module in integers and the other in float.
    assert metrics[0]["other_loss"]["artifact"] == metrics[0]["other_loss"]["float_value"]
    assert metrics[1]["other_loss"]["artifact"] != metrics[1]["other_loss"]["float_value"]


@feature("Two of our callbacks", "two recipes for one module", only="PTQ")
def test_two_recipes_for_one_module(tmp_path: Path) -> None:
    first = PostTrainingQuantization(output_dir=tmp_path / "a", evaluate=False)
    second = PostTrainingQuantization("int8_reduce_range", output_dir=tmp_path / "b", evaluate=False)
    fit(seeded(), first, second)

    assert first.artifact.manifest["recipe"] == "int8"
    assert second.artifact.manifest["recipe"] == "int8_reduce_range"


@feature(
    "Two of our callbacks",
    "two recipes for one module",
    only="QAT",
    refused="weights can be trained through one rounding; PTQ makes the other artifact",
)
def test_two_trainings_of_one_module_are_refused(tmp_path: Path) -> None:
    first = QuantizationAwareTraining(output_dir=tmp_path / "a")
    second = QuantizationAwareTraining("int8_reduce_range", output_dir=tmp_path / "b")
    module = seeded()
    with pytest.raises(MisconfigurationException, match=r"one rounding each.*'net'.*PostTrainingQuantization"):
        fit(module, first, second)

    assert equal_tensors(tensors_of(module), tensors_of(seeded()))
    assert "forward" not in module.net.__dict__


@feature("Two of our callbacks", "one folder for both", refused="one artifact would replace the other")
def test_one_folder_for_two_artifacts_is_refused(kind: Any, tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="`output_dir` of its own"):
        make_trainer(kind(output_dir=tmp_path), PostTrainingQuantization(output_dir=tmp_path)).fit(seeded())
