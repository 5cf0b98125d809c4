"""The call that validation makes is found before training, and told from training's by what is no tensor."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning_models import Classifier, make_trainer, seeded
from torch import Tensor, nn

from lightning_quant.callbacks.evaluation_call import difference, evaluation_call
from lightning_quant.capture.capture import Capture

X = torch.ones(2, 4)


class Net(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, cached: bool = False) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((2 * X,), {}, ""),
        ((X, None, False), {}, ""),
        ((X,), {"cached": True}, "`cached` is True where training has False"),
        ((X, X), {}, "`mask` is a tensor where training has None"),
        ((X, X, True), {}, "`mask` is a tensor where training has None and `cached` is True where training has False"),
    ],
)
def test_difference_in_words(args: Any, kwargs: Any, said: str) -> None:
    assert difference(Net(), Capture("", (X,), {}), Capture("", args, kwargs)) == said


class Fails(Classifier):
    """Validates only what a fit has prepared."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("nothing is prepared yet")


class Elsewhere(Classifier):
    """Validates without the module."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", batch[0].mean())


@pytest.mark.parametrize(("kind", "is_found"), [(Classifier, True), (Fails, False), (Elsewhere, False)])
def test_the_first_call_is_found_where_there_is_one(kind: type[LightningModule], is_found: bool) -> None:
    seen: list[Any] = []

    class Looking(kind):  # type: ignore[misc, valid-type]
        def on_fit_start(self) -> None:
            trainer: Trainer = self.trainer
            seen.append(evaluation_call(trainer, self, "net"))

    make_trainer(max_epochs=0).fit(seeded(Looking))
    (found,) = seen
    assert (found is not None) == is_found
    if found is not None:
        first = next(iter(seeded(Classifier).val_dataloader()))[0]
        assert torch.equal(found.args[0], first)
