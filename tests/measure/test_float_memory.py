"""Memory of the float model in an artifact's own format."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_quant import quantize
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, open_model
from lightning_quant.doors import making
from lightning_quant.errors import ExportError
from lightning_quant.measure import float_memory as module

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


def test_what_is_measured_is_the_float_model_in_the_same_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = torch.nn.Linear(16, 4), torch.randn(4, 16)
    seen: list[Any] = []

    def peak(own: Artifact, threads: int) -> int:
        (given,) = golden.load(own.golden_path, own.signature).inputs
        seen.append((threads, torch.equal(open_model(own, threads=1)(given), model(given)), own.manifest["runtime"]))
        return 5

    def report(planned: Any, own: Artifact, **_: Any) -> Any:
        seen.append(module.float_peak_of(planned, own, 3))
        with monkeypatch.context() as patch:
            patch.setattr(module, "export_float", lambda *_: (_ for _ in ()).throw(KeyError("an operator")))
            with pytest.raises(ExportError, match="float model to export, but 'an operator'"):
                module.float_peak_of(planned, own, 3)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "peak_of", peak)
    monkeypatch.setattr(making, "make_report", report)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path)
    assert seen == [(3, True, "torch"), 5]
