"""What integers gain in the products of attention, of two activations each, on ONNX Runtime and OpenVINO.

`python examples/benchmarks/attention.py` writes the same attention twice, its three projections in integers both times:
with float products, and with 8-bit queries, keys, values and softmax around them. CPU time, one thread, interleaved
rounds; decibels are of what the integers of the products alone cost.
"""

import argparse
import functools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from results import publish
from timing import Estimate, bootstrap_ratio, interleaved, median_ms, table

# Samples, heads, tokens, features of a head.
SIZES = ((1, 4, 64, 16), (1, 4, 64, 32), (1, 12, 128, 64), (8, 4, 64, 32), (1, 8, 384, 64))


class _Graph:
    """Nodes and constants of an ONNX file in the making; tensors are their names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def rounded(self, x: str, most: float, zero: int = 128) -> str:
        """Return a tensor between a QuantizeLinear and a DequantizeLinear of uint8."""
        grid = self.constant(np.float32(most / (255 - zero))), self.constant(np.uint8(zero))
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *grid), *grid)


def attention(size: tuple[int, int, int, int], x: np.ndarray, path: Path, *, integers: bool) -> Path:
    """Write attention of one layer, with products of integers or of floats."""
    samples, heads, tokens, features = size
    width, graph, rng = heads * features, _Graph(), np.random.default_rng(0)
    read = graph.rounded("x", float(np.abs(x).max()))
    sizes = graph.constant(np.array([samples, tokens, heads, features]))
    parts, values = [], []
    for order in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        weight = rng.normal(size=(width, width)).astype(np.float32) / math.sqrt(width)
        scale = np.abs(weight).max(0) / 127
        stored = (graph.constant(value) for value in (np.round(weight / scale).astype(np.int8), scale))
        y = graph.add("MatMul", read, graph.add("DequantizeLinear", *stored, axis=1))
        values.append((x @ weight).reshape(samples, tokens, heads, features).transpose(order))
        y = graph.rounded(y, float(np.abs(values[-1]).max())) if integers else y
        parts.append(graph.add("Transpose", graph.add("Reshape", y, sizes), perm=order))
    query, key, value = parts
    scores = graph.add("Mul", graph.add("MatMul", query, key), graph.constant(np.float32(features**-0.5)))
    share = graph.add("Softmax", scores, axis=-1)
    if integers:
        share = graph.rounded(share, _largest_share(values[0] @ values[1] * features**-0.5), zero=0)
    product = graph.add("MatMul", share, value)
    joined = graph.add("Reshape", graph.add("Transpose", product, perm=[0, 2, 1, 3]), graph.constant(np.array(x.shape)))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name in ("x", joined)]
    made = helper.make_graph(graph.nodes, "attention", ends[:1], ends[1:], graph.constants)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _largest_share(scores: np.ndarray) -> float:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return float((powers / powers.sum(-1, keepdims=True)).max())


def onnxruntime_call(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Return a call on one thread, and how many of the two products run in integers."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    num_float = sum(kind in ("MatMul", "FusedMatMul") for kind in kinds)
    return lambda x: session.run(None, {"x": x})[0], 2 - num_float


def openvino_call(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Return a call on one thread, as artifacts are compiled, and how many of the two products run in integers."""
    from lightning_quant.runtimes._openvino_compiled import compiled

    model = compiled(path, threads=1)
    nodes = [op.get_rt_info() for op in model.get_runtime_model().get_ordered_ops()]
    products = [info["primitiveType"].astype(str) for info in nodes if info["layerType"].astype(str) == "MatMul"]
    return lambda x: model(x)[0].copy(), sum(kind.lower().endswith("_i8") for kind in products)


def main() -> None:
    """Time both engines at each size, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=101)
    rounds = parser.parse_args().rounds
    rows = []
    for size in SIZES:
        samples, heads, tokens, features = size
        x = np.random.default_rng(1).normal(size=(samples, tokens, heads * features)).astype(np.float32)
        for engine, load in (("ONNX Runtime", onnxruntime_call), ("OpenVINO", openvino_call)):
            with tempfile.TemporaryDirectory() as folder:
                files = [attention(size, x, Path(folder, f"{kind}.onnx"), integers=kind) for kind in (False, True)]
                (in_float, _), (in_integers, number) = (load(file) for file in files)
            calls = {"float": functools.partial(in_float, x), "integers": functools.partial(in_integers, x)}
            seconds = interleaved(calls, rounds, warm=True)
            ratio: Estimate = bootstrap_ratio(seconds["integers"], seconds["float"])
            expected = in_float(x)
            noise = 20 * math.log10(np.linalg.norm(expected) / np.linalg.norm(in_integers(x) - expected))
            label = f"{samples} x {heads} heads x {tokens} tokens x {features}"
            rows.append((label, engine, f"{median_ms(seconds['float']):.3f}", f"{ratio:.2f}", number, f"{noise:.1f}"))
    header = ("attention", "engine", "float products, ms", "integers / float [95 %]", "products in integers", "dB")
    publish("attention", table(rows, header), packages=["openvino"])


if __name__ == "__main__":
    main()
