"""ResNet18 on four runtimes: lightning_quant's artifacts beside what those engines' own tools make.

`python examples/benchmarks/engines.py` needs `pip install nncf` for the first pair; all quantize the same float model
with the same calibration tensors. CPU time per call, one image, one thread, interleaved rounds. Two instances of the
same compiled model differ by up to 8 %, by where their memory lies, so each is made several times.
"""

import argparse
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peers import nncf_quantize, ort_quantize_static, torch_ao_fx
from reference_models import resnet18
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare

PAIRS = {
    "lightning_quant int8, OpenVINO": "NNCF int8, OpenVINO",
    "lightning_quant int8, Inductor": "torchao PT2E int8, Inductor",
    "lightning_quant int8, ONNX Runtime": "onnxruntime quantize_static int8",
    "lightning_quant int8, torch": "torch.ao FX int8, onednn",
}
BASELINE = "lightning_quant int8, ONNX Runtime"


def torchao_pt2e(model: nn.Module, calibration: list[Tensor], path: Path) -> Callable[[Tensor], Tensor]:
    """Quantize with torchao's PT2E and X86InductorQuantizer, compiled ahead of time as our artifact is."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        exported = torch.export.export(model, (calibration[0],), dynamic_shapes=shapes).module()
        prepared = prepare_pt2e(exported, quantizer)
        for images in calibration:
            prepared(images)
        program = torch.export.export(convert_pt2e(prepared), (calibration[0],), dynamic_shapes=shapes)
        options = {"freezing": True, "cpp.dynamic_threads": True}
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: package(images)


def distinct_relus(model: nn.Module) -> nn.Module:
    """Give every call a ReLU of its own, without which X86InductorQuantizer raises."""
    from torch import fx

    traced = fx.symbolic_trace(model)
    for index, node in enumerate(list(traced.graph.nodes)):
        # The exporter would go by the names that were traced.
        node.meta.clear()
        if node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU):
            traced.add_module(f"relu_{index}", nn.ReLU())
            node.target = f"relu_{index}"
    traced.recompile()
    return traced.eval()


def build(folder: Path, size: int, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Quantize one ResNet18 with every tool."""
    torch.manual_seed(0)
    model = resnet18()
    calibration = [torch.randn(4, 3, size, size) for _ in range(4)]
    with torch.no_grad():
        for images in calibration * 4:  # BatchNorm statistics of these images, or activations would explode
            model(images)
    model.eval()
    models: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, runtime in zip(PAIRS, ("openvino", "inductor", "onnxruntime", "torch"), strict=True):
        prepared = prepare(model, (calibration[0],), runtime=runtime, observer="mse")
        calibrate(prepared, steps_of(prepared, calibration))
        export(prepared, folder / runtime)
        models[name] = lq.load(folder / runtime, threads=threads)
    models["torchao PT2E int8, Inductor"] = torchao_pt2e(distinct_relus(model), calibration, folder / "pt2e.pt2")
    models["onnxruntime quantize_static int8"] = ort_quantize_static(
        model, calibration, folder / "static.onnx", threads=threads
    )
    models["torch.ao FX int8, onednn"] = torch_ao_fx(model, calibration, "onednn")
    if importlib.util.find_spec("nncf"):
        models["NNCF int8, OpenVINO"] = nncf_quantize(model, calibration, folder / "nncf.onnx", threads)
    return models


def main() -> None:
    """Time all models in interleaved rounds and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31, help="for each instance")
    parser.add_argument("--instances", type=int, default=3, help="of each contestant")
    parser.add_argument("--size", type=int, default=224)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {}
    for _ in range(arguments.instances):
        with tempfile.TemporaryDirectory() as name, torch.no_grad():
            models = build(Path(name), arguments.size, 1)
            image = torch.randn(1, 3, arguments.size, arguments.size)
            calls = {model: functools.partial(predict, image) for model, predict in models.items()}
            for model, times in interleaved(calls, rounds=arguments.rounds).items():
                seconds.setdefault(model, []).extend(times)
    rows = []
    for model, times in seconds.items():
        peer = PAIRS.get(model, "")
        ratio = f"{bootstrap_ratio(times, seconds[peer]):.2f}" if peer in seconds else ""
        to_baseline = f"{bootstrap_ratio(times, seconds[BASELINE]):.2f}"
        rows.append((model, f"{median_ms(times):.2f}", ratio, to_baseline))
    header = ("ResNet18, 1 image", "median CPU ms", "this / the engine's own tool [95 %]", f"this / {BASELINE}")
    publish("engines", table(rows, header))


if __name__ == "__main__":
    main()
