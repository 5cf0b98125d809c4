"""Every flow of the callbacks on a device that is not the CPU: each ends with an artifact, measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning_models import Classifier, ConvNet, fit, make_trainer, seeded
from torch import Tensor, nn

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, verify

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:.*ou passed .*precision.*:UserWarning"),
]

SCHEDULE = {"observe": 0, "fake_quantize": 1, "freeze_observers": 3, "freeze_batch_norm": 4, "unit": "steps"}
QAT, PTQ = QuantizationAwareTraining, PostTrainingQuantization
LAYER_RECIPES = ("int8_dynamic", "int8_weight_only", "int4_weight_only", "float16", "bfloat16")
QUICK = {("int8_dynamic", "onnxruntime"), ("int8_weight_only", "torch")}


def check(callback: Any) -> None:
    """Make sure that there is an artifact which computes what it did when it was written, with true metrics."""
    artifact = callback.artifact
    assert artifact is not None
    assert artifact.plan["coverage"] > 0.5
    assert verify(artifact.path).identical
    metrics = {row["name"]: row for row in artifact.report["metrics"]}
    loss = metrics["val_loss"]
    expected = loss["float_value"] if loss["simulated"] is None else loss["simulated"]
    assert loss["artifact"] == pytest.approx(expected, rel=0.1)
    assert not [warning for warning in artifact.report["warnings"] if "parity" in warning.lower()]


def trained(where: Any, folder: Path, *, precision: str = "32-true", **arguments: Any) -> QuantizationAwareTraining:
    callback = QuantizationAwareTraining(output_dir=folder / "artifact", schedule=SCHEDULE, **arguments)
    fit(seeded(), callback, max_epochs=2, **where.options(precision))
    return callback


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_training_in_each_precision(where: Any, tmp_path: Path, precision: str) -> None:
    check(trained(where, tmp_path, precision=precision))


def test_training_of_learned_steps(where: Any, tmp_path: Path) -> None:
    check(trained(where, tmp_path, recipe="int4_weights"))


def test_batch_norm_is_measured_anew(where: Any, tmp_path: Path) -> None:
    recipe = {"name": "with_batch_norm", "batch_norm_batches": 2}
    check(trained(where, tmp_path, recipe=recipe, sensitivity=True))


class WithIslands(nn.Module):
    """Its own forward counts in Python, so that only its parts can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvNet(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(x.size(1) // 4):
            x = self.second(x)
        return x


@pytest.mark.slow
def test_training_of_islands(where: Any, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(runtime="torch", output_dir=tmp_path / "artifact", schedule=SCHEDULE)
    fit(seeded(net=WithIslands()), callback, max_epochs=2, **where.options())
    check(callback)


def test_best_weights(where: Any, tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=SCHEDULE, weights="best")
    saving = ModelCheckpoint(tmp_path / "checkpoints", monitor="score", mode="max")
    fit(seeded(best_epoch=1), callback, saving, max_epochs=3, enable_checkpointing=True, **where.options())
    check(callback)
    assert any("best ones" in note for note in callback.artifact.report["notes"])


@pytest.mark.parametrize("recipe", ["int8", pytest.param("int4_weights", marks=pytest.mark.slow)])
@pytest.mark.parametrize("to_device", [True, False])
def test_resuming_on_another_device(where: Any, tmp_path: Path, recipe: str, to_device: bool) -> None:
    here = {"accelerator": "cpu"}
    places = [here, where.options()] if to_device else [where.options(), here]
    arguments = {"recipe": recipe, "output_dir": tmp_path / "artifact", "schedule": SCHEDULE}
    first = QuantizationAwareTraining(**arguments, evaluate=False)
    trainer = fit(seeded(), first, max_epochs=1, **places[0])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = QuantizationAwareTraining(**arguments)
    trainer = make_trainer(second, max_epochs=2, **places[1])
    trainer.fit(seeded(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 8
    check(second)


class Asking(nn.BatchNorm2d):
    """A BatchNorm with an activation, in the way of timm's: its forward asks what it is given."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__(channels)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        assert x.device == self.weight.device
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(nn.functional.batch_norm(x, *statistics, self.training, 0.1, self.eps))


class InvertedResidual(nn.Module):
    """A depthwise convolution between two others, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(1, 8, 3), Asking(8, nn.ReLU())
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), Asking(8, nn.ReLU())
        self.last, self.norm3 = nn.Conv2d(8, 8, 1), Asking(8, nn.Identity())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.first(x))
        x = x + self.norm3(self.last(self.norm2(self.depthwise(x))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("recipe", ["int8", "int8_accurate"])
def test_calibration(where: Any, tmp_path: Path, recipe: str) -> None:
    callback = PostTrainingQuantization(recipe, output_dir=tmp_path / "artifact", sensitivity=True)
    fit(seeded(net=InvertedResidual()), callback, **where.options())
    check(callback)
    assert callback.artifact.report["sensitivity"]["layers"]


@pytest.mark.parametrize(
    ("recipe", "runtime"),
    [
        pytest.param(recipe, runtime, marks=() if (recipe, runtime) in QUICK else pytest.mark.slow)
        for recipe in LAYER_RECIPES
        for runtime in ("onnxruntime", "torch")
    ],
)
def test_recipes_of_layers(where: Any, tmp_path: Path, recipe: str, runtime: str) -> None:
    callback = PostTrainingQuantization(recipe, runtime, output_dir=tmp_path / "artifact")
    fit(seeded(net=Readers()), callback, **where.options())
    check(callback)


class Readers(nn.Module):
    """A recurrent layer, attention and a linear layer over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.lstm(x.squeeze(1))
        mixed, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.head(mixed.mean(1))


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_static_recipe_on_other_runtimes(where: Any, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    callback = PostTrainingQuantization("int8", runtime, output_dir=tmp_path / "artifact")
    fit(seeded(), callback, **where.options())
    check(callback)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [QAT, PTQ])
def test_runtime_by_measurement(where: Any, tmp_path: Path, kind: Any) -> None:
    callback = kind(runtime="auto", output_dir=tmp_path / "artifact")
    fit(seeded(), callback, **where.options())
    check(callback)


def test_quantizing_a_checkpoint(where: Any, tmp_path: Path) -> None:
    training = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=SCHEDULE, evaluate=False)
    trainer = fit(seeded(), training, max_epochs=2, **where.options())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for kind in (QAT, PTQ):
        callback = kind(output_dir=tmp_path / kind.__name__)
        callback.quantize_checkpoint(tmp_path / "last.ckpt", seeded(seed=1), **where.options())
        check(callback)


class Adversarial(Classifier):
    """A generator and a critic, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 64))
        self.critic = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        for index, optimizer in enumerate(self.optimizers()):
            made = self.generator(torch.randn(len(x), 4, device=self.device))
            score = self.critic(made).mean()
            optimizer.zero_grad()
            self.manual_backward(-score if index == 0 else score - self.critic(x.flatten(1)).mean())
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        made = self.generator(torch.ones(len(x), 4, device=self.device))
        self.log("val_loss", (made - x.flatten(1)).square().mean() + self.critic(x.flatten(1)).mean())

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters()) for part in (self.generator, self.critic)]


@pytest.mark.slow
def test_two_callbacks_of_an_adversarial_pair(where: Any, tmp_path: Path) -> None:
    callbacks = [
        QuantizationAwareTraining(module="generator", output_dir=tmp_path / "generator", schedule=SCHEDULE),
        PostTrainingQuantization(module="critic", output_dir=tmp_path / "critic"),
    ]
    fit(seeded(Adversarial), *callbacks, max_epochs=2, **where.options())
    for callback in callbacks:
        check(callback)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [QAT, PTQ])
def test_exponential_average(where: Any, tmp_path: Path, kind: Any) -> None:
    arguments = {"schedule": SCHEDULE} if kind is QAT else {}
    callback = kind(output_dir=tmp_path / "artifact", **arguments)
    fit(seeded(), EMAWeightAveraging(decay=0.5), callback, max_epochs=2, **where.options())
    check(callback)


# PyTorch's compiler looks at gradients of whatever tensors it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("kind", "whole"),
    [
        (PTQ, False),
        pytest.param(QAT, False, marks=pytest.mark.slow),
        pytest.param(PTQ, True, marks=pytest.mark.slow),
        pytest.param(QAT, True, marks=pytest.mark.slow),
    ],
)
def test_under_a_compiler(where: Any, tmp_path: Path, kind: Any, whole: bool) -> None:
    module: Any = seeded()
    if not whole:
        module.net = torch.compile(module.net, backend="eager")
    compiled: LightningModule = torch.compile(module, backend="eager") if whole else module  # type: ignore[assignment]
    arguments = {"schedule": SCHEDULE} if kind is QAT else {}
    callback = kind(output_dir=tmp_path / "artifact", **arguments)
    fit(compiled, callback, max_epochs=2, **where.options())
    check(callback)
