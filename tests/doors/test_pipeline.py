import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_models
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning_models import ConvNet, decibels, equal_tensors, images, tensors_of
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant import Recipe, load, quantize
from lightning_quant.errors import (
    ArtifactError,
    CalibrationError,
    CaptureError,
    MissingRuntimeError,
    PlanError,
    QuantizationError,
)
from lightning_quant.recipe.recipe import IntegerSpec

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        joint = F.relu(self.left(a)) + gain * F.relu(self.right(b))
        return {"scores": self.head(joint), "joint": joint}


class Attention(nn.Module):
    """Asks for a size, so that each layer has a graph of its own; three of them read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 100:
            x = x[:, -100:]
        weights = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), -1)
        return self.out(weights @ self.value(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def int8_weights(path: Path) -> list[np.ndarray]:
    """Return the integer weights of an ONNX file, widest first."""
    arrays = [numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer]
    return sorted((array for array in arrays if array.dtype == np.int8 and array.ndim > 1), key=lambda a: -a.size)


def actions(artifact: Any) -> dict[str, str]:
    return {row["name"]: row["action"] for row in artifact.plan["rows"]}


# --- the whole path


def test_quantizes_measures_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = ConvNet()
    model.train()
    before, flags = tensors_of(model), [module.training for module in model.modules()]
    x = images(32).tensors[0]
    artifact = quantize(model, calibration_data=iter([x[:16], x[16:]]), output_dir=tmp_path)

    assert equal_tensors(tensors_of(model), before)
    assert [module.training for module in model.modules()] == flags
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert artifact.path == tmp_path
    assert set(actions(artifact).values()) <= {"int8", "fused"}
    assert artifact.report["parity"]["worst_share"] >= 0.999
    assert {"calibrate", "export"} <= set(artifact.report["seconds"])
    with torch.no_grad():
        assert decibels(model.eval()(x), load(tmp_path)(x)) > 25


def test_ranges_come_from_all_of_the_data(tmp_path: Path) -> None:
    x = torch.rand(8, 6)
    recipe = Recipe(name="min_max", calibration_observer="min_max")
    artifact = quantize(mlp(), recipe, calibration_data=[x, 4 * x, 2 * x], output_dir=tmp_path)

    assert lightning_models.activation_scales(artifact.model_path)[0] == pytest.approx(4 * x.max().item() / 255)


def test_default_folder_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(mlp(), calibration_data=[torch.randn(4, 6)])

    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]
    assert load("quantized")(torch.randn(3, 6)).shape == (3, 3)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda a, b: (a, b), id="tuple"),
        pytest.param(lambda a, b: [a, b], id="list"),
        pytest.param(lambda a, b: {"a": a, "b": b, "gain": 0.5}, id="dict"),
    ],
)
def test_calls_with_several_arguments(wrap: Any, tmp_path: Path) -> None:
    model = TwoInputs()
    a, b = torch.randn(8, 6), torch.randn(8, 4)
    call = wrap(a, b)
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    quantize(model, calibration_data=[call, wrap(2 * a, 2 * b)], output_dir=tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        expected, actual = model(*args, **kwargs), loaded(*args, **kwargs)

    assert list(actual) == ["scores", "joint"]
    assert decibels(expected["scores"], actual["scores"]) > 20
    assert decibels(expected["joint"], actual["joint"]) > 20


def test_one_tensor_per_call(tmp_path: Path) -> None:
    quantize(mlp(), calibration_data=torch.randn(5, 8, 6).unbind(0), output_dir=tmp_path)

    assert load(tmp_path)(torch.randn(3, 6)).shape == (3, 3)


def test_generator_is_read_once_and_to_its_end(tmp_path: Path) -> None:
    given = []

    def calls() -> Iterator[Tensor]:
        for _ in range(3):
            given.append(torch.randn(4, 6))
            yield given[-1]

    quantize(mlp(), calibration_data=calls(), output_dir=tmp_path)

    assert len(given) == 3


def test_torch_and_the_models_gradients_are_undisturbed(tmp_path: Path) -> None:
    model = mlp()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    quantize(model, calibration_data=[torch.ones(4, 6)], output_dir=tmp_path)

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert torch.is_grad_enabled()


# --- recipes


def test_seven_bit_weights(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = mlp()
    full = int8_weights(quantize(model, "int8", calibration_data=[x], output_dir=tmp_path / "full").model_path)
    reduced = quantize(model, "int8_reduce_range", calibration_data=[x], output_dir=tmp_path / "reduced")
    narrow = int8_weights(reduced.model_path)

    assert len(full) == len(narrow) == 2
    assert all(np.abs(weight).max() == 127 for weight in full)
    assert all(np.abs(weight).max() == 63 for weight in narrow)
    assert reduced.manifest["recipe"] == "int8_reduce_range"
    with torch.no_grad():
        assert decibels(model(x), load(tmp_path / "reduced")(x)) > 20


def test_recipe_of_ones_own(tmp_path: Path) -> None:
    weight = IntegerSpec(bits=4, symmetric=True, per_channel=True)
    recipe = Recipe(name="four", weight=weight)
    artifact = quantize(mlp(), recipe, calibration_data=[torch.randn(16, 6)], output_dir=tmp_path)

    assert all(np.abs(weight).max() == 7 for weight in int8_weights(artifact.model_path))
    assert artifact.manifest["recipe"] == "four"


# --- include and exclude


def test_excluded_layer_stays_float_with_its_reason(tmp_path: Path) -> None:
    artifact = quantize(mlp(), calibration_data=[torch.randn(16, 6)], output_dir=tmp_path, exclude=["2"])
    rows = {row["name"]: row for row in artifact.plan["rows"]}

    assert rows["0"]["action"] == "int8"
    assert rows["2"]["action"] == "float"
    assert rows["2"]["reason"] == 'excluded by "2"'
    assert len(int8_weights(artifact.model_path)) == 1
    assert 'excluded by "2"' in artifact.report_path.read_text()


def test_included_layers_only(tmp_path: Path) -> None:
    x = images(8).tensors[0]
    artifact = quantize(ConvNet(), calibration_data=[x], output_dir=tmp_path, include=["Linear"])

    assert {name for name, action in actions(artifact).items() if action == "int8"} == {"head"}
    assert len(int8_weights(artifact.model_path)) == 1


# --- refusals


def test_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    for data in ([], iter(()), None):
        with pytest.raises(QuantizationError, match=r"`calibration_data` to hold at least one call"):
            quantize(mlp(), calibration_data=data, output_dir=folder)
    assert not folder.exists()


def test_unknown_recipe_and_runtime(tmp_path: Path) -> None:
    x = [torch.randn(4, 6)]
    with pytest.raises(QuantizationError, match=r"`recipe` to be one of .*'int8'.*'int8_reduce_range'.* got 'int5'"):
        quantize(mlp(), "int5", calibration_data=x, output_dir=tmp_path)
    with pytest.raises(QuantizationError, match=r"`runtime` to be one of .*'onnxruntime'.* got 'tensorrt'"):
        quantize(mlp(), runtime="tensorrt", calibration_data=x, output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_runtime_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else find_spec(name, *rest)
    )
    with pytest.raises(MissingRuntimeError, match=r"onnxscript is missing: pip install onnxruntime onnx onnxscript"):
        quantize(mlp(), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)


def test_pattern_that_matches_nothing(tmp_path: Path) -> None:
    for argument in ("include", "exclude"):
        with pytest.raises(PlanError, match=rf"`{argument}` .*'encoder', which matches nothing\. Names here are 0"):
            quantize(mlp(), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path, **{argument: ["encoder"]})


def test_model_without_layers(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="something to quantize, but there is nothing"):
        quantize(nn.Sequential(nn.ReLU()), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)


def test_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="Choose another folder"):
        quantize(mlp(), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "mse"])
def test_values_that_are_not_finite(value: float, observer: str, tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    bad = x.clone()
    bad[1, 2] = value
    recipe = Recipe(name=observer, calibration_observer=observer)
    with pytest.raises(CalibrationError, match=r"Expected finite values at \S*input"):
        quantize(mlp(), recipe, calibration_data=[x, bad, x], output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_call_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"fits `forward\(a, b, \*, gain=1\.0\)`.* missing a required argument: 'b'"):
        quantize(TwoInputs(), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)


def test_input_that_does_not_exist_in_dynamic_shapes(tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=r"`dynamic_shapes` to name inputs out of .*'input'.* got 'image'"):
        quantize(
            mlp(), calibration_data=[torch.randn(4, 6)], output_dir=tmp_path, dynamic_shapes={"image": {1: "width"}}
        )
    assert list(tmp_path.iterdir()) == []


# --- recipes of layers


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_refused_layers_leave_the_artifact_of_before(runtime: str, tmp_path: Path) -> None:
    quantize(mlp(), "int8_weight_only", runtime, calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for model, recipe in (
        (nn.Sequential(nn.ReLU()), "int8_dynamic"),
        (mlp(), {"name": "int8_dynamic", "floor_db": 200}),
        (mlp(), {"name": "int8_dynamic", "schemes": ["int3"]}),
    ):
        with pytest.raises(QuantizationError):
            quantize(model, recipe, runtime, calibration_data=[torch.randn(4, 6)], output_dir=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_fallback_to_float_below_the_share_has_failed(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 1e4
    x = torch.randn(8, 64)
    x[:, 0] = 0
    artifact = quantize(model, "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path)
    rows = {row["name"]: row for row in artifact.plan["rows"]}
    assert (rows["0"]["action"], rows["1"]["action"]) == ("float", "int8 weights")
    assert "dB signal-to-noise where 20 are wanted" in rows["0"]["reason"]
    share = 8 / (64 + 8)
    assert artifact.plan["stored_share"] == pytest.approx(share)
    text = artifact.report_path.read_text()
    assert f"int8_weight_only FAILED: only {share:.1%} of the weights' values" in text
    assert rows["0"]["reason"] in text
    with torch.no_grad():
        assert decibels(model(x), load(tmp_path)(x)) > 30
    # Without what fell back, or with a lower demand, nothing has failed.
    for options in ({"exclude": ["0"]}, {}):
        recipe = {"name": "int8_weight_only", "min_stored_share": 0.75 if options else 0.1}
        artifact = quantize(model, recipe, "torch", calibration_data=[x], output_dir=tmp_path, **options)
        assert "FAILED" not in artifact.report_path.read_text()


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_several_parts_that_read_one_tensor(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(8, 5, 8)
    artifact = quantize(model, "int8", runtime, calibration_data=[x], output_dir=tmp_path)
    # The two products of the attention have no weights and stay float; all layers run in integers.
    assert [row["name"] for row in artifact.plan["rows"] if row["weights"] and row["action"] != "int8"] == []
    assert "Parity ok" in artifact.report_path.read_text()
    with torch.no_grad():
        assert decibels(model(x), load(tmp_path)(x)) > 25


def test_sizes_that_vary_between_calls_may_vary(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1)).eval()
    calls = [torch.randn(2, 3, 9), torch.randn(4, 3, 12)]
    quantize(model, "int8_weight_only", "torch", calibration_data=calls, output_dir=tmp_path / "varies")
    quantize(model, "int8_weight_only", "torch", calibration_data=calls[:1], output_dir=tmp_path / "fixed")
    x = torch.randn(3, 3, 20)
    with torch.no_grad():
        assert decibels(model(x), load(tmp_path / "varies")(x)) > 30
    with pytest.raises(QuantizationError, match="to have shape"):
        load(tmp_path / "fixed")(x)


def test_sensitivity_on_request(tmp_path: Path) -> None:
    calls = [torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = quantize(mlp(), calibration_data=calls, output_dir=tmp_path / "int8", threads=1, sensitivity=True)
    assert {layer["name"] for layer in found.report["sensitivity"]["layers"]} == {"0", "2"}
    assert found.report["sensitivity"]["gains"] == {}
    assert quantize(mlp(), calibration_data=iter(calls), output_dir=tmp_path / "int8").report["sensitivity"] is None
    with pytest.raises(QuantizationError, match="calibrated for `sensitivity`, such as 'int8', but got 'int8_dynamic'"):
        quantize(mlp(), "int8_dynamic", calibration_data=calls, output_dir=tmp_path / "none", sensitivity=True)
