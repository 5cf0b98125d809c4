import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_runtimes import faster, two  # noqa: F401  a fixture
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.errors import QuantizationError
from lightning_quant.export import auto as automatic
from lightning_quant.export.auto import choose_runtime
from lightning_quant.machine.latency import Timing
from lightning_quant.runtimes import onnxruntime, openvino

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured", "two"),
]

FLOAT_PEER = automatic._float_peer
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_fastest_runtime_is_taken_and_the_report_says_what_was_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster(monkeypatch, name)
    artifact = quantize(model(), runtime="auto", calibration_data=iter([X, 2 * X]), output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == name
    (note,) = artifact.report["notes"]
    assert note.startswith(f"{name} was chosen as the fastest")
    assert "onnxruntime 1" in note or "onnxruntime 9" in note
    assert "openvino 1" in note or "openvino 9" in note
    assert load(tmp_path)(X).shape == (16, 3)


def test_the_report_says_that_float_in_another_runtime_is_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "_float_peer", FLOAT_PEER)
    faster(monkeypatch, "float in openvino")
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)
    assert all(f"float in {name} " in artifact.report["notes"][0] for name in ("torch", "onnxruntime", "openvino"))
    said = [text for text in artifact.report["warnings"] if "slower" in text]
    assert said == [
        f"every artifact is slower than float in openvino at batch {batch}: onnxruntime takes 9.00 times the time"
        for batch in (1, 16)
    ]


def test_what_is_fastest_by_one_sample_and_by_the_captured_batch_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {1: {"onnxruntime": 2.0, "openvino": 8.0}, 16: {"onnxruntime": 3.0, "openvino": 2.0}}

    def timed(contestants: dict[str, Any], **_: Any) -> dict[str, Timing]:
        (rows,) = {len(call()) for call in contestants.values()}
        ms = known[rows] | {"float in torch": 2.5}
        return {name: Timing(ms[name], 1.0, 9.0, 7) for name in contestants}

    monkeypatch.setattr(automatic, "measure", timed)
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)
    assert artifact.manifest["runtime"] == "onnxruntime"
    (note,) = artifact.report["notes"]
    assert note.startswith("onnxruntime was chosen as the fastest over the batches that a report shows")
    (warning,) = [text for text in artifact.report["warnings"] if text.startswith("the artifact on onnxruntime")]
    assert warning.endswith(
        "but not on openvino, is slower than float in torch at batch 16: onnxruntime takes 1.20 times the time"
    )


def test_fast_runtime_that_computes_something_else_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = openvino.OpenVinoModule.run
    monkeypatch.setattr(openvino.OpenVinoModule, "run", lambda self, tensors: [-y for y in run(self, tensors)])
    faster(monkeypatch, "openvino")
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == "onnxruntime"
    (note,) = artifact.report["notes"]
    assert "Not considered: openvino (parity FAILED" in note


def test_runtime_that_is_missing_or_refuses_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise QuantizationError("no such operator")

    monkeypatch.setattr(openvino.RUNTIME, "export", refuse)
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] == "onnxruntime"
    assert "Not considered: openvino (no such operator)" in artifact.report["notes"][0]


class Recurrent(nn.Module):
    """The last state of an LSTM over two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(3, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x.reshape(-1, 2, 3))[0][:, -1])


@pytest.mark.parametrize(
    ("net", "most", "why"), [(Recurrent, 1000, "step by step"), (model, 0, r"minutes for \d+ operators")]
)
def test_what_would_take_minutes_is_not_tried(
    net: Any, most: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automatic, "_MOST_OPERATORS", most)
    monkeypatch.setattr(onnxruntime.OnnxRuntime, "UNROLLS", True)
    artifact = quantize(net().eval(), "int8_weight_only", "auto", calibration_data=[X], output_dir=tmp_path, threads=1)
    assert artifact.manifest["runtime"] == "openvino"
    (note,) = (text for text in artifact.report["notes"] if "was chosen" in text)
    assert re.search(rf"Not considered: onnxruntime \(not tried: .*{why}.*; `runtime='onnxruntime'` does", note)


def test_every_reason_is_given_when_there_is_none() -> None:
    def plan(name: str) -> Any:
        raise QuantizationError(f"{name} cannot")

    with pytest.raises(QuantizationError, match=r"onnxruntime: onnxruntime cannot; openvino: openvino cannot"):
        choose_runtime(plan)


def test_the_real_measurement_names_one_of_them(tmp_path: Path) -> None:
    artifact = quantize(model(), runtime="auto", calibration_data=[X], output_dir=tmp_path, threads=1)

    assert artifact.manifest["runtime"] in ("onnxruntime", "openvino")
    assert " ms" in artifact.report["notes"][0]
