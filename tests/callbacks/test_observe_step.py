"""What `training_step` calls beside the module that is quantized is found before training."""

from pathlib import Path
from typing import Any

import pytest
from features import feature
from lightning_models import Classifier, fit, seeded
from torch import Tensor

from lightning_quant import QuantizationAwareTraining
from lightning_quant.errors import NoEffectWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class Beside(Classifier):
    """Calls its network, and a part of it once more past the network's own forward."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.net.features(batch[0]).square().mean()


@feature("Modules", "self.net.features(x) beside self.net(x) in training_step", note="found at fit start, and reported")
def test_calls_beside_the_forward_are_reported(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path, module="net", evaluate=False)
    with pytest.warns(NoEffectWarning, match=r"also calls net\.conv1, net\.conv2 past the forward of 'net'"):
        fit(seeded(Beside), callback)

    assert any("those calls are float" in note for note in callback.artifact.report["notes"])


def test_no_calls_beside_the_forward_are_found_where_there_are_none(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path, evaluate=False)
    fit(seeded(), callback)

    assert callback.findings == ()
