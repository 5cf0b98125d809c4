"""Labels that only feed a loss: left out of the captured call, used again in evaluation."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.capture.loss_inputs import leave_out_labels


class Scorer(nn.Module):
    """Returns a dict of scores and, given labels, a loss, as transformers' models do."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.dropout = nn.Dropout(0.5)
        self.loss = loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Score `x` `(..., 6)`."""
        logits = self.dropout(self.layer(x))
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}


class Decoder(Scorer):
    """Reads its labels for more than a loss."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
        """Score `x` with the labels added."""
        logits = self.layer(x) if labels is None else self.layer(x + labels[..., None])
        return {"logits": logits} if labels is None else {"loss": logits.sum(), "logits": logits}


@dataclass(frozen=True)
class Case:
    """A loss with scores' inputs and labels for it."""

    loss: Any
    x: Tensor
    labels: Tensor


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


CLASSES = torch.randint(0, 3, (4,), generator=_generator())
TOKENS = torch.randint(0, 3, (4, 5), generator=_generator())
FLAT, SEQUENCES = torch.randn(4, 6, generator=_generator()), torch.randn(4, 5, 6, generator=_generator())
CASES = {
    "classes": Case(F.cross_entropy, FLAT, CLASSES),
    "tokens": Case(lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten()), SEQUENCES, TOKENS),
    "next_token": Case(lambda s, y: F.cross_entropy(s[:, :-1].flatten(0, 1), y[:, 1:].flatten()), SEQUENCES, TOKENS),
    "regression": Case(F.mse_loss, FLAT, torch.randn(4, 3, generator=_generator())),
    "several_labels": Case(F.binary_cross_entropy_with_logits, FLAT, (FLAT[:, :3] > 0).float()),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_is_recomputed_outside_from_the_artifacts_scores(name: str) -> None:
    case = CASES[name]
    model = Scorer(case.loss).train()
    args, kwargs, found = leave_out_labels(model, (case.x,), {"labels": case.labels})
    assert found is not None
    assert model.training
    assert len(args) + len(kwargs) == 1
    other = Scorer(case.loss).eval().requires_grad_(requires_grad=False)
    call = found.outside(lambda x: other(x))
    expected = case.loss(other(case.x)["logits"], case.labels).item()
    assert call(case.x, labels=case.labels)["loss"].item() == pytest.approx(expected)
    assert "loss" not in call(case.x)


def test_unknown_loss_is_missing_rather_than_made_up() -> None:
    model = Scorer(lambda scores, labels: scores.abs().sum())
    _, _, found = leave_out_labels(model, (FLAT, CLASSES), {})
    assert found is not None
    assert found.formula is None
    assert torch.isnan(found.outside(lambda x: {"logits": model.layer(x)})(FLAT, CLASSES)["loss"])


def test_labels_that_change_the_result_stay() -> None:
    call = ((SEQUENCES,), {"labels": TOKENS})
    assert leave_out_labels(Decoder(None), *call) == (*call, None)


def test_calls_without_labels_stay_as_they_are() -> None:
    assert leave_out_labels(Scorer(None), (FLAT,), {}) == ((FLAT,), {}, None)
