"""A trained transformer with integer activations or 4-bit weights: MiniLM-L6 on text messages, beside named peers.

`python examples/benchmarks/minilm_accuracy.py` quantizes with every tool on the same 256 messages, which no split holds
out, and scores as `minilm_spam.py` does; it needs the same packages. NNCF takes part when `nncf` and `openvino` are
installed. Every contestant quantizes the linear layers; NNCF also the products inside attention.
`--layers` compares GPTQ with rounding to nearest instead, layer by layer.
"""

import argparse
import copy
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from dynamic_peers import OnnxModel, export_onnx, quiet
from minilm_spam import FLOAT, deltas, embed, f1, held_out
from results import publish
from text_datasets import minilm_folder, sms_spam
from timing import table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.layers.refine import refine
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.recipe.recipe import IntegerSpec, Recipe

NUM_KEPT = 512  # messages that no split holds out; recipes were chosen on them
NUM_CALIBRATION = 256
NEAREST = Recipe(name="int4_nearest", weight=IntegerSpec(bits=4, symmetric=True, per_channel=True))
RECIPES: dict[str, str | Recipe] = {
    "int8": "int8",
    "int8_accurate": "int8_accurate",
    "4-bit weights rounded to nearest, 8-bit activations": NEAREST,
    "int4_weights (GPTQ), 8-bit activations": "int4_weights",
    "int4_weight_only": "int4_weight_only",
    "int4_weight_only_gptq": "int4_weight_only_gptq",
}

Call = dict[str, Tensor]
Model = Callable[..., Any]


def torch_ao_static(model: nn.Module, calls: list[Call], engine: str) -> Model:
    """Quantize the linear layers of a copy with `torch.ao.quantization`, each between quantizers of its own."""
    from torch.ao import quantization

    duplicate = copy.deepcopy(model).eval()
    for layer in duplicate.modules():
        if type(layer) is nn.Linear:
            layer.qconfig = quantization.get_default_qconfig(engine)
    torch.backends.quantized.engine = engine
    with quiet(), torch.no_grad():
        prepared = quantization.prepare(quantization.add_quant_dequant(duplicate))
        for call in calls:
            prepared(**call)
        return quantization.convert(prepared)


def ort_static(exported: Path, calls: list[Call], method: str) -> Model:
    """Quantize the products with weights by onnxruntime's `quantize_static`: QDQ, int8 weights per channel."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, cleaned = exported.with_suffix(f".{method}.onnx"), exported.with_suffix(".cleaned.onnx")
    with quiet():
        quant_pre_process(str(exported), str(cleaned), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(cleaned),
            str(path),
            _Batches(calls),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=quantization.CalibrationMethod[method],
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True},
        )
    return _first_output(OnnxModel(path))


def nncf_transformer(exported: Path, calls: list[Call]) -> Model:
    """Quantize with NNCF's settings for transformers, SmoothQuant among them, and run in OpenVINO."""
    import nncf
    import openvino

    core = openvino.Core()
    with quiet():
        data = nncf.Dataset([{name: x.numpy() for name, x in call.items()} for call in calls])
        quantized = nncf.quantize(
            core.read_model(str(exported)), data, subset_size=len(calls), model_type=nncf.ModelType.TRANSFORMER
        )
    compiled = core.compile_model(quantized, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return _first_output(lambda **call: torch.from_numpy(compiled({n: x.numpy() for n, x in call.items()})[0].copy()))


def contestants(model: nn.Module, calls: list[Call], folder: Path) -> dict[str, Callable[[], Model]]:
    """Return, by name, functions that make a quantized model."""

    def ours(recipe: str | Recipe, path: Path) -> Model:
        with quiet():
            artifact = lq.quantize(model, recipe, calibration_data=calls, output_dir=path, threads=1)
        for note in artifact.report["notes"]:
            print(f"  {note}", flush=True)
        return lq.load(path, threads=1)

    exported = export_onnx(model, calls[0], folder / "float.onnx", varying=2)
    found: dict[str, Callable[[], Model]] = {
        "torch.ao static, x86": lambda: torch_ao_static(model, calls, "x86"),
        "torch.ao static, onednn": lambda: torch_ao_static(model, calls, "onednn"),
        "onnxruntime quantize_static, MinMax": lambda: ort_static(exported, calls, "MinMax"),
    }
    if importlib.util.find_spec("nncf"):
        found["NNCF for transformers, OpenVINO"] = lambda: nncf_transformer(exported, calls)
    for index, (name, recipe) in enumerate(RECIPES.items()):
        path = folder / str(index)
        found[f"lightning_quant {name}"] = lambda recipe=recipe, path=path: ours(recipe, path)  # type: ignore[misc]
    return found


def layer_table(model: nn.Module, calls: list[Call]) -> str:
    """Return how much output error GPTQ leaves of that of rounding to nearest, over all linear layers."""
    rows = []
    for recipe in ("int4_weight_only", "int8_weight_only"):
        quantized = quantize_layers(model, (), calls[0], recipe=recipe)
        errors = refine(model, quantized.layers, [((), call) for call in calls])
        ratios = sorted(learned / nearest for nearest, learned in errors.values())
        better = sum(learned < nearest for nearest, learned in errors.values())
        middle = ratios[len(ratios) // 2]
        rows.append((recipe, f"{better} of {len(ratios)}", f"{ratios[0]:.2f}", f"{middle:.2f}", f"{ratios[-1]:.2f}"))
    return table(rows, ("GPTQ on MiniLM", "layers with less error than nearest", "its share, best", "median", "worst"))


class _Batches:
    """The reader that onnxruntime's calibration asks for."""

    def __init__(self, calls: list[Call]) -> None:
        self._calls = iter(calls)

    def get_next(self) -> dict[str, np.ndarray] | None:
        call = next(self._calls, None)
        return None if call is None else {name: x.numpy() for name, x in call.items()}


def _first_output(run: Callable[..., Tensor]) -> Model:
    return lambda **call: SimpleNamespace(last_hidden_state=run(**call))


def main() -> None:
    """Quantize with every tool, classify the held-out messages of every split, and print one table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of contestants' names")
    parser.add_argument("--layers", action="store_true", help="print the table of layers instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModel.from_pretrained(minilm_folder()).eval()

    def tokenize(texts: list[str]) -> Call:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    texts, labels = sms_spam()
    by_length = sorted(texts[:NUM_CALIBRATION], key=len)
    calls = [tokenize(by_length[start : start + 16]) for start in range(0, NUM_CALIBRATION, 16)]
    if arguments.layers:
        publish("minilm_accuracy-layers", layer_table(model, calls), packages=("transformers",))
        return
    spam, parts = labels.numpy(), [held_out(len(texts), seed, NUM_KEPT).numpy() for seed in arguments.seeds]
    exact = embed(model, tokenize, texts).numpy()
    fitted = [LogisticRegression(max_iter=1000).fit(exact[~part], spam[~part]) for part in parts]
    reference = [classifier.predict(exact).astype(bool) for classifier in fitted]
    rows = []

    def score(name: str, vectors: np.ndarray) -> None:
        answers = [classifier.predict(vectors).astype(bool) for classifier in fitted]
        values = [f1(answer, spam, part[None]).item() for answer, part in zip(answers, parts, strict=True)]
        accuracy = np.mean([100 * (a == spam)[part].mean() for a, part in zip(answers, parts, strict=True)])
        per_split = ", ".join(f"{value:.1f}" for value in values)
        delta = deltas(answers, reference, spam, parts)
        rows.append((name, f"{accuracy:.2f}", f"{np.mean(values):.2f}", per_split, f"{delta:+.2f}"))

    score(FLOAT, exact)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in contestants(model, calls, Path(folder)).items():
            if any(part in name for part in arguments.only):
                started = time.perf_counter()
                quantized = make()
                seconds = time.perf_counter() - started
                score(name, embed(quantized, tokenize, texts).numpy())
                print(" | ".join(rows[-1]), f"({seconds:.0f} s to quantize)", flush=True)
    title = f"MiniLM, SMS spam, {len(parts)} splits with {parts[0].sum()} held-out messages"
    header = (title, "accuracy %", "F1 %", "per split", "F1 - float [95 %]")
    publish("minilm_accuracy", table(rows, header), packages=("transformers",))


if __name__ == "__main__":
    main()
