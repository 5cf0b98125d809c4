"""Times of operators from ONNX Runtime's profiler, by the names of the plan's rows."""

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from lightning_quant.graph.plan import Operator
from lightning_quant.runtimes._onnx_profile import operator_ms

NODES = (
    ("QuantizeLinear", "edge :input", "x", "q0"),
    ("DequantizeLinear", "d0", "q0", "f0"),
    ("Conv", "node_conv", "f0", "c"),
    ("Relu", "node_relu", "c", "r"),
    ("QuantizeLinear", "edge :1.relu@2", "r", "q1"),
    ("DequantizeLinear", "d1", "q1", "f1"),
    ("Gelu", "node_gelu", "f1", "g"),
    ("QuantizeLinear", "edge part:gelu", "g", "q2"),
    ("DequantizeLinear", "d2", "q2", "f2"),
    ("Reshape", "node_view", "f2", "v"),
    ("Gemm", "node_query", "v", "y"),
    ("Gemm", "node_key", "v", "z"),
)
OPERATORS = (
    Operator("1.conv", "conv2d", ("input",), "1.relu"),
    Operator("query", "linear", ("gelu",), "query", quantized_output=False, path="part"),
    Operator("key", "linear", ("gelu",), "key", quantized_output=False, path="part"),
)


class Session:
    """Writes what a profiler would, call by call."""

    def __init__(self, file: Path, profile: Path) -> None:
        self.profile, self.calls = profile, 0

    def get_inputs(self) -> list[Any]:
        return []

    def run(self, *_: object) -> None:
        self.calls += 1

    def end_profiling(self) -> str:
        spent = {"node_conv_token_7": 20, "node_gelu": 7, "node_query": 5, "node_key_token_3": 6, "node_view": 4}
        spent |= {"edge :input": 3, "Transpose_token_1": 2}
        events = [{"cat": "Session", "name": "model_run", "dur": 999}]
        for call in range(self.calls):
            # The first call is slow.
            slow = 1000 * (call == 0)
            events += [{"cat": "Node", "name": f"{n}_kernel_time", "dur": ms + slow} for n, ms in spent.items()]
            events += [{"cat": "Node", "name": f"{n}_fence_before", "dur": 99} for n in spent]
        self.profile.write_text(json.dumps(events))
        return str(self.profile)


def test_nodes_belong_to_the_rows_of_the_tensors_around_them(tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node(kind, [read], [made], name=name) for kind, name, read, made in NODES]
    graph = onnx.helper.make_graph(nodes, "graph", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "model.onnx")
    found = operator_ms(tmp_path / "model.onnx", {"x": torch.ones(1)}, OPERATORS, Session)

    assert found == pytest.approx(
        {"1.conv": 0.02, "part.gelu": 0.007, "part.query": 0.005, "part.key": 0.006, "": 0.009}
    )
    # Where the file has another number of readers, none is known.
    assert operator_ms(tmp_path / "model.onnx", {"x": torch.ones(1)}, OPERATORS[:2], Session) == pytest.approx(
        {"1.conv": 0.02, "part.gelu": 0.007, "": 0.02}
    )
