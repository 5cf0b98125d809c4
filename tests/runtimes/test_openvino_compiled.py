"""Artifacts compute in float32 what was simulated; float beside them in what OpenVINO takes by itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning_models import ConvNet
from torch import Tensor, nn

from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.export.prepare import prepare
from lightning_quant.report.make_report import measure_latency
from lightning_quant.runtimes._openvino_compiled import compiled

opset13 = pytest.importorskip("openvino.opset13")


def test_hints_are_given_unless_openvino_is_to_choose(tmp_path: Path) -> None:
    import openvino

    x = opset13.parameter([1, 4], np.float32, name="x")
    openvino.save_model(openvino.Model([opset13.relu(x)], [x]), tmp_path / "model.xml")
    own = compiled(tmp_path / "model.xml", threads=1)
    default = compiled(tmp_path / "model.xml", threads=1, by_default=True)
    assert own.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert default.get_property("INFERENCE_PRECISION_HINT") == openvino.Core().get_property(
        "CPU", "INFERENCE_PRECISION_HINT"
    )
    assert own.get_property("INFERENCE_NUM_THREADS") == default.get_property("INFERENCE_NUM_THREADS") == 1


class Peer(LoadedModule):
    """Float in some engine."""

    def __init__(self, precision: str) -> None:
        nn.Module.__init__(self)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_reports_say_in_what_float_was_timed() -> None:
    net, x = ConvNet().eval(), torch.randn(2, 1, 8, 8)
    model = prepare(net, (x,), runtime="openvino", trains=False)

    def remarks(precision: str) -> tuple[str, ...]:
        peers: Any = SimpleNamespace(of=lambda *_: Peer(precision), seconds=0.0)
        return measure_latency(model, net, 1, peers)[1]

    assert remarks("bf16") == ("float in openvino was timed in bf16, which it takes by itself here",)
    assert remarks("f32") == ()
