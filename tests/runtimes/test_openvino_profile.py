"""Times of operators from OpenVINO's counters, by the names of the plan's rows."""

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.runtimes._onnx_profile import products_of
from lightning_quant.runtimes._openvino_profile import _products, operator_ms

pytest.importorskip("openvino")


class Net(nn.Module):
    """An activation fused into a convolution, a sum, a pool, and a layer that answers in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.gelu, self.head = nn.GELU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((x + self.gelu(self.second(x))).mean((2, 3)))


class Counted:
    """A compiled model whose every node takes a millisecond, and the first call a second."""

    def __init__(self, compiled: Any) -> None:
        self.inputs, self.get_runtime_model, self.calls = compiled.inputs, compiled.get_runtime_model, 0

    def create_infer_request(self) -> Any:
        return self

    def infer(self, *_: object, **__: object) -> None:
        self.calls += 1

    @property
    def profiling_info(self) -> list[Any]:
        time = datetime.timedelta(milliseconds=1 if self.calls > 1 else 1000)
        nodes = self.get_runtime_model().get_ordered_ops()
        return [
            SimpleNamespace(
                node_name=node.get_friendly_name(),
                node_type=node.get_rt_info()["layerType"].astype(str),
                real_time=time,
            )
            for node in nodes
        ]


def test_nodes_belong_to_the_rows_of_the_tensors_around_them(tmp_path: Path) -> None:
    from lightning_quant.runtimes._openvino_compiled import compiled

    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    prepared = prepare(Net().eval(), (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    path = export(prepared, tmp_path / "artifact").model_path
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    spent = operator_ms(path, {"x": x}, operators, Counted(compiled(path, threads=1)))

    assert {"first", "second", "add", "head"} <= set(spent)
    assert spent["first"] == spent["second"] == spent["add"] == spent["head"] == 1
    assert spent[""] > 0
    # What is fused into a convolution has no time of its own.
    assert "gelu" not in spent

    real = runtimes.get("openvino").operator_ms(path, {"x": x}, operators, threads=1)
    assert set(real) <= {"", "first", "second", "add", "head", "mean"}
    assert real


class Projections(nn.Module):
    """What reads one tensor several times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.query, self.key, self.value = nn.Linear(32, 8), nn.Linear(32, 16), nn.Linear(32, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x).relu()
        return self.query(h), self.key(h), self.value(h)


def test_several_readers_of_a_tensor_are_told_apart(tmp_path: Path) -> None:
    import openvino

    torch.manual_seed(0)
    x, model = torch.randn(4, 6, 8), Projections().eval()
    prepared = prepare(model, (x,), runtime="openvino")
    calibrate(prepared, steps_of(prepared, [x]))
    path = export(prepared, tmp_path / "artifact").model_path
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    read = openvino.Core().read_model(path)
    known = products_of(_products(read), operators)
    sizes = {
        known[op.get_friendly_name()]: list(op.get_output_partial_shape(0))[-1].get_length()
        for op in read.get_ordered_ops()
        if op.get_friendly_name() in known
    }
    assert sizes == {name: model.get_submodule(name).out_features for name in ("query", "key", "value")}
