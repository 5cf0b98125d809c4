"""`distill=` in a run: weights learn from the float forward, and nothing else knows of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import (
    Classifier,
    EnoughError,
    StopAfterTraining,
    equal_tensors,
    images,
    make_trainer,
    seeded,
    tensors_of,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import QuantizationAwareTraining
from lightning_quant.callbacks.teaching import _factor
from lightning_quant.simulate.distillation import Distill

SCHEDULE = {"fake_quantize": 1, "freeze_observers": 3, "unit": "epochs"}


def ended(
    tmp_path: Path,
    distill: Any,
    *,
    kind: type[Classifier] = Classifier,
    epochs: int = 2,
    ckpt_path: Any = None,
    **options: Any,
) -> dict[str, Tensor]:
    module = seeded(kind)
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", distill=distill, schedule=SCHEDULE)
    keep = ModelCheckpoint(tmp_path, f"{distill}-{epochs}".replace("{", "").replace("}", ""))
    settings = {"max_epochs": epochs, "enable_checkpointing": True, **options}
    with pytest.raises(EnoughError):
        make_trainer(callback, keep, StopAfterTraining(), **settings).fit(module, ckpt_path=ckpt_path)
    return tensors_of(module)


def test_weights_learn_from_it_and_checkpoints_do_not_know_of_it(tmp_path: Path) -> None:
    plain, none, taught = (ended(tmp_path, distill) for distill in (None, 0.0, 5.0))
    assert equal_tensors(plain, none)
    assert not equal_tensors(plain, taught)
    saved = [torch.load(tmp_path / f"{name}-2.ckpt", weights_only=True) for name in ("None", "5.0")]
    assert saved[0].keys() == saved[1].keys()
    assert saved[0]["state_dict"].keys() == saved[1]["state_dict"].keys()
    assert len(saved[0]["optimizer_states"][0]["state"]) == len(saved[1]["optimizer_states"][0]["state"])
    # Resumed at the end of an epoch, it goes on as if nothing had been.
    whole = ended(tmp_path, 5.0, epochs=3)
    assert equal_tensors(ended(tmp_path, 5.0, epochs=3, ckpt_path=tmp_path / "5.0-2.ckpt"), whole)


class WithLoss(nn.Module):
    """Computes its loss itself, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Asking(Classifier):
    def __init__(self) -> None:
        super().__init__(WithLoss())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(*batch)["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(*batch)["loss"])


@feature("Modules", "`distill=` where the module computes its loss itself", only="QAT")
def test_a_module_that_computes_its_loss_itself_is_taught(tmp_path: Path) -> None:
    plain, taught = (ended(tmp_path, distill, kind=Asking) for distill in (None, {"weight": 2.0, "temperature": 2.0}))
    assert not equal_tensors(plain, taught)
    assert all(tensor.isfinite().all() for tensor in taught.values())


def test_what_it_adds_is_scaled_as_the_loss_is() -> None:
    scaler = SimpleNamespace(get_scale=lambda: 512.0)
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler),
        accumulate_grad_batches=4,
    )
    assert _factor(trainer) == 128.0


class Alike(Classifier):
    """Learns from the teacher alone, from the same batch again and again."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0

    def train_dataloader(self) -> DataLoader:
        x, y = images(4, seed=1).tensors
        return DataLoader(TensorDataset(x.repeat(8, 1, 1, 1), y.repeat(8)), 4)


class Compiled(Alike):
    """Compiles what is taught."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Gradients(Callback):
    """Keeps the gradients of the first step through rounding, as the optimizer gets them."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback, self.seen = callback, Tensor()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.callback.require_prepared().quantizes and self.seen.numel() == 0:
            self.seen = torch.cat([p.grad.flatten() for p in pl_module.parameters()])


def taught(tmp_path: Path, kind: type[Alike] = Alike, **options: Any) -> Tensor:
    schedule = {"fake_quantize": 4, "freeze_observers": 4, "unit": "steps"}
    callback = QuantizationAwareTraining(
        {"name": "coarse", "weight": {"bits": 3}},
        output_dir=tmp_path,
        module="net",
        distill={"weight": 5.0, "layers": ["0"]},
        schedule=schedule,
    )
    gradients = Gradients(callback)
    with pytest.raises(EnoughError):
        make_trainer(callback, gradients, StopAfterTraining(), max_epochs=2, **options).fit(seeded(kind))
    assert gradients.seen.abs().max() > 0
    return gradients.seen


@pytest.mark.slow
@feature("Modules", "`distill=` with `torch.compile`", only="QAT")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_module_is_taught_the_same(tmp_path: Path) -> None:
    torch.testing.assert_close(taught(tmp_path, Compiled), taught(tmp_path))


@pytest.mark.slow
@feature("Optimizers", "`distill=` with accumulated gradients", only="QAT")
def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path) -> None:
    torch.testing.assert_close(taught(tmp_path, accumulate_grad_batches=2), taught(tmp_path))


@pytest.mark.slow
@feature("Precision", "`distill=` in `bf16-mixed` and `16-mixed`", only="QAT")
@pytest.mark.parametrize("scale", [None, 512.0])
def test_half_precision_is_taught_nearly_the_same(scale: float | None, tmp_path: Path) -> None:
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    kind = "bf16-mixed" if scale is None else "16-mixed"
    half = taught(tmp_path, plugins=MixedPrecision(kind, "cpu", scaler))
    full = taught(tmp_path)
    assert float((half - full).norm() / full.norm()) < 0.1


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        return loss


@feature("Optimizers", "`distill=` with manual optimization", only="QAT", refused="losses have a scale of their own")
def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path, distill=0.5)
    with pytest.raises(MisconfigurationException, match="Expected automatic optimization with `distill`"):
        make_trainer(callback).fit(seeded(Manual))


def test_layers_inside_are_taught_too_and_wrong_names_are_refused(tmp_path: Path) -> None:
    outputs, inside = (ended(tmp_path, {"weight": 5.0, "layers": layers}) for layers in ([], ["conv*"]))
    assert not equal_tensors(outputs, inside)
    callback = QuantizationAwareTraining(output_dir=tmp_path / "other", distill={"layers": ["convolution"]})
    with pytest.raises(MisconfigurationException, match=r"`distill.layers` to match layers .* matches none of conv1"):
        make_trainer(callback).fit(seeded())


def test_it_is_an_argument_of_training_through_rounding() -> None:
    callback = QuantizationAwareTraining(distill={"weight": 0.3, "temperature": 2.0})
    assert callback.settings.distill == Distill(0.3, 2.0)
    assert eval(repr(callback), {"QuantizationAwareTraining": QuantizationAwareTraining}).settings == callback.settings
