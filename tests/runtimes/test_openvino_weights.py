"""Half precision and weight-only on OpenVINO: small on disk, small in memory, and equal to the layers in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layer_models import TokenClassifier, bert, gpt2, tokens
from test_torch import CNN
from torch import Tensor, nn

from lightning_quant import load, verify
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import PlanError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.report.make_report import tensor_bytes
from lightning_quant.runtimes import openvino

X = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 128)).eval()


def saved(model: nn.Module, recipe: str, folder: Path, **call: Tensor) -> tuple[Layerwise, Artifact]:
    quantized = quantize_layers(model, kwargs=call, recipe=recipe, runtime="openvino")
    return quantized, export(quantized, folder)


def constants(artifact: Artifact) -> set[str]:
    """Return the types of the matrices that the compiled model holds."""
    model = openvino.compiled(artifact.model_path, threads=1).get_runtime_model()
    return {
        op.get_output_element_type(0).get_type_name()
        for op in model.get_ordered_ops()
        if op.get_rt_info()["layerType"].astype(str) == "Const" and len(op.get_output_partial_shape(0)) == 2
    }


@pytest.mark.parametrize(("recipe", "ratio"), [("float16", 0.51), ("bfloat16", 0.51), ("int8_weight_only", 0.27)])
@pytest.mark.parametrize("name", ["mlp", "cnn", "bert", "gpt2"])
def test_artifact_computes_what_the_layers_in_memory_do(name: str, recipe: str, ratio: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls: dict[str, tuple[Any, dict[str, Tensor]]] = {
        "mlp": (mlp, {"input": X}),
        "cnn": (CNN, {"image": torch.randn(2, 3, 8, 8)}),
        "bert": (bert, {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}),
        "gpt2": (gpt2, {"input_ids": tokens(2, 7)}),
    }
    build, call = calls[name]
    quantized, artifact = saved(build().eval(), recipe, tmp_path / "artifact", **call)
    parity = quantized.parity(load(artifact.path, threads=1), artifact.model_path)

    assert parity.failures == []
    # Arithmetic alone is between them.
    assert parity.artifact_db > 110
    assert verify(artifact.path).failures == []
    if name == "mlp":
        weights = artifact.model_path.with_name("model.bin").stat().st_size
        assert weights < ratio * tensor_bytes(quantized.root)


def test_integer_weights_stay_integers_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artifact = saved(mlp(), "int8_weight_only", tmp_path / "artifact", input=X)
    assert "i8" in constants(artifact)

    monkeypatch.setattr(openvino, "compress_weights", lambda model: model)
    _, uncompressed = saved(mlp(), "int8_weight_only", tmp_path / "other", input=X)
    assert "i8" not in constants(uncompressed)


@pytest.mark.parametrize("recipe", ["float16", "int8_weight_only"])
def test_recurrent_layers_are_stored_small(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    call = {"tokens": tokens(2, 7)}
    quantized, artifact = saved(TokenClassifier().eval(), recipe, tmp_path / "artifact", **call)
    assert quantized.parity(load(artifact.path), artifact.model_path).failures == []


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **fields: Any) -> None:
        super().__init__()
        self.layer, self.head = kind(64, 64, batch_first=True, **fields), nn.LazyLinear(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning", "ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("recipe", ["int8", "int8_weight_only"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (nn.GRU, {}),
        (nn.RNN, {}),
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 16, "num_layers": 2, "bidirectional": True}),
    ],
    ids=["gru", "rnn", "lstm", "projected"],
)
def test_integers_of_recurrent_layers(recipe: str, kind: type[nn.RNNBase], fields: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Recurrent(kind, **fields).eval(), [torch.randn(4, 9, 64) for _ in range(3)]
    model(data[0])
    if recipe == "int8":
        prepared = prepare(model, (data[0],), recipe=recipe, runtime="openvino")
        calibrate(prepared, steps_of(prepared, data))
        artifact = export(prepared, tmp_path)
    else:
        _, artifact = saved(model, recipe, tmp_path, x=data[0])
    with torch.no_grad():
        assert signal_to_noise(model(data[0]), load(artifact.path, threads=1)(data[0])) > 35
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert artifact.model_path.with_name("model.bin").stat().st_size < 0.4 * weights


@pytest.mark.parametrize(("recipe", "reason"), [("int8_dynamic", "in float"), ("int4_weight_only", "four bits")])
def test_what_openvino_would_not_carry_out_is_refused(recipe: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=rf"a recipe that 'openvino' runs, but got '{recipe}': .*{reason}"):
        quantize_layers(mlp(), (X,), recipe=recipe, runtime="openvino")


class Right(nn.Module):
    """Multiplies by a parameter of its own from the right, which is stored with a scale for each input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_scales_of_inputs_are_right_for_few_rows_and_integers_in_memory(tmp_path: Path) -> None:
    quantized, artifact = saved(Right().eval(), "int8_weight_only", tmp_path / "artifact", x=X[:, :64])
    loaded = load(artifact.path, threads=1)
    for number in (1, 2, 3, 4):
        x = X[:number, :64]
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), quantized.quantized()(x), rtol=0, atol=1e-4)
    assert "i8" in constants(artifact)


class Merged(nn.Module):
    """Adds a product of two stored weights to a third."""

    def __init__(self) -> None:
        super().__init__()
        shapes = (64, 64), (64, 16), (16, 64)
        self.weight, self.left, self.right = (nn.Parameter(torch.randn(shape) / 8) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight + self.left @ self.right)


def test_products_of_weights_fold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized, artifact = saved(Merged().eval(), "int8_weight_only", tmp_path, x=X[:, :64])
    assert quantized.parity(load(artifact.path, threads=1), artifact.model_path).failures == []
    assert artifact.model_path.with_name("model.bin").stat().st_size < 0.4 * tensor_bytes(quantized.root)


class Attending(nn.Module):
    """Multiplies by what is itself a product with a number for each place, and depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        keys = self.layer(x)
        return x @ (keys.transpose(1, 2) * x.mean((1, 2), keepdim=True))


def test_products_of_what_has_no_fixed_shape_leave_the_batch_free(tmp_path: Path) -> None:
    _, artifact = saved(Attending().eval(), "int8_weight_only", tmp_path, x=torch.randn(4, 5, 64))
    assert artifact.signature.inputs[0].shape[0] == "batch"
