"""Two LSTMs in dynamic int8, on tame inputs and on inputs of a wide range, beside torch.ao and onnxruntime.

`python examples/benchmarks/lstm.py` prints one table for each kind of input. "energies" are what a speech front end
makes before any logarithm: values of median 2.6e-5 and maximum 16. With random weights most of an output is bias: "dB
of what varies" leaves the mean of each score out.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from dynamic_peers import OnnxModel, decibels, export_onnx, ort_quantize_dynamic, quiet, state_bytes, torch_ao_dynamic
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor, nn

import lightning_quant as lq

FLOAT, PEER = "PyTorch eager fp32", "torch.ao quantize_dynamic"
BATCH, STEPS, FEATURES = 8, 100, 64


class Contestant(NamedTuple):
    """A model, its bytes on disk, and the shares of the weights' bytes that are int8, of all and of recurrent ones."""

    call: Callable[[Tensor], Tensor]
    num_bytes: int
    int8_share: float
    recurrent_share: float


class TwoLSTMs(nn.Module):
    """LSTM(64, 64), ReLU, LSTM(64, 32), Linear: from `(batch, time, 64)` to `(batch, time, 10)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(FEATURES, 64, batch_first=True)
        self.second = nn.LSTM(64, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Score every time step."""
        return self.head(self.second(torch.relu(self.first(x)[0]))[0])


def inputs(kind: str, seed: int) -> Tensor:
    """Draw a batch: "normal", "bursts" (time steps of a wide range of loudness) or "energies" (every value is)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(BATCH, STEPS, FEATURES, generator=generator)
    if kind == "normal":
        return values
    if kind == "bursts":
        return values * torch.exp(3 * torch.randn(BATCH, STEPS, 1, generator=generator))
    return 2.6e-5 * torch.exp(values * 13.33 / values.max())  # exp(13.33) * 2.6e-5 is 16


def build(model: nn.Module, kind: str, folder: Path) -> dict[str, Contestant]:
    """Make every contestant; those of lightning_quant choose on one batch that is not the timed and compared one."""
    x = inputs(kind, seed=1)
    found = {FLOAT: Contestant(model, state_bytes(model, folder / "state.pt"), 0.0, 0.0)}
    ao = torch_ao_dynamic(model, {nn.LSTM, nn.Linear})
    found[PEER] = Contestant(ao, state_bytes(ao, folder / "state.pt"), 1.0, 1.0)
    exported = export_onnx(model, {"x": x}, folder / "float.onnx", by_name=False)
    for name, path in (
        ("ONNX Runtime fp32", exported),
        ("onnxruntime quantize_dynamic, per channel", ort_quantize_dynamic(exported, folder / "dynamic.onnx")),
    ):
        session = OnnxModel(path)
        found[name] = Contestant(lambda x, s=session: s(x=x), path.stat().st_size, *onnx_shares(path))
    for runtime, shares in (("torch", safetensors_shares), ("onnxruntime", onnx_shares)):
        with quiet():
            artifact = lq.quantize(
                model, "int8_dynamic", runtime, calibration_data=[x], output_dir=folder / runtime, threads=1
            )
        loaded = lq.load(artifact.path, threads=1)
        found[f"lightning_quant int8_dynamic, {runtime}"] = Contestant(
            loaded, artifact.size_bytes, *shares(artifact.model_path)
        )
    return found


def onnx_shares(path: Path) -> tuple[float, float]:
    """Return which shares of the stored weights' bytes are int8; recurrent ones feed an LSTM, at any distance."""
    import onnx

    graph = onnx.load(path).graph
    readers = {name: node for node in graph.node for name in node.input}
    sizes: dict[tuple[bool, bool], int] = {}
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.size == max(values.shape, default=1) or values.dtype not in (np.float32, np.int8, np.uint8):
            continue
        node = readers.get(tensor.name)
        while node is not None and "LSTM" not in node.op_type:
            node = readers.get(node.output[0])
        key = (values.dtype != np.float32, node is not None and "LSTM" in node.op_type)
        sizes[key] = sizes.get(key, 0) + values.nbytes
    return _shares(sizes)


def safetensors_shares(path: Path) -> tuple[float, float]:
    """Return which shares of the stored weights' bytes are int8."""
    from safetensors.torch import load_file

    sizes: dict[tuple[bool, bool], int] = {}
    for name, tensor in load_file(path).items():
        if tensor.dim() > 1:
            key = (tensor.dtype == torch.int8, name.rpartition(".")[2].startswith(("weight_ih", "weight_hh")))
            sizes[key] = sizes.get(key, 0) + tensor.nbytes
    return _shares(sizes)


def _shares(sizes: dict[tuple[bool, bool], int]) -> tuple[float, float]:
    total, recurrent = sum(sizes.values()), sizes.get((True, True), 0) + sizes.get((False, True), 0)
    return (sizes.get((True, True), 0) + sizes.get((True, False), 0)) / total, sizes.get((True, True), 0) / recurrent


def main() -> None:
    """Time all contestants in interleaved rounds and print one table for each kind of input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=51)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for kind in ("normal", "bursts", "energies"):
        torch.manual_seed(0)
        model, x = TwoLSTMs().eval(), inputs(kind, seed=2)
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            found = build(model, kind, Path(name))
            reference = model(x)
            close = {
                contestant: [decibels(reference, c.call(x), centred=centred) for centred in (False, True)]
                for contestant, c in found.items()
            }
            calls = {contestant: functools.partial(c.call, x) for contestant, c in found.items()}
            seconds = interleaved(calls, rounds=arguments.rounds)
        rows = [
            (
                contestant,
                f"{c.num_bytes / 1e3:.0f}",
                f"{100 * c.int8_share:.0f}",
                f"{100 * c.recurrent_share:.0f}",
                *(f"{value:.1f}" for value in close[contestant]),
                f"{median_ms(seconds[contestant]):.2f}",
                f"{bootstrap_ratio(seconds[FLOAT], seconds[contestant]):.2f}",
            )
            for contestant, c in found.items()
        ]
        header = (
            "kB on disk",
            "int8 % of weight bytes",
            "of recurrent",
            "dB",
            "dB of what varies",
            "median CPU ms",
            "times faster [95 %]",
        )
        publish(f"lstm-{kind}", table(rows, (f"Two LSTMs, {kind}, {BATCH} x {STEPS} steps", *header)))


if __name__ == "__main__":
    main()
