import json
from collections.abc import Callable
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_quant import load, quantize, verify
from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import ArtifactError
from lightning_quant.runtimes.onnxruntime import OnnxRuntimeModule

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Positive(nn.Module):
    """Weights and inputs of one sign, as after ReLU and in many real layers, fill 16 bits quickly."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.fc.weight.data.abs_()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


X = 0.7 + 0.3 * torch.rand(8, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    return quantize(Positive(), calibration_data=[X], output_dir=tmp_path_factory.mktemp("verify") / "full")


def linear_in_integers(path: Path, x: np.ndarray, pair_limit: float) -> np.ndarray:
    """Compute an exported linear layer as x86 kernels do: products of u8 and s8, added in pairs within a limit."""
    graph = onnx.load(path).graph
    values = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    quantize_input = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    scale, zero = (values[name] for name in quantize_input.input[1:3])
    (weight,) = (v for v in values.values() if v.dtype == np.int8 and v.ndim == 2)
    (bias,) = (v for v in values.values() if v.dtype == np.int32 and v.ndim == 1 and len(v) == 4 and v.any())
    weight = weight if weight.shape == (4, 16) else weight.T
    weight_scale = next(
        values[node.input[1]]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and values.get(node.input[0]) is not None
        and values[node.input[0]].ndim == 2
    )
    integers = np.clip(np.rint(x / scale) + zero, 0, 255)
    products = integers[:, None, :] * weight[None].astype(np.float64)
    pairs = np.clip(products.reshape(len(x), 4, 8, 2).sum(-1), -pair_limit - 1, pair_limit)
    sums = pairs.sum(-1) - int(zero) * weight.sum(1) + bias
    return (sums * (scale * weight_scale)).astype(np.float32)


def answering(monkeypatch: pytest.MonkeyPatch, function: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Let this machine's kernels be others."""
    monkeypatch.setattr(OnnxRuntimeModule, "run", lambda self, tensors: function(tensors))


def test_same_machine_gives_the_same_values(artifact: Artifact) -> None:
    result = verify(artifact.path, threads=1)

    assert result.identical
    assert result.failures == []
    assert result.largest_difference == 0
    assert result.agreement_db == float("inf")
    assert result.quantization_db == result.here_db
    assert 20 < result.here_db < 80
    assert result.equal_argmax == 1
    assert str(result).startswith("Verification ok: outputs are identical")


def test_kernels_that_saturate_are_found(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(limit: float) -> Callable[[list[Tensor]], list[Tensor]]:
        return lambda tensors: [torch.from_numpy(linear_in_integers(artifact.model_path, tensors[0].numpy(), limit))]

    # The same arithmetic without the limit is the runtime's own, so what is found below is the saturation.
    torch.testing.assert_close(run(np.inf)([X])[0], load(artifact.path)(X), rtol=1e-5, atol=1e-6)
    answering(monkeypatch, run(np.inf))
    assert verify(artifact.path).failures == []
    answering(monkeypatch, run(2**15 - 1))
    result = verify(artifact.path)

    assert not result.identical
    assert result.agreement_db < result.quantization_db + 10
    (failure,) = result.failures
    assert 'has no VNNI, quantize with recipe "int8_reduce_range"' in failure
    assert str(result).startswith("Verification FAILED")


def test_seven_bit_weights_do_not_saturate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    reduced = quantize(Positive(), "int8_reduce_range", calibration_data=[X], output_dir=tmp_path)
    answering(
        monkeypatch,
        lambda tensors: [torch.from_numpy(linear_in_integers(reduced.model_path, tensors[0].numpy(), 2**15 - 1))],
    )

    assert verify(tmp_path).failures == []


def test_weights_of_one_bit_less_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Linear(64, 8), torch.randn(16, 64)
    for recipe in ("int8", "int8_reduce_range"):
        quantize(model, recipe, calibration_data=[x], output_dir=tmp_path / recipe)
    other, run = load(tmp_path / "int8_reduce_range"), OnnxRuntimeModule.run
    answering(monkeypatch, lambda tensors: run(other, tensors))  # type: ignore[arg-type]
    result = verify(tmp_path / "int8")

    assert result.failures
    assert result.agreement_db < result.quantization_db + 10


def test_last_bits_of_float_sums_are_no_failure(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden.load(artifact.golden_path, artifact.signature).artifact_outputs[0]
    answering(monkeypatch, lambda tensors: [recorded * (1 + 1e-6)])
    result = verify(artifact.path)

    assert result.failures == []
    assert not result.identical
    assert "dB from those recorded" in str(result)


def test_values_that_are_not_finite_are_found(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden.load(artifact.golden_path, artifact.signature).artifact_outputs[0]
    for value in (float("nan"), float("inf")):
        wrong = recorded.clone()
        wrong[0, 0] = value
        answering(monkeypatch, lambda tensors, wrong=wrong: [wrong])
        assert verify(artifact.path).failures


def test_other_forms_of_output_are_refused(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda tensors: [tensors[0]])
    with pytest.raises(ArtifactError, match=r"outputs \['output'\] of the form .* as recorded, but got"):
        verify(artifact.path)


class WithMask(nn.Module):
    """Class scores with infinities, and predictions as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.fc(x)
        return scores.masked_fill(torch.tensor([True, False, False, False]), float("-inf")), scores.argmax(1)


def test_masks_and_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(WithMask(), calibration_data=[X], output_dir=tmp_path)
    result = verify(tmp_path)
    assert result.identical
    assert result.equal_integers == 1
    assert result.failures == []
    assert 20 < result.quantization_db < 80
    run = OnnxRuntimeModule.run

    def flipped(self: OnnxRuntimeModule, tensors: list[Tensor]) -> list[Tensor]:
        scores, best = run(self, tensors)
        return [scores, (best + 1) % 4]

    monkeypatch.setattr(OnnxRuntimeModule, "run", flipped)
    result = verify(tmp_path)
    assert result.equal_integers == 0
    assert result.failures == ["only 0.0% of the integer outputs are those recorded"]


class Divides(nn.Module):
    """A mean over the marked places of a row, which is no number where none is."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * mask.sum(1, keepdim=True) / mask.sum(1, keepdim=True)


def test_outputs_that_are_no_numbers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(Divides(), "int8_weight_only", calibration_data=[(X, torch.ones(8, 3))], output_dir=tmp_path)
    answering(monkeypatch, lambda tensors: [torch.full((4, 4), float("nan"))])

    assert "100.00% of the outputs are NaN where the float model has a number" in " ".join(verify(tmp_path).failures)


def test_damage_is_found_first(artifact: Artifact, tmp_path: Path) -> None:
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    for name in manifest["files"].values():
        (tmp_path / name).write_bytes((artifact.path / name).read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(tmp_path).identical
    (tmp_path / manifest["files"]["golden"]).write_bytes(b"")
    with pytest.raises(ArtifactError, match="content has changed"):
        verify(tmp_path)
