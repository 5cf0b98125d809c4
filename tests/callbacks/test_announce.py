"""What callbacks say of the module and of the whole step when fit begins, and in the report."""

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback
from lightning_models import BATCH, NUM_CLASSES, Classifier, EnoughError, fit, seeded
from torch import Tensor, nn

from lightning_quant import PostTrainingQuantization
from lightning_quant.errors import NoEffectWarning


class Upsampled(Classifier):
    """A network behind a convolution that costs more than all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 1, 7, padding=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(self.stem(batch[0])), batch[1])


STEM = BATCH * 64 * 49
NET = BATCH * (64 * 4 * 9 + 64 * 4 * 4 * 9 + 64 * NUM_CLASSES)


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_a_child_says_its_own_share_and_that_of_the_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path, module="net", evaluate=False)
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        fit(seeded(Upsampled), callback, limit_train_batches=1)

    share = NET / (NET + STEM)
    assert any(
        f"100.0% of the multiply-adds and 100.0% of the weights' bytes of it, which is {share:.1%}" in message
        for message in caplog.messages
    )
    scalars = callback.artifact.report["scalars"]
    assert scalars["quant/coverage"] == scalars["quant/weight_coverage"] == 1.0
    assert scalars["quant/step_coverage"] == pytest.approx(share)


class Mixed(nn.Module):
    """Most of it is a product that ExecuTorch runs in float, with weights in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(1, 8, 3), nn.GRUCell(8, 64), nn.Linear(64, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.conv(x).mean((2, 3))))


class StopBeforeTraining(Callback):
    def on_train_start(self, *args: Any) -> None:
        raise EnoughError


def test_little_coverage_is_said_before_training(tmp_path: Path) -> None:
    with pytest.warns(NoEffectWarning) as said, pytest.raises(EnoughError):
        fit(
            seeded(net=Mixed()),
            PostTrainingQuantization("int8", "executorch", output_dir=tmp_path),
            StopBeforeTraining(),
        )
    texts = [str(warning.message) for warning in said]
    assert any("of the multiply-adds run as 'int8' asks" in text and "int8_weight_only" in text for text in texts)
    assert any("of the weights' bytes are stored with fewer bits" in text for text in texts)
