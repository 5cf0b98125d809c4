"""A validation beside another sees the same batches and the same random numbers, and leaves no trace."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning_models import Classifier, images, seeded
from scored_runs import BOTH, make, trained, without_scores
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks.base import QuantizationCallback

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Odd(Classifier):
    """Validates in ways of its own: two loaders, random numbers, batches that change, values logged at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.loaders_read = 0

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        x = batch.pop(0)
        x.mul_(0.8).add_(0.2 * torch.randn_like(x))
        output = self.net(x)
        self.outputs.append(output)
        self.accuracy(output, batch[0])
        self.log("val_loss", F.cross_entropy(output, batch[0]), on_step=True, on_epoch=True, prog_bar=True)
        self.log("val_accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log("val_spread", torch.cat(self.outputs).std())
        self.outputs.clear()

    def val_dataloader(self) -> Any:
        # Another subset in each validation.
        return [DataLoader(images(40, seed=seed), 8, shuffle=True) for seed in (2, 3)]


@BOTH
@pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled")
def test_scores_are_of_the_very_batches_and_random_numbers_of_validation(
    kind: type[QuantizationCallback], tmp_path: Path
) -> None:
    options = {"max_epochs": 2, "limit_val_batches": 3, "num_sanity_val_steps": 2}
    plain = trained(seeded(Odd), make(kind, tmp_path, score_every=None), **options)
    scored = trained(seeded(Odd), make(kind, tmp_path), **options)
    assert without_scores(scored) == plain
    assert not any("twin" in name for name in scored[0])  # of the sanity check
    for one in scored[1:]:
        for name in ("val_spread", *(f"val_{n}/dataloader_idx_{i}" for n in ("loss", "accuracy") for i in (0, 1))):
            assert one[f"quant/twin/{name}"] - one[name] == pytest.approx(
                one[f"quant/twin_delta/{name}"] if kind is PostTrainingQuantization else 0, abs=1e-6
            )
            # Other batches, or noise of its own, would be much further away.
            assert abs(one[f"quant/twin_delta/{name}"]) < 0.05
        assert one["quant/twin/val_loss_epoch/dataloader_idx_1"] == one["quant/twin/val_loss/dataloader_idx_1"]
