"""Modules that keep the sizes of their last call export with any number of samples, and are left as they were."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.numerics.noise import signal_to_noise


class _Keeping(nn.Module):
    """Makes a mask for the samples of a call, and keeps it until a call has another number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.second(torch.relu(self.first(x))) * self.mask_for(x)

    def mask_for(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Number(_Keeping):
    last = -1

    def mask_for(self, x: Tensor) -> Tensor:
        if x.size(0) != self.last:
            self.last, self.mask = x.size(0), torch.full((x.size(0), 1), 2.0)
        return self.mask


class _Shape(_Keeping):
    mask: Tensor | None = None

    def mask_for(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] != len(x):
            self.mask = torch.full((len(x), 1), 2.0)
        return self.mask


class _Places(_Keeping):
    """As many places as there are samples and heads, kept in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.inner.places = 0

    def mask_for(self, x: Tensor) -> Tensor:
        if self.inner.places != 2 * x.shape[0]:
            self.inner.places = 2 * x.shape[0]
            self.inner.mask = torch.ones(self.inner.places, 1)
        return self.inner.mask.reshape(x.shape[0], 2).sum(1, keepdim=True)


@pytest.mark.parametrize(("recipe", "runtime"), [("int8", "onnxruntime"), ("int8_weight_only", "torch")])
@pytest.mark.parametrize("kind", [_Number, _Shape, _Places])
def test_any_number_of_samples(kind: type[_Keeping], recipe: str, runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    calls = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

    artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, output_dir=tmp_path, threads=1)

    loaded = lq.load(artifact.path)
    assert loaded.signature.inputs[0].shape == ("batch", 6)
    with torch.no_grad():
        for number in (1, 5, 11):
            x = torch.randn(number, 6, generator=torch.Generator().manual_seed(9))
            torch.testing.assert_close(loaded(x), model(x), rtol=0.0, atol=0.1)


def test_what_counts_calls_is_no_size() -> None:
    from lightning_quant.planned.kept_sizes import sizes_forgotten
    from lightning_quant.planned.layerwise import quantize_layers

    model = _Number().eval()
    x = torch.randn(8, 6)
    captured = quantize_layers(model, (x,), recipe="int8_weight_only", runtime="torch")
    model(x)
    before = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    with sizes_forgotten(model, captured):
        model(x)
        # Asked for anew, though the last call had as many.
        assert model.mask is not before["mask"]
        assert model.calls > before["calls"]
    assert {name: value for name, value in vars(model).items() if not name.startswith("_")} == before


class _Masking(nn.Module):
    """Leaves a mask out where nothing is hidden, which it can tell but while it is exported, as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = _Masked(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(len(x), 1)
        if not torch.compiler.is_exporting() and bool((mask == 1).all()):
            mask = None
        return self.head(self.layer(x, mask))


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = torch.relu(self.linear(x))
        return y if mask is None else y * mask


def test_part_called_with_other_arguments_while_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = _Masking().eval(), torch.randn(8, 6)
    artifact = lq.quantize(model, calibration_data=[x], output_dir=tmp_path)
    loaded = lq.load(artifact.path, threads=1)

    assert artifact.report["plan"]["coverage"] == 1.0
    assert loaded(torch.randn(3, 6)).shape == (3, 3)


class _Ghost(nn.Module):
    """Normalizes parts of a batch, as TabNet does: how many there are is a constant of a traced graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).chunk(math.ceil(len(x) / 4))
        return self.second(torch.cat([self.norm(part) for part in parts]).relu())


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_a_graph_of_the_captured_number_of_samples_is_exported_for_that(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, x = _Ghost().eval(), torch.randn(8, 6)
    artifact = lq.quantize(model, calibration_data=[x, x.roll(1, 0)], output_dir=tmp_path)
    assert artifact.signature.inputs[0].shape == (8, 6)
    # PyTorch's graphs print what they raise, which is handled here.
    assert "FX-traced" not in capsys.readouterr().err
    with torch.no_grad():
        assert signal_to_noise(model(x), lq.load(tmp_path)(x)) > 25
