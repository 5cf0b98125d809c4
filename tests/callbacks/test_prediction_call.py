"""`predict_step` may ask for another computation than validation: the report says which one the artifact is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import fit, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import PostTrainingQuantization, load

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, stage: str = "fit") -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        return y.softmax(-1) if stage == "predict" else y


class _Task(LightningModule):
    stage = "predict"

    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0], stage=self.stage)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))), 8)

    val_dataloader = train_dataloader


class _Alike(_Task):
    stage = "fit"


class _Otherwise(_Task):
    """Takes batches that only a loader of its own would give."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["image"], stage="predict")


def _notes(callback: PostTrainingQuantization) -> list[str]:
    assert callback.artifact is not None
    report: Any = callback.artifact.report
    return [note for note in report["notes"] if "predict" in note]


@pytest.mark.parametrize(("kind", "is_said"), [(_Task, True), (_Alike, False), (_Otherwise, False)])
def test_another_call_of_predict_is_said_with_what_to_type(
    kind: type[LightningModule], is_said: bool, tmp_path: Path
) -> None:
    callback = PostTrainingQuantization("int8_dynamic", output_dir=tmp_path / "artifact")
    fit(seeded(kind), callback)
    assert bool(_notes(callback)) == is_said
    if is_said:
        assert "`stage` is 'predict' where the exported call has 'fit'" in _notes(callback)[0]
        assert "`example='predict_batch'` with `evaluate=False`" in _notes(callback)[0]


def test_the_call_of_predict_is_exported_when_it_is_asked_for(tmp_path: Path) -> None:
    options: Any = {"example": "predict_batch", "output_dir": tmp_path / "artifact"}
    with pytest.raises(
        MisconfigurationException, match=r"`stage` is 'fit' where predict has 'predict'.*evaluate=False"
    ):
        fit(seeded(_Task), PostTrainingQuantization("int8", **options))
    callback = PostTrainingQuantization("int8", evaluate=False, **options)
    model = seeded(_Task)
    fit(model, callback)
    x = torch.randn(5, 8)
    answer = load(tmp_path / "artifact")(x, stage="predict")
    torch.testing.assert_close(answer, model.eval().net(x, stage="predict"), rtol=0.0, atol=0.05)


def test_a_predict_step_that_calls_nothing_is_no_example(tmp_path: Path) -> None:
    callback = PostTrainingQuantization("int8", example="predict_batch", output_dir=tmp_path / "artifact")
    with pytest.raises(MisconfigurationException, match=r"Expected `predict_step` of _Otherwise to call 'net'"):
        fit(seeded(_Otherwise), callback)


def test_inside_the_users_own_module_both_calls_are_answered(tmp_path: Path) -> None:
    callback = PostTrainingQuantization("int8_dynamic", "torch", output_dir=tmp_path / "artifact")
    fit(seeded(_Task), callback)
    assert "`load(path, into=...)` answers both" in _notes(callback)[0]
    assert torch.allclose(
        load(tmp_path / "artifact", into=_Net())(torch.ones(2, 8), stage="predict").sum(1), torch.ones(2)
    )
