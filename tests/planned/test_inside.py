"""Artifacts without a program: layers and tensors that a module of the user's takes, whatever its code does."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import lightning_quant as lq
from lightning_quant.errors import ArtifactError, CaptureError, ExportError, UntraceableError
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.planned.layerwise import quantize_layers

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
_RECIPES = ("int8_dynamic", "int8_weight_only")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 16)

    def scores(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class _Scaling(_Net):
    """Reads a number that is no whole one, which no file can answer for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x) * float(x.abs().max())


class _Distribution(_Net):
    """Returns what is no tensor."""

    def forward(self, x: Tensor) -> Normal:
        scores = self.scores(x)
        return Normal(scores, scores.exp())


class _Generating(_Net):
    """Goes on until a value is reached, as code that generates does."""

    def forward(self, x: Tensor, *, limit: float = 3.0) -> Tensor:
        steps = [x]
        while float(steps[-1].norm()) < limit * float(x.norm()) and len(steps) < 5:
            steps.append(steps[-1] + self.scores(steps[-1]))
        return torch.stack(steps, 1)


class _Sampling(_Net):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x + torch.randn_like(x)) * float(x.max())


class _Opaque:
    """Says nothing of what it holds but through methods."""

    __slots__ = ("_rows", "name")

    def __init__(self, rows: Any, name: Any) -> None:
        self._rows, self.name = rows, name

    def rows(self) -> Tensor:
        return self._rows


class _OfObjects(_Net):
    """Takes objects with what no file can hold in them."""

    def forward(self, batch: _Opaque, weigh: Any = None) -> dict[str, Any]:
        scores = self.scores(batch.rows())
        return {"scores": scores if weigh is None else weigh(scores)}


@dataclass
class _Batch:
    x: Tensor
    lengths: Tensor


class _Packing(_Net):
    """Packs a dataclass's sequences, and reads a share of them in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(16, 16, batch_first=True)

    def forward(self, batch: _Batch) -> Tensor:
        pack = nn.utils.rnn.pack_padded_sequence
        packed, _ = self.rnn(pack(batch.x, batch.lengths.cpu(), batch_first=True, enforce_sorted=False))
        padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
        return self.scores(padded) * float(batch.lengths.float().mean())


def _x(number: int = 12) -> Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(number))


def _batch(number: int = 12) -> _Batch:
    x = torch.randn(number, 5, 16, generator=torch.Generator().manual_seed(number))
    return _Batch(x, 1 + torch.arange(number) % 5)


_CALLS: dict[type[_Net], Any] = {
    _Scaling: _x,
    _Distribution: _x,
    _Generating: _x,
    _Sampling: _x,
    _OfObjects: lambda number=12: {"batch": _Opaque(_x(number), "rows"), "weigh": torch.tanh},
    _Packing: lambda number=12: (_batch(number),),
}


def _made(kind: type[_Net]) -> _Net:
    torch.manual_seed(0)
    return kind().eval()


def _answer(model: nn.Module, kind: type[_Net], number: int) -> list[Tensor]:
    call = _CALLS[kind](number)
    args, kwargs = ((), call) if isinstance(call, dict) else (call if isinstance(call, tuple) else (call,), {})
    torch.manual_seed(1)
    with torch.no_grad():
        output = model(*args, **kwargs)
    return [output.loc, output.scale] if isinstance(output, Normal) else [*torch.utils._pytree.tree_leaves(output)]


@pytest.mark.parametrize(("kind", "recipe"), [*zip(_CALLS, itertools.cycle(_RECIPES))])
def test_a_module_that_no_exporter_takes_becomes_an_artifact_for_itself(
    kind: type[_Net], recipe: str, tmp_path: Path
) -> None:
    model = _made(kind)
    artifact = lq.quantize(model, recipe, "torch", calibration_data=[_CALLS[kind]()], output_dir=tmp_path, threads=1)

    report: Any = artifact.report
    assert artifact.manifest["into_only"]
    assert set(artifact.model_files.values()) == {"model.safetensors"}
    assert report["artifact_bytes"] == artifact.model_path.stat().st_size < 0.6 * report["float_bytes"]
    assert any("no program" in note and "load(path, into=model)" in note for note in report["notes"])
    assert not any("parity" in warning.lower() for warning in report["warnings"])
    assert report["parity"]["float_artifact_db"] > 25
    assert "forward" not in vars(model)
    assert not any(isinstance(m, StoredLayer) for m in model.modules())

    filled = lq.load(tmp_path, into=kind())
    assert type(filled) is kind
    assert isinstance(filled.first, StoredLayer)
    # Another number of samples, and other decisions, than in the captured call.
    for expected, actual in zip(_answer(model, kind, 7), _answer(filled, kind, 7), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_what_loads_it_without_a_module_is_told_what_to_type(tmp_path: Path) -> None:
    lq.quantize(_made(_Scaling), "int8_dynamic", "torch", calibration_data=[_x()], output_dir=tmp_path, threads=1)
    for function in (lq.load, lq.verify):
        with pytest.raises(ArtifactError, match=r"Expected `into` .*Type `load\(path, into=model\)`.*float"):
            function(tmp_path)
    assert lq.verify(tmp_path, into=_Scaling()).identical
    assert 'load(".", into=module)' in (tmp_path / "report.md").resolve().read_text()


def test_a_call_of_structures_is_not_verified_by_others_than_its_code(tmp_path: Path) -> None:
    lq.quantize(_made(_Packing), "int8_dynamic", "torch", calibration_data=[(_batch(),)], output_dir=tmp_path)
    with pytest.raises(ArtifactError, match="only your own code can build"):
        lq.verify(tmp_path, into=_Packing())


def test_what_has_a_program_keeps_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    artifact = lq.quantize(model, "int8_dynamic", "torch", calibration_data=[_x()], output_dir=tmp_path, threads=1)
    assert "into_only" not in artifact.manifest
    assert lq.load(tmp_path)(_x(3)).shape == (3, 16)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8"])
def test_where_a_program_is_needed_the_way_without_one_is_named(recipe: str, tmp_path: Path) -> None:
    with pytest.raises((ExportError, UntraceableError), match=r"'int8_dynamic'.*`runtime=\"torch\"`"):
        lq.quantize(_made(_Distribution), recipe, "onnxruntime", calibration_data=[_x()], output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_call_that_does_not_fit_is_refused_as_ever() -> None:
    with pytest.raises(CaptureError, match="fits `forward"):
        quantize_layers(_made(_OfObjects), (), {"none": _x()}, recipe="int8_dynamic", runtime="torch")
