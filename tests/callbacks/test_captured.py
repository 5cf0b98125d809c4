"""What fit start sees: the call of training, what lies beside it, and the module that validation calls as well."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback
from lightning_models import Classifier, make_trainer

from lightning_quant.callbacks.captured import Captured, look_at_module
from lightning_quant.callbacks.ptq import CalibrationSettings


class Looking(Callback):
    """Looks when fit begins."""

    def __init__(self) -> None:
        self.seen: list[Captured] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for example in ("train_batch", "example_input_array"):
            self.seen.append(look_at_module(trainer, pl_module, CalibrationSettings(example=example), together=False))  # type: ignore[arg-type]


class Called(Classifier):
    def forward(self, x: Any) -> Any:
        return self.net(x)


def test_the_call_of_training_what_is_beside_it_and_what_is_exported_are_seen() -> None:
    model, looking = Called(), Looking()
    model.example_input_array = next(iter(model.train_dataloader()))[0]
    make_trainer(looking, limit_train_batches=1, limit_val_batches=1).fit(model)
    of_batch, of_example = looking.seen
    assert of_batch.captured.path == "net"
    assert of_batch.step is not None
    assert of_batch.step.share == 1.0
    assert of_batch.exported.evaluated is not None
    assert of_example.step is None


class ThroughForward(Called):
    """Trains through its own forward, and validates the network itself."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Outside(ThroughForward):
    """Has weights in its forward that validation goes without."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, x: Any) -> Any:
        return super().forward(self.mix(x))


@pytest.mark.parametrize(("kind", "path"), [(ThroughForward, "net"), (Outside, "")])
def test_the_part_that_validation_calls_is_taken_where_it_has_all_weights(kind: type[Classifier], path: str) -> None:
    model, looking = kind(), Looking()
    model.example_input_array = next(iter(model.train_dataloader()))[0]
    make_trainer(looking, limit_train_batches=1, limit_val_batches=1).fit(model)
    of_batch, of_example = looking.seen
    assert (of_batch.captured.path, of_example.captured.path) == (path, "")
    assert (of_batch.exported.evaluated is not None) == bool(path)
    assert ["`validation_step` goes past that" in finding for finding in of_batch.exported.findings] == [True] * bool(
        path
    )
