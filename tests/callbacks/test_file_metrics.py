"""What validation says of an exported file, and of its simulation."""

from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F  # noqa: N812
from lightning_models import Classifier, fit, seeded
from torch import nn

from lightning_quant import PostTrainingQuantization


class PastTheNetwork(Classifier):
    """Validates layers of the network, and not the network."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.net[3](self.net[1](batch[0].flatten(1)).relu())
        self.log("val_loss", F.cross_entropy(output, batch[1]))


@pytest.mark.usefixtures("unmeasured")
def test_validation_past_the_network_says_nothing_of_file_and_simulation(tmp_path: Path) -> None:
    callback = PostTrainingQuantization(output_dir=tmp_path)
    with pytest.warns(
        Warning, match="artifact are missing: Expected `validation_step` to call 'net', but it never did"
    ):
        fit(seeded(PastTheNetwork), callback, max_epochs=1)
    (row,) = callback.artifact.report["metrics"]
    assert row["float_value"] is not None
    assert (row["simulated"], row["artifact"]) == (None, None)
