"""What forwards do that exporters do not follow, and that changes no result."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.artifact import artifact as artifacts
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import ExportError
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise


class _Masked(nn.Module):
    """Gives PyTorch's transformers a mask that they look into."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head, self.kind = nn.Linear(3, 16), nn.Linear(16, 2), kind
        layers = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}
        stacks = {"encoder": nn.TransformerEncoder, "decoder": nn.TransformerDecoder}
        self.stack = stacks[kind](layers[kind](16, 2, 32, batch_first=True), 1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), diagonal=1)
        x = self.embed(x)
        return self.head(self.stack(x, mask=mask) if self.kind == "encoder" else self.stack(x, x, tgt_mask=mask))


class _Copying(nn.Module):
    """Makes a module in its forward, which copies the defaults of its state as metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        defaults = {"offset": torch.zeros(2), "same": None}
        defaults["same"] = defaults["offset"]
        copied = copy.deepcopy(defaults)
        assert copied["same"] is copied["offset"]
        return self.second(torch.relu(self.first(x))) + copied["offset"]


class _Looking(_Copying):
    """Keeps an array of what it has seen, which projects show after training."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(torch.relu(self.first(x)))
        self.seen = y.mean(dim=0).detach().cpu().numpy()
        return y


class _Computing(_Looking):
    """Computes with that array."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(self.seen.mean())


def test_an_array_that_is_computed_with_is_not_taken_for_one_that_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"`.mean` of a NumPy array is needed.*return super\(\).forward\(x\)"):
        lq.quantize(_Computing().eval(), "int8", "torch", calibration_data=[torch.randn(4, 6, 3)], output_dir=tmp_path)


@pytest.mark.parametrize(("recipe", "runtime"), [("int8_dynamic", "onnxruntime"), ("int8_weight_only", "torch")])
@pytest.mark.parametrize("kind", ["encoder", "decoder", "copies", "arrays"])
def test_exports(kind: str, recipe: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = {"copies": _Copying, "arrays": _Looking}
    model = (own[kind]() if kind in own else _Masked(kind)).eval()
    calls = [torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    assert "into_only" not in artifact.manifest
    loaded = lq.load(artifact.path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(calls[1]), model(calls[1]), rtol=0.0, atol=0.1)


class _OneHead(nn.Module):
    """Attention over `(N, L, E)`, as U-Nets of diffusion write it, with a mask of as many dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(6, 48), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        mask = torch.tril(x.new_ones(1, x.shape[1], x.shape[1])) > 0
        return self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


class _Data(nn.Module):
    """Reads and writes the data of tensors, as code from before `detach` does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x)) * x.data.std()
        hidden.data[:, 0] = 0
        return self.second(hidden) + self.shift.data


class _Pairs(nn.Module):
    """Two views of the input, multiplied with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pairs = nn.Linear(6, 8), nn.Linear(6, 8), nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.pairs(self.first(x), self.second(x))


@pytest.mark.parametrize(
    ("make", "runtime", "shape"),
    [
        (_OneHead, "onnxruntime", (8, 5, 6)),
        (_Pairs, "executorch", (8, 6)),
        (_Data, "onnxruntime", (8, 6)),
        (_Data, "torch", (8, 6)),
    ],
)
def test_operators_of_another_form_are_exported(
    make: type[nn.Module], runtime: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    pytest.importorskip(runtime)
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    prepared = prepare(model, (x,), runtime=runtime)
    calibrate(prepared, steps_of(prepared, [x]))
    artifact = export(prepared, tmp_path)
    loaded = artifacts.load(artifact.path, threads=1)

    assert prepared.parity(loaded, artifact.model_path).failures == []
    with torch.no_grad():
        assert signal_to_noise([model(x)], [loaded(x)]) > 25


class _Distributed(_Copying):
    """Answers with a distribution's parameters, as forecasters do, or with a sample of it."""

    def __init__(self, *, samples: bool) -> None:
        super().__init__()
        self.samples = samples

    def forward(self, x: Tensor) -> Tensor:
        normal = torch.distributions.Normal(self.second(torch.relu(self.first(x))), 1 + x[:, :2].abs())
        return normal.rsample() if self.samples else normal.stddev + normal.mean


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.parametrize("samples", [False, True])
def test_distributions_are_exported_and_samples_told(samples: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Distributed(samples=samples).eval(), torch.randn(16, 3)
    artifact = lq.quantize(model, "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path / "artifact")
    assert torch.distributions.Distribution._validate_args
    told = [text for text in artifact.report["warnings"] if "draws random numbers, so that `output` is another" in text]
    assert bool(told) is samples
    if not samples:
        torch.testing.assert_close(lq.load(artifact.path)(x), model(x), atol=0.1, rtol=0.1)
