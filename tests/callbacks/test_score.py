"""What is run beside a validation, and what of it validation itself has run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning_models import Classifier, seeded
from scored_runs import BOTH, DELTA, TWIN, make, trained, without_scores

from lightning_quant import PostTrainingQuantization
from lightning_quant.callbacks.base import QuantizationCallback

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@BOTH
@pytest.mark.parametrize("batches", [1, 0.5])
def test_subset_of_batches_is_compared_with_float_on_the_same(
    kind: type[QuantizationCallback], batches: float, tmp_path: Path
) -> None:
    module = seeded()
    one = trained(module, make(kind, tmp_path, score_batches=batches))[0]
    x, y = next(iter(module.val_dataloader()))
    with torch.no_grad():
        of_first = F.cross_entropy(module.eval().net(x), y)
    assert one[TWIN] - one[DELTA] == pytest.approx(float(of_first), abs=1e-6)
    assert one[DELTA] != 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@BOTH
def test_half_precision(kind: type[QuantizationCallback], precision: Any, tmp_path: Path) -> None:
    plain = trained(seeded(), make(kind, tmp_path, score_every=None), precision=precision)
    scored = trained(seeded(), make(kind, tmp_path), precision=precision)
    assert without_scores(scored) == plain
    assert abs(scored[0][TWIN] - scored[0]["val_loss"]) < 0.05


class PastTheModule(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net.head(self.net.features(batch[0])), batch[1]))


def test_validation_past_the_module_is_no_score(tmp_path: Path) -> None:
    with pytest.warns(Warning, match="not scored any more: Expected `validation_step` to call 'net', but it never did"):
        found = trained(
            seeded(PastTheModule), PostTrainingQuantization(output_dir=tmp_path, score_every=1), max_epochs=2
        )
    assert not any("twin" in name for name in found[-1])
