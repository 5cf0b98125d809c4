"""GPT-2 124M, random weights: bytes on disk, closeness of the logits, and time of 192 tokens.

`python examples/benchmarks/gpt2.py` needs `pip install transformers`. Weights are random, so it tells size, speed and
rounding error, not quality; `minilm_spam.py` is the benchmark of a trained transformer.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from dynamic_peers import OnnxModel, decibels, export_onnx, ort_quantize_dynamic, quiet, state_bytes, torch_ao_dynamic
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor, nn

import lightning_quant as lq

FLOAT = "PyTorch eager fp32"
PEER = "torch.ao quantize_dynamic, Conv1D made Linear"


class Contestant(NamedTuple):
    """A model on disk and the call that is timed."""

    num_bytes: int
    logits: Callable[[], Tensor]


def gpt2() -> nn.Module:
    """Build the 124M-parameter model with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(use_cache=False)).eval()


def build(model: nn.Module, tokens: Tensor, folder: Path, threads: int) -> dict[str, Contestant]:
    """Make every contestant from one float model."""

    def in_process(module: nn.Module) -> Contestant:
        return Contestant(state_bytes(module, folder / "state.pt"), lambda: module(input_ids=tokens).logits)

    def on_disk(path: Path) -> Contestant:
        session = OnnxModel(path, threads)
        return Contestant(path.stat().st_size, lambda: session(input_ids=tokens))

    found = {
        FLOAT: in_process(model),
        "torch.ao quantize_dynamic, {nn.Linear}": in_process(torch_ao_dynamic(model, {nn.Linear})),
        PEER: in_process(torch_ao_dynamic(model, {nn.Linear}, conv1d=True)),
    }
    exported = export_onnx(model, {"input_ids": tokens}, folder / "float.onnx")
    found["ONNX Runtime fp32"] = on_disk(exported)
    found["onnxruntime quantize_dynamic, per channel"] = on_disk(
        ort_quantize_dynamic(exported, folder / "dynamic.onnx")
    )
    for runtime in ("torch", "onnxruntime"):
        with quiet():
            artifact = lq.quantize(
                model,
                "int8_dynamic",
                runtime,
                calibration_data=[{"input_ids": tokens}],
                output_dir=folder / runtime,
                threads=threads,
            )
        loaded = lq.load(artifact.path, threads=threads)
        found[f"lightning_quant int8_dynamic, {runtime}"] = Contestant(
            artifact.size_bytes, lambda loaded=loaded: loaded(input_ids=tokens).logits
        )
    return found


def main() -> None:
    """Time all contestants in interleaved rounds and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = gpt2()
    tokens = torch.randint(model.config.vocab_size, (1, arguments.tokens), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        found = build(model, tokens, Path(name), arguments.threads)
        logits = found[FLOAT].logits()
        closeness = {contestant: decibels(logits, found[contestant].logits()) for contestant in found}
        seconds = interleaved({contestant: c.logits for contestant, c in found.items()}, rounds=arguments.rounds)
    rows = [
        (
            contestant,
            f"{c.num_bytes / 1e6:.1f}",
            f"{closeness[contestant]:.1f}",
            f"{median_ms(seconds[contestant]):.0f}",
            f"{bootstrap_ratio(seconds[FLOAT], seconds[contestant]):.2f}",
            f"{bootstrap_ratio(seconds[PEER], seconds[contestant]):.2f}",
        )
        for contestant, c in found.items()
    ]
    header = ("MB on disk", "logits, dB", "median CPU ms", "times faster than eager [95 %]", "than torch.ao [95 %]")
    result = table(rows, (f"GPT-2 124M, 1 x {arguments.tokens} tokens", *header))
    publish("gpt2", result, packages=("transformers",))


if __name__ == "__main__":
    main()
