import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning_models
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.report.make_report import make_report
from lightning_quant.runtimes import openvino
from lightning_quant.simulate.parity import Parity, check_parity, told_apart
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.simulate.ties import tipped_ties


@dataclass
class Exported:
    """A calibrated model and its artifact."""

    prepared: Prepared
    artifact: Artifact
    x: Tensor

    def parity(self, model_path: Path | None = None) -> Parity:
        """Check the artifact's own model file, or another one in its place."""
        runtime = runtimes.get("onnxruntime")
        path = model_path or self.artifact.model_path
        loaded = runtime.load(path.parent, {"model": path.name}, self.artifact.signature, threads=1)
        return check_parity(self.prepared, loaded, runtime, path, [self.x])

    def edited(self, folder: Path, edit: Callable[[onnx.ModelProto], None]) -> Path:
        """Return a copy of the model file with something wrong in it."""
        model = onnx.load(self.artifact.model_path)
        edit(model)
        onnx.save(model, folder / "edited.onnx")
        return folder / "edited.onnx"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    model = lightning_models.ConvNet().eval()
    x = lightning_models.images(16).tensors[0]
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    return Exported(prepared, export(prepared, tmp_path_factory.mktemp("parity")), x)


def multiply(model: onnx.ModelProto, name: str, factor: float) -> None:
    """Multiply a constant of a model."""
    for item in model.graph.initializer:
        if item.name == name:
            item.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(item) * factor).astype("float32"), name))


def scales(model: onnx.ModelProto, operator: str) -> list[str]:
    """Return the names of the scales of all nodes of a type, in order and once each."""
    return list(dict.fromkeys(node.input[1] for node in model.graph.node if node.op_type == operator))


def weight_scales(model: onnx.ModelProto) -> list[str]:
    """Return the names of the scales of all weights, in order; biases have scales of their own."""
    constants = {item.name for item in model.graph.initializer if len(item.dims) > 1}
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    return list(dict.fromkeys(node.input[1] for node in nodes))


def test_right_artifact_has_no_failures(exported: Exported) -> None:
    parity = exported.parity()

    assert parity.failures == []
    assert parity.worst_share == 1.0
    assert parity.worst_operator != ""
    assert parity.artifact_db >= parity.quantization_db + 10
    assert 15 < parity.quantization_db < 60
    assert parity.equal_argmax == 1.0


def test_wrong_weight_scale_fails_at_its_operator(exported: Exported, tmp_path: Path) -> None:
    path = exported.edited(tmp_path, lambda model: multiply(model, weight_scales(model)[0], 1.5))
    parity = exported.parity(path)

    assert parity.worst_share < 0.99
    assert parity.artifact_db < parity.quantization_db + 10
    assert parity.failures[0].startswith(f"at {parity.worst_operator} only ")
    assert "dB" in parity.failures[1]


def test_wrong_scale_of_a_tensor_fails(exported: Exported, tmp_path: Path) -> None:
    path = exported.edited(tmp_path, lambda model: multiply(model, scales(model, "QuantizeLinear")[1], 0.8))

    assert exported.parity(path).failures != []


def test_error_in_the_last_operator_is_found_from_end_to_end(exported: Exported, tmp_path: Path) -> None:
    # The classifier answers in float: there is no quantized tensor behind it to compare.
    path = exported.edited(tmp_path, lambda model: multiply(model, weight_scales(model)[-1], 1.5))
    (failure,) = exported.parity(path).failures

    assert "dB from its simulation" in failure


def test_error_in_one_operator_does_not_blame_those_behind_it(exported: Exported, tmp_path: Path) -> None:
    # Every operator gets the simulation's inputs, so that only the broken one disagrees.
    path = exported.edited(tmp_path, lambda model: multiply(model, weight_scales(model)[0], 1.5))
    first, *_ = exported.prepared.plan.graphs[0].operators

    assert exported.parity(path).worst_operator.endswith(first.output)


def test_failed_parity_leads_the_report(exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "Parity ok" in make_report(exported.prepared, exported.artifact, threads=1).to_markdown()

    path = exported.edited(tmp_path, lambda model: multiply(model, weight_scales(model)[0], 1.5))
    manifest = {**exported.artifact.manifest, "files": {"model": path.name}}
    monkeypatch.setattr(artifacts, "read", lambda folder: Artifact(Path(folder), manifest))
    report = make_report(exported.prepared, Artifact(tmp_path, manifest), threads=1)

    assert report.warnings[0].startswith("parity FAILED: at ")
    assert report.to_markdown().split("\n\n")[1].startswith("**Warning:** parity FAILED")
    assert "Parity FAILED" in report.to_markdown()
    assert report.scalars()["quant/parity_failed"] == 1


def test_checking_leaves_the_model_as_it_was(exported: Exported) -> None:
    model = exported.prepared.root.train()
    before = lightning_models.tensors_of(model)
    exported.parity()

    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert lightning_models.equal_tensors(lightning_models.tensors_of(model), before)


@pytest.mark.parametrize(
    ("parity", "number"),
    [
        (Parity("a", 0.999, 30.0, 40.0, None), 0),
        (Parity("a", 0.9989, 30.0, 40.0, None), 1),
        (Parity("a", 1.0, 30.0, 39.9, None), 1),
        (Parity("a", 0.5, 30.0, 20.0, None), 2),
        (Parity("", 1.0, 30.0, math.inf, 1.0), 0),
        (Parity("a", 1.0, 30.0, math.nan, None), 1),
        (Parity("a", math.nan, 30.0, 60.0, None), 1),
        (Parity("a", 1.0, math.nan, math.inf, None), 1),
        # Ties tip in any other order of float32 arithmetic, so that no artifact of a deep network can be closer.
        (Parity("a", 1.0, 40.0, 42.0, None, (42.0,) * 8), 0),
        (Parity("a", 1.0, 40.0, 41.9, None, (42.0,) * 8), 1),
        (Parity("a", 1.0, 40.0, 40.5, None, (42.0, 44.0) * 4), 0),
        (Parity("a", 1.0, 40.0, 38.0, None, (42.0, 44.0) * 4), 1),
        (Parity("a", 1.0, 40.0, 49.9, None, (90.0, math.inf) * 4), 1),
        (Parity("a", 1.0, 40.0, 49.9, None, (math.inf,) * 8), 1),
        (Parity("a", 1.0, 40.0, math.nan, None, (42.0,) * 8), 1),
    ],
)
def test_what_counts_as_failed(parity: Parity, number: int) -> None:
    assert len(parity.failures) == number


def test_numbers_that_differ_are_never_printed_as_equal() -> None:
    (failure,) = Parity("a", 1.0, 40.0, 49.96, None).failures

    assert "the artifact is 49.96 dB" in failure
    assert "at least 50.00 dB are needed" in failure
    assert told_apart(1.0, 2.0) == ("1.0", "2.0")


def test_what_predictions_are_equal_to_is_said(exported: Exported) -> None:
    assert "100.0% equal predictions of simulated and artifact" in str(exported.parity())


def test_argmax_is_compared_for_class_scores_only(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 5)
    prepared = prepare(nn.Sequential(nn.Linear(5, 4)), (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    artifact: Any = export(prepared, tmp_path)

    assert Exported(prepared, artifact, x).parity().equal_argmax is None


class Residual(nn.Module):
    """Two convolutions whose result is added to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def simulated(prepared: Prepared, x: Tensor) -> Tensor:
    """Return what the simulation answers."""
    with torch.no_grad(), prepared.attached("frozen"):
        return prepared.root(x)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_deep_network_is_as_far_from_its_artifact_as_tipped_ties_can_bring_it(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), *(Residual(16) for _ in range(12))), torch.randn(4, 3, 24, 24)
    with torch.no_grad():
        model(x)
    prepared = prepare(model.eval(), (x,), runtime=runtime)
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path / "artifact")
    loaded = artifacts.load(artifact.path, threads=1)
    parity = check_parity(prepared, loaded, runtimes.get(runtime), artifact.model_path, [x])

    draws = parity.ties_db or tipped_ties(prepared, (x,), {}, simulated(prepared, x))[0]
    assert parity.failures == []
    assert min(draws) < 60
    assert parity.artifact_db > min(draws) - 1
    # A simulation whose ties were not tipped again is still the same to the bit.
    with torch.no_grad(), prepared.attached("frozen"):
        assert torch.equal(model(x), model(x))


class Sums(nn.Module):
    """Few layers, one of them a residual sum, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(y + self.second(y))
        return self.head(nn.functional.max_pool2d(y, 2).flatten(1))


def exported_on(runtime: str, model: nn.Module, x: Tensor, folder: Path) -> tuple[Prepared, Artifact, Parity]:
    """Calibrate and export a model, and check it."""
    prepared = prepare(model.eval(), (x,), runtime=runtime)
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, folder)
    loaded = artifacts.load(artifact.path, threads=1)
    return prepared, artifact, check_parity(prepared, loaded, runtimes.get(runtime), artifact.model_path, [x])


@pytest.mark.parametrize("seed", range(3))
def test_pixels_on_rounding_ties_are_no_failure(seed: int, tmp_path: Path) -> None:
    # In a range of [0, 1] eight sixteenths lie between two integers, and OpenVINO rounds them all to the other one.
    torch.manual_seed(seed)
    x = (torch.rand(32, 1, 8, 8) * 16).round() / 16
    prepared, artifact, parity = exported_on("openvino", Sums(), x, tmp_path)

    assert parity.failures == []
    assert parity.artifact_db > parity.quantization_db + 40
    # They are what brings the file away from its simulation on the pixels as they are.
    here = artifacts.load(artifact.path, threads=1)(x)
    assert signal_to_noise(simulated(prepared, x), here) < parity.quantization_db + 10


def test_sum_rounded_in_another_order_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Each operator alone is right: OpenVINO leaves out the rounding between a convolution and the sum that it fuses.
    monkeypatch.setattr(openvino.RUNTIME, "TABLE", dataclasses.replace(openvino.RUNTIME.TABLE, fuses_add=False))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), *(Residual(16) for _ in range(4))), torch.randn(4, 3, 16, 16)
    *_, parity = exported_on("openvino", model, x, tmp_path)
    (failure,) = parity.failures

    assert parity.worst_share == 1.0
    assert "dB from itself with its rounding ties tipped" in failure


class Padded(nn.Module):
    """A convolution over zeros, or over another number, and an average that counts what it pads with."""

    def __init__(self, padding: float = 0.0, averaged: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.padding, self.averaged = padding, averaged

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(nn.functional.pad(x, (1, 1, 1, 1), value=self.padding))
        y = nn.functional.avg_pool2d(nn.functional.pad(y, (1, 1, 1, 1), value=self.averaged), 3, 2)
        return self.second(y)


def clipped(x: Tensor) -> Tensor:
    """Round as kernels do whose sums saturate."""
    return torch.round(x).clamp(-20, 20)


@pytest.mark.parametrize("fault", ["padding", "padded average", "saturation", "five decibels", "truncation"])
def test_faults_fail_from_end_to_end_on_runtimes_that_cannot_run_single_operators(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(16, 3, 8, 8)
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    wrong = prepared.bound_to(Padded(*{"padding": (0.1, 0.0), "padded average": (0.0, -0.5)}.get(fault, (0.0, 0.0))))
    wrong.root.load_state_dict(model.state_dict())
    wrong.root.eval()

    def artifact(x: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            if fault in ("saturation", "truncation"):
                rounding = clipped if fault == "saturation" else torch.floor
                patch.setattr(wrong.simulation, "_round", rounding)
            y = simulated(wrong, x)
        return y + 0.56 * y.std() * torch.randn_like(y) if fault == "five decibels" else y

    parity = check_parity(prepared, artifact, runtimes.get("inductor"), Path(), [x])  # type: ignore[arg-type]
    monkeypatch.undo()
    right = check_parity(
        prepared,
        lambda x: simulated(prepared, x),
        runtimes.get("inductor"),
        Path(),
        [x],  # type: ignore[arg-type]
    )

    assert right.failures == []
    assert len(parity.failures) == 1


def test_second_answer_is_compared(exported: Exported) -> None:
    class OnceRight(nn.Module):
        """Answers rightly once, as OpenVINO does where it writes over constants."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.loaded = artifacts.load(exported.artifact.path, threads=1)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.loaded(x) + (self.calls > 1)

    path = exported.artifact.model_path
    parity = check_parity(exported.prepared, OnceRight(), runtimes.get("onnxruntime"), path, [exported.x])

    assert "from its simulation" in parity.failures[0]
