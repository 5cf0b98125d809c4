"""One grid from the recipe to the file: wide and symmetric activations, simulated, exported, run."""

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning_models
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import CASES, calibrated
from torch import nn

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining, load, quantize, runtimes
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.fake_quantize import affine_parameters, fake_quantize
from lightning_quant.numerics.grid import UINT8, Grid, activation_grid, weight_grid
from lightning_quant.ranges.observers import MeanSquaredError
from lightning_quant.recipe.recipe import IntegerSpec, Recipe
from lightning_quant.simulate.parity import PARITY_SAMPLES, Parity, check_parity
from lightning_quant.simulate.prepared import Prepared

SPECS = {
    "wide": IntegerSpec(bits=16),
    "wide symmetric": IntegerSpec(bits=16, symmetric=True),
    "symmetric": IntegerSpec(symmetric=True),
    "four": IntegerSpec(bits=4),
}
SYMMETRIC = activation_grid(8, symmetric=True)


@functools.cache
def made(net: str, spec: str, runtime: str, folder: Path) -> tuple[Prepared, Any, Parity]:
    torch.manual_seed(0)
    case = next(case for case in CASES if case.name == net)
    _, prepared = calibrated(case, runtime=runtime, recipe=Recipe(name="own", activation=SPECS[spec]))
    artifact = export(prepared, folder / f"{net}-{spec}-{runtime}")
    loaded = load(artifact.path, threads=1)
    samples = prepared.samples(PARITY_SAMPLES)
    return prepared, artifact, check_parity(prepared, loaded, prepared.runtime, artifact.model_path, samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


def test_grids_of_recipes() -> None:
    assert Recipe().activation_grid == UINT8 == Grid(0, 255, torch.uint8)
    assert Recipe(activation=IntegerSpec(bits=16)).activation_grid == Grid(0, 65535, torch.uint16)
    assert Recipe().weight_grid == weight_grid(8) == Grid(-127, 127, torch.int8, axis=0, symmetric=True)
    assert [weight_grid(bits).high for bits in (4, 7)] == [7, 63]
    assert [grid.middle for grid in (weight_grid(8), SYMMETRIC)] == [0, 128]
    assert str(SYMMETRIC) == "symmetric [0, 255] in uint8"


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (-3.0, 1.0), (0.0, 6.0), (-2.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("bits", [8, 16])
def test_symmetric_grids_are_those_of_signed_integers(low: float, high: float, bits: int) -> None:
    grid = activation_grid(bits, symmetric=True)
    scale, zero_point = affine_parameters(torch.tensor(low), torch.tensor(high), grid)
    top = 2 ** (bits - 1) - 1
    step = np.float32(max(-low, high) or 1.0) / np.float32(top)
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    expected = np.clip(np.rint(x / step), -top - 1, top).astype(np.float32) * step

    assert (scale.item(), zero_point.item()) == (step, top + 1)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), scale, zero_point, grid).numpy(), expected)


def test_the_range_of_least_error_is_that_of_the_grid() -> None:
    """A ReLU's values take half of a symmetric grid, so that its steps are twice as wide and clipping is cheaper."""
    torch.manual_seed(0)
    data = torch.randn(20_000).abs() ** 3
    ends = []
    for grid in (UINT8, SYMMETRIC, activation_grid(16)):
        observer = MeanSquaredError(grid)
        observer.update(data)
        ends.append(observer.range()[1].item())

    assert ends[1] < ends[0] < ends[2]


@pytest.mark.parametrize(
    ("net", "spec"),
    [("residual", "wide"), ("pooling", "wide"), ("multi_modal", "wide"), ("residual", "wide symmetric")],
)
def test_sixteen_bits_run_on_onnx_runtime_as_simulated(net: str, spec: str, folder: Path) -> None:
    prepared, _, parity = made(net, spec, "onnxruntime", folder)

    assert parity.failures == []
    assert parity.worst_share == 1.0
    # The weights' error is left; that of the activations is 256 times less.
    assert parity.artifact_db > 90
    assert {torch.uint16} == {grid.dtype for grid in [prepared.ranges.grid]}
    with prepared.simulation.recording() as edges, torch.no_grad(), prepared.attached("frozen"):
        args, kwargs = prepared.call()
        prepared.root(*args, **kwargs)
    assert max(integers.int().max().item() for _, integers in edges) > 255


def test_what_has_no_integer_kernels_is_not_said_to_have(folder: Path) -> None:
    prepared, _, _ = made("residual", "wide", "onnxruntime", folder)
    actions = {row.name: row.action for row in prepared.plan.rows}

    assert actions["conv1"] == actions["fc"] == "int8 weights"
    assert actions["add"] == "float"
    assert "int8" not in actions.values()
    assert prepared.plan.coverage == 0
    assert prepared.plan.weight_coverage == 1
    assert all("no integer kernels" in row.reason for row in prepared.plan.rows if row.action != "fused")


def test_sixteen_bits_lose_less(folder: Path) -> None:
    pairs = [made("residual", spec, "onnxruntime", folder)[2].quantization_db for spec in ("wide", "symmetric")]
    assert pairs[0] > pairs[1] + 6


@pytest.mark.parametrize(
    ("runtime", "net"),
    [
        *(("onnxruntime", "residual"), ("onnxruntime", "depthwise"), ("torch", "residual"), ("torch", "mlp")),
        *(("executorch", "mlp"), ("executorch", "depthwise"), ("openvino", "residual")),
    ],
)
def test_symmetric_activations_run_in_integers_as_simulated(runtime: str, net: str, folder: Path) -> None:
    prepared, artifact, parity = made(net, "symmetric", runtime, folder)
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    counts = prepared.runtime.count_operators(artifact.model_path)

    assert parity.failures == []
    assert operators
    assert prepared.runtime.still_float(operators, counts) == {}
    assert {int(prepared.ranges.parameters(edge)[1]) for edge in prepared.ranges.edges} == {128}


@pytest.mark.parametrize(
    ("runtime", "net"),
    [
        ("onnxruntime", "residual"),
        *(pytest.param("onnxruntime", net, marks=pytest.mark.slow) for net in ("depthwise", "mlp", "multi_modal")),
        *(pytest.param("openvino", net, marks=pytest.mark.slow) for net in ("residual", "mlp")),
    ],
)
def test_four_bits_run_in_kernels_of_eight_as_simulated(runtime: str, net: str, folder: Path) -> None:
    prepared, artifact, parity = made(net, "four", runtime, folder)
    operators = tuple(operator for graph in prepared.plan.graphs for operator in graph.operators)
    counts = prepared.runtime.count_operators(artifact.model_path)

    assert parity.failures == []
    assert parity.worst_share == 1.0
    assert prepared.runtime.still_float(operators, counts) == {}
    with prepared.simulation.recording() as edges, torch.no_grad(), prepared.attached("frozen"):
        args, kwargs = prepared.call()
        prepared.root(*args, **kwargs)
    # Ranges of few values leave room above them.
    assert 7 < max(integers.max().item() for _, integers in edges) <= 15


@pytest.mark.parametrize("spec", ["wide", "symmetric"])
def test_training_rounds_to_the_grid(spec: str, tmp_path: Path) -> None:
    recipe = Recipe(name="own", activation=SPECS[spec])
    callback = QuantizationAwareTraining(recipe, output_dir=tmp_path / "artifact")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning_models.fit(lightning_models.Classifier(), callback)

    assert callback.artifact is not None
    assert not [warning for warning in callback.artifact.report["warnings"] if "arity" in warning]


def test_quantize_reports_sixteen_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    with pytest.warns(match="0.0% of the multiply-adds .* no integer kernels"):
        artifact = quantize(model, {"activation": {"bits": 16}}, calibration_data=data, output_dir=tmp_path, threads=1)

    assert artifact.report["still_float"] == {}
    assert "2 int8 weights" in artifact.report_path.read_text()


@pytest.mark.parametrize("runtime", [name for name in runtimes.names() if name != "onnxruntime"])
def test_other_runtimes_refuse_sixteen_bits_at_once(runtime: str, tmp_path: Path) -> None:
    recipe = {"activation": {"bits": 16}}
    message = rf"that runtime '{runtime}' runs .*\[0, 255\] in uint8.*got \[0, 65535\].* Use runtime 'onnxruntime'"
    with pytest.raises(QuantizationError, match=message):
        quantize(nn.Linear(3, 2), recipe, runtime, calibration_data=iter([]), output_dir=tmp_path)
    with pytest.raises(QuantizationError, match=message):
        prepare(nn.Linear(3, 2), (torch.randn(2, 3),), recipe=Recipe(activation=IntegerSpec(bits=16)), runtime=runtime)
    with pytest.raises(MisconfigurationException, match=message):
        lightning_models.fit(
            lightning_models.Classifier(), PostTrainingQuantization(recipe, runtime, output_dir=tmp_path)
        )
