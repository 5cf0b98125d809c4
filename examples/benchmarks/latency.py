"""Latency of ResNet18 in PyTorch, ONNX Runtime, torch.ao, onnxruntime's `quantize_static` and lightning_quant.

`python examples/benchmarks/latency.py` prints CPU time per call (one image, one thread) and the operators that run.
"""

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peers import nncf_quantize, operator_counts, ort_float, ort_quantize_static, torch_ao_fx
from reference_models import resnet18
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor

import lightning_quant as lq

OURS = "lightning_quant int8, ONNX Runtime"
BASELINE = "onnxruntime quantize_static int8"


def build(folder: Path, size: int, threads: int) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, Path]]:
    """Quantize one ResNet18 with every tool, on the same calibration tensors.

    Returns:
        models: callables by name, from images `(N, 3, size, size)` to logits `(N, 1000)`.
        files: the ONNX files of the two int8 models that ONNX Runtime runs, by name.
    """
    torch.manual_seed(0)
    model = resnet18()
    calibration = [torch.randn(4, 3, size, size) for _ in range(4)]
    with torch.no_grad():
        for images in calibration * 4:  # BatchNorm statistics of these images, or activations would explode
            model(images)
    model.eval()
    artifact = lq.quantize(model, "int8", "onnxruntime", calibration_data=calibration, output_dir=folder / "ours")
    static = ort_quantize_static(model, calibration, folder / "static.onnx", threads=threads)
    models: dict[str, Callable[[Tensor], Tensor]] = {
        "PyTorch eager fp32": model,
        "ONNX Runtime fp32": ort_float(model, calibration[0], folder / "float.onnx", threads),
        "torch.ao FX int8, x86": torch_ao_fx(model, calibration, "x86"),
        "torch.ao FX int8, onednn": torch_ao_fx(model, calibration, "onednn"),
        BASELINE: static,
        OURS: lq.load(artifact.path, threads=threads),
    }
    if importlib.util.find_spec("nncf"):
        models["NNCF int8, OpenVINO"] = nncf_quantize(model, calibration, folder / "nncf.onnx", threads)
    return models, {BASELINE: static.model_path, OURS: Path(artifact.model_path)}


def main() -> None:
    """Time all models in interleaved rounds and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        models, files = build(Path(name), arguments.size, arguments.threads)
        image = torch.randn(1, 3, arguments.size, arguments.size)
        calls = {model: functools.partial(predict, image) for model, predict in models.items()}
        seconds = interleaved(calls, rounds=arguments.rounds)
        counts = {model: operator_counts(file, Path(name) / "optimized.onnx") for model, file in files.items()}
    rows = [
        (model, f"{median_ms(times):.1f}", f"{bootstrap_ratio(seconds[OURS], times):.2f}")
        for model, times in seconds.items()
    ]
    operators = sorted(set().union(*counts.values()))
    publish(
        "latency",
        table(rows, ("ResNet18, 1 image", "median CPU ms", "lightning_quant / this [95 %]")),
        table([(kind, *(counts[model][kind] for model in files)) for kind in operators], ("operators run", *files)),
    )


if __name__ == "__main__":
    main()
