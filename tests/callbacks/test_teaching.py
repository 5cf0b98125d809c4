"""`distill=` in a run: weights learn from the float forward, and nothing else knows of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, EnoughError, StopAfterTraining, equal_tensors, make_trainer, seeded, tensors_of
from torch import Tensor

from lightning_quant import QuantizationAwareTraining
from lightning_quant.callbacks.teaching import _factor
from lightning_quant.simulate.distillation import Distill

SCHEDULE = {"fake_quantize": 1, "freeze_observers": 3, "unit": "epochs"}


def ended(tmp_path: Path, distill: Any, *, epochs: int = 2, ckpt_path: Any = None, **options: Any) -> dict[str, Tensor]:
    module = seeded()
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


def test_what_it_adds_is_scaled_as_the_loss_is() -> None:
    scaler = SimpleNamespace(get_scale=lambda: 512.0)
    trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=scaler),
        accumulate_grad_batches=4,
    )
    assert _factor(trainer) == 128.0


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        return loss


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
