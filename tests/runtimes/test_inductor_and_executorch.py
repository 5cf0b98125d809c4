"""What the contract suite cannot ask of every runtime: the traps of single engines."""

import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from models import CASES, ResidualNet, calibrated, with_statistics
from torch import Tensor, nn

from lightning_quant import load, quantize, runtimes
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import ArtifactError, MissingRuntimeError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.runtimes import executorch, inductor
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def ready(runtime: str) -> Prepared:
    torch.manual_seed(0)
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), runtime=runtime, observer="min_max")
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    return prepared


# --- tables


def test_an_engine_that_adds_in_its_convolution_has_no_quantizer_between() -> None:
    plans = {name: ready(name).plan.graphs[0] for name in ("onnxruntime", "inductor")}
    edges = {name: {edge.key for edge in plan.edges} for name, plan in plans.items()}
    convolutions = {
        name: [o.quantized_output for o in plan.operators if o.kind == "conv2d"] for name, plan in plans.items()
    }

    assert convolutions == {"onnxruntime": [True, True, True], "inductor": [True, True, False]}
    assert edges["inductor"] < edges["onnxruntime"]


def test_simulation_without_rounding_before_an_addition_is_closer_to_float() -> None:
    errors = {}
    for name in ("onnxruntime", "inductor"):
        prepared = ready(name)
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
    operators = ready("inductor").plan.graphs[0].operators

    assert counts == {"qconv_pointwise_tensor": 1, "qlinear_pointwise_tensor": 1, "convolution": 1}
    assert inductor.RUNTIME.still_float(operators, counts) == {"conv2d": 2}


# --- executorch


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prepared = ready("executorch")
    return prepared, export(prepared, tmp_path_factory.mktemp("executorch") / "artifact")


def test_executorch_computes_the_simulation_to_the_bit(program: Any) -> None:
    prepared, artifact = program
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = prepared.root(IMAGE)

    assert torch.equal(load(artifact.path)(IMAGE), simulated)


def test_results_do_not_change_under_the_next_call(program: Any) -> None:
    model = load(program[1].path)
    first = model(IMAGE)
    before = first.clone()
    model(2 * IMAGE)

    assert torch.equal(first, before)


def test_batches_larger_than_the_planned_memory_are_refused(program: Any) -> None:
    model = load(program[1].path)
    limit = executorch._MAX_BATCH

    assert model(IMAGE.repeat(limit // 4, 1, 1, 1)).shape == (limit, 4)
    with pytest.raises(QuantizationError, match=rf"`image` to be at most \({limit}, 3, 8, 8\) large.*smaller batches"):
        model(torch.zeros(limit + 1, 3, 8, 8))


def test_pool_of_threads_does_not_change_under_a_loaded_program(program: Any) -> None:
    held = load(program[1].path)
    current = executorch._program  # the module keeps what it loads alive
    assert current is not None
    from executorch.extension.pybindings import portable_lib

    number = portable_lib._threadpool_get_thread_count()
    with pytest.raises(QuantizationError, match=r"a process has one pool of threads"):
        load(program[1].path, threads=number + 1)
    assert held(IMAGE).shape == (4, 4)
    assert load(program[1].path, threads=number)(IMAGE).shape == (4, 4)


def test_integer_operators_of_xnnpack_are_counted(program: Any) -> None:
    prepared, artifact = program
    counts = executorch.RUNTIME.count_operators(artifact.model_path)
    kinds = Counter(operator.kind for operator in prepared.plan.graphs[0].operators)

    assert counts["XNNConv2d_int8"] == kinds["conv2d"] == 3
    assert counts["XNNAdd_int8"] == kinds["add"] == 1
    assert counts["XNNFullyConnected_int8"] == kinds["linear"] == 1
    assert executorch.RUNTIME.still_float(prepared.plan.graphs[0].operators, {**counts, "XNNConv2d_int8": 1}) == {
        "conv2d": 2
    }


# --- openvino


def test_openvino_files_find_each_other_and_threads_are_passed_on(tmp_path: Path) -> None:
    artifact = export(ready("openvino"), tmp_path / "artifact")
    model: Any = load(artifact.path, threads=1)
    x: Tensor = IMAGE

    assert sorted(artifact.model_files.values()) == ["model.bin", "model.xml"]
    assert model.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert model.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert torch.equal(model(x.double()), model(x))
