"""Batches that are kept are those that calibration would draw, and steps leave them as they are."""

import torch
from lightning_models import Classifier, make_trainer, seeded
from torch.utils.data import DataLoader

from lightning_quant.callbacks.kept_batches import KeptBatches
from lightning_quant.callbacks.training_data import batches, independent_copy
from lightning_quant.capture.capture import isolated_rng


class Shuffled(Classifier):
    def training_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
        batch[0].mul_(0)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(super().train_dataloader().dataset, 8, shuffle=True)


def test_kept_batches_are_those_of_calibration_whatever_steps_do_to_them() -> None:
    module, trainer = seeded(Shuffled), make_trainer(max_epochs=0)
    trainer.fit(module)
    before = torch.get_rng_state()
    kept = KeptBatches.of(trainer, module, 3, 7, "train")
    assert torch.equal(torch.get_rng_state(), before)
    with isolated_rng(7):
        drawn = [batch[0] for batch in batches(trainer, module, 3)]
    for _ in range(2):
        for step in kept.steps(independent_copy(trainer, module)):
            step()
    assert all(torch.equal(batch[0], other) for batch, other in zip(kept.batches, drawn, strict=True))
