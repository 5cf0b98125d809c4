"""What the contract suite cannot ask of every runtime: the traps of single engines."""

import json
import zipfile
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from models import CASES, calibrated
from residual_nets import IMAGE, residual_on
from torch import nn

from lightning_quant import quantize, runtimes
from lightning_quant.errors import ArtifactError, MissingRuntimeError
from lightning_quant.export.prepare import prepare
from lightning_quant.runtimes import inductor

# --- tables


def test_an_engine_that_adds_in_its_convolution_has_no_quantizer_between() -> None:
    plans = {name: residual_on(name).plan.graphs[0] for name in ("onnxruntime", "inductor")}
    edges = {name: {edge.key for edge in plan.edges} for name, plan in plans.items()}
    convolutions = {
        name: [o.quantized_output for o in plan.operators if o.kind == "conv2d"] for name, plan in plans.items()
    }

    assert convolutions == {"onnxruntime": [True, True, True], "inductor": [True, True, False]}
    assert edges["inductor"] < edges["onnxruntime"]


def test_simulation_without_rounding_before_an_addition_is_closer_to_float() -> None:
    errors = {}
    for name in ("onnxruntime", "inductor"):
        prepared = residual_on(name)
        with torch.no_grad():
            expected = prepared.root(IMAGE)
            with prepared.attached("frozen"):
                errors[name] = (prepared.root(IMAGE) - expected).abs().mean().item()
    assert 0 < errors["inductor"] < 1.5 * errors["onnxruntime"]


@pytest.mark.parametrize("runtime", ["inductor", "executorch"])
def test_a_padding_that_no_convolution_takes_up_is_quantized_itself(runtime: str) -> None:
    case = next(case for case in CASES if case.name == "padded")
    _, prepared = calibrated(case, runtime=runtime)
    _, fused = calibrated(case, runtime="openvino")
    operators = prepared.plan.graphs[0].operators

    assert all(not operator.pad for operator in operators)
    assert any(operator.pad for operator in fused.plan.graphs[0].operators)
    assert {":conv1.pad", ":pad"} <= set(prepared.ranges.edges)
    assert not {":conv1.pad", ":pad"} & set(fused.ranges.edges)


# --- inductor


def test_without_a_compiler_inductor_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(MissingRuntimeError, match=r"C\+\+ compiler.*apt install g\+\+"):
        runtimes.get("inductor", exporting=True)
    with pytest.raises(MissingRuntimeError, match=r"C\+\+ compiler"):
        prepare(nn.Linear(6, 3), (torch.randn(2, 6),), runtime="inductor")
    assert runtimes.get("inductor") is inductor.RUNTIME


def test_package_for_another_processor_is_refused_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/x.wrapper_metadata.json", json.dumps({"AOTI_CPU_ISA": "AVX512 AMX_TILE"}))
    monkeypatch.setattr(inductor, "cpu_flags", lambda: {"avx2", "avx512f"})
    with pytest.raises(ArtifactError, match=r"processor with AMX_TILE, for which .*Export on a machine like"):
        inductor._check_processor(path)
    monkeypatch.setattr(inductor, "cpu_flags", lambda: {"avx512f", "amx_tile"})
    inductor._check_processor(path)


@pytest.mark.slow
def test_convolution_of_one_channel_stays_float_where_its_kernel_is_wrong(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()).eval()
    x = torch.randn(4, 1, 8, 8)
    artifact = quantize(model, "int8", "inductor", calibration_data=[x], output_dir=tmp_path, threads=1)
    rows = {row["name"]: row for row in artifact.plan["rows"]}

    assert (rows["0"]["action"], rows["2"]["action"]) == ("float", "int8")
    assert "single channel" in rows["0"]["reason"]
    assert "Parity ok" in artifact.report_path.read_text()


def test_kernels_are_counted_in_the_generated_code(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    calls = ("_qconv_pointwise_tensor(a);", "_qlinear_pointwise_tensor(b);", "convolution(c);")
    code = " ".join(f"aoti_torch_cpu_{call}" for call in calls)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data/x.wrapper.cpp", code)
    counts = inductor.RUNTIME.count_operators(path)
    operators = residual_on("inductor").plan.graphs[0].operators

    assert counts == {"qconv_pointwise_tensor": 1, "qlinear_pointwise_tensor": 1, "convolution": 1}
    assert inductor.RUNTIME.still_float(operators, counts) == {"conv2d": 2}


# --- executorch


# --- openvino
