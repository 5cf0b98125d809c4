"""What is run beside a validation, and what of it validation itself has run."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning_models import Classifier, seeded
from scored_runs import BOTH, DELTA, TWIN, make, trained, without_scores
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.callbacks.score import is_scored

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@BOTH
@pytest.mark.parametrize("batches", [1, pytest.param(0.5, marks=pytest.mark.slow), None])
def test_subset_of_batches_is_compared_with_float_on_the_same(
    kind: type[QuantizationCallback], batches: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = seeded()
    with caplog.at_level(logging.INFO):
        one = trained(module, make(kind, tmp_path, score_batches=batches))[0]
    assert "scores are of 1 of 2 validation batches" in caplog.text
    x, y = next(iter(module.val_dataloader()))
    with torch.no_grad():
        of_first = F.cross_entropy(module.eval().net(x), y)
        of_all = [F.cross_entropy(module.net(x), y) for x, y in module.val_dataloader()]
    assert one[DELTA] != 0
    if kind is PostTrainingQuantization:
        assert one[TWIN] - one[DELTA] == pytest.approx(float(of_first), abs=1e-6)
    else:
        # What validation itself has run on all batches.
        assert one[TWIN] == one["val_loss"]
        assert 0 < abs(one[TWIN] - float(sum(of_all) / len(of_all))) < 0.05


@pytest.mark.parametrize(
    ("total", "limit", "indices"),
    [
        (50, None, [0, 25]),
        (3, None, [0]),
        (10, 4, [0, 3, 5, 8]),
        (10, 0.2, [0, 5]),
        (3, 7, [0, 1, 2]),
        (3, 1.0, [0, 1, 2]),
        (math.inf, None, [0, 24]),
        (math.inf, 2, [0, 1]),
    ],
)
def test_batches_that_are_scored_lie_evenly(total: float, limit: float | None, indices: list[int]) -> None:
    assert [i for i in range(int(min(total, 40))) if is_scored(i, total, limit)] == indices


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@BOTH
def test_half_precision(kind: type[QuantizationCallback], precision: Any, tmp_path: Path) -> None:
    plain = trained(seeded(), make(kind, tmp_path, score_every=None), precision=precision)
    scored = trained(seeded(), make(kind, tmp_path), precision=precision)
    assert without_scores(scored) == plain
    assert abs(scored[0][TWIN] - scored[0]["val_loss"]) < 0.05


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.01 * torch.randn_like(weight)


class Drawn(Classifier):
    """Has weights that draw random numbers, in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.net.head, "weight", Noise())


def test_weights_that_draw_random_numbers_leave_the_run_as_it_is(tmp_path: Path) -> None:
    plain, scored = (
        trained(seeded(Drawn), make(PostTrainingQuantization, tmp_path, score_every=every)) for every in (None, 1)
    )
    assert without_scores(scored) == plain


class PastTheModule(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net.head(self.net.features(batch[0])), batch[1]))


def test_validation_past_the_module_is_no_score(tmp_path: Path) -> None:
    with pytest.warns(Warning, match="not scored any more: Expected `validation_step` to call 'net', but it never did"):
        found = trained(
            seeded(PastTheModule), PostTrainingQuantization(output_dir=tmp_path, score_every=1), max_epochs=2
        )
    assert not any("twin" in name for name in found[-1])


class Whole(Classifier):
    """Is called itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


@BOTH
def test_module_may_be_the_whole(kind: type[QuantizationCallback], tmp_path: Path) -> None:
    one = trained(seeded(Whole), make(kind, tmp_path), inference_mode=False)[0]
    assert 0 < abs(one[DELTA]) < 0.05


def test_float_is_float_where_another_callback_rounds(tmp_path: Path) -> None:
    aware = QuantizationAwareTraining(output_dir=tmp_path / "aware", name="aware", schedule={"fake_quantize": 0.0})
    after = make(PostTrainingQuantization, tmp_path, recipe="int8_dynamic", runtime="torch", name="after")
    module = seeded()
    one = trained(module, aware, after)[0]
    loader = module.val_dataloader()
    with torch.no_grad():
        losses = [float(F.cross_entropy(module.eval().net(x), y)) for x, y in loader]
    floating = one["quant/after/twin/val_loss"] - one["quant/after/twin_delta/val_loss"]
    assert floating == pytest.approx(sum(losses) / len(losses), abs=1e-6)
    assert one["val_loss"] != pytest.approx(floating, abs=1e-6)
