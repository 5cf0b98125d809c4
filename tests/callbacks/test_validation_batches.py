"""What validation will call is looked at before training: batches from everywhere in its data, the last among them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import fit, make_trainer, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_quant import PostTrainingQuantization, load
from lightning_quant.callbacks.validation_batches import spread_batches, validation_calls

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class _Net(nn.Module):
    """Goes another way for large values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if x.abs().max() > 10:
            y = y * 0.5
        return self.second(y)


class _Means(_Net):
    """Averages over sequences."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).mean(1)


class _Task(LightningModule):
    def __init__(self, net: type[nn.Module] = _Net, validation: Any = None, training: Any = None) -> None:
        super().__init__()
        self.net, self.validation, self.training_data = net(), validation, training
        self.num_steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_steps += 1
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(_values(32)), 8) if self.training_data is None else self.training_data

    def val_dataloader(self) -> Any:
        return self.validation


def _values(number: int, *shape: int) -> Tensor:
    return torch.randn(number, *(shape or (8,)), generator=torch.Generator().manual_seed(number))


def _decides_late() -> DataLoader:
    values = _values(60)
    values[52] = 20.0
    return DataLoader(TensorDataset(values), 8)


class _Sequences(IterableDataset):
    """Batches whose length differs."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __iter__(self) -> Any:
        return iter([(_values(4, length, 8),) for length in self.lengths])


def test_what_a_later_batch_decides_otherwise_is_refused_before_training(tmp_path: Path) -> None:
    module = seeded(_Task, validation=_decides_late())
    with pytest.raises(MisconfigurationException) as caught:
        fit(module, PostTrainingQuantization("int8", output_dir=tmp_path / "artifact"))
    text = str(caught.value)
    assert "`if x.abs().max() > 10:` reads False" in text
    assert "a batch has `if x.abs().max() > 10:` reads True" in text
    assert '`runtime="torch"`' in text
    assert module.num_steps == 0


def test_inside_the_users_own_module_it_decides_as_it_likes(tmp_path: Path) -> None:
    callback = PostTrainingQuantization("int8_dynamic", "torch", output_dir=tmp_path / "artifact")
    fit(seeded(_Task, validation=_decides_late()), callback)
    (row,) = callback.artifact.report["metrics"]  # type: ignore[union-attr, index]
    assert row["artifact"] == pytest.approx(row["float_value"], rel=0.05)
    filled = load(tmp_path / "artifact", into=_Net())
    assert torch.isfinite(filled(torch.full((2, 8), 20.0))).all()


def test_lengths_of_later_batches_may_vary_in_the_file(tmp_path: Path) -> None:
    loaders = {name: DataLoader(_Sequences(n), None) for name, n in {"training": [5] * 4, "validation": [5, 9]}.items()}
    callback = PostTrainingQuantization("int8", output_dir=tmp_path / "artifact")
    fit(seeded(_Task, net=_Means, **loaders), callback)
    (row,) = callback.artifact.report["metrics"]  # type: ignore[union-attr, index]
    assert row["artifact"] == pytest.approx(row["float_value"], rel=0.1)
    assert load(tmp_path / "artifact")(_values(3, 7, 8)).shape == (3, 8)


@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_chosen_batches_are_spread_over_each_loader_and_leave_it_as_it_was(tmp_path: Path) -> None:
    first = DataLoader(TensorDataset(torch.arange(76.0).reshape(38, 2)), 4)
    shuffled = DataLoader(TensorDataset(_values(12)), 5, shuffle=True, generator=torch.Generator().manual_seed(3))
    module = seeded(_Task, validation=[first, shuffled])
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module)
    trainer.fit_loop.setup_data()
    before = shuffled.generator.get_state()
    found = [(tuple(batch[0].shape), index, loader) for batch, index, loader in spread_batches(trainer, module, 4)]
    assert found == [
        ((4, 2), 0, 0), ((4, 2), 3, 0), ((4, 2), 6, 0), ((2, 2), 9, 0),
        ((5, 8), 0, 1), ((5, 8), 1, 1), ((2, 8), 2, 1),
    ]  # fmt: skip
    assert torch.equal(before, shuffled.generator.get_state())


def test_a_step_that_fails_tells_nothing(tmp_path: Path) -> None:
    class Failing(_Task):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if batch_idx:
                raise RuntimeError("not before its time")

    module = seeded(Failing, validation=_decides_late())
    trainer = make_trainer()
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module)
    trainer.fit_loop.setup_data()
    assert 1 <= len(validation_calls(trainer, module, "net", 4)) <= 2
