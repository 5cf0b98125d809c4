"""`quantize` from the path of a Lightning checkpoint."""

import sys
import types
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_quant import load, quantize
from lightning_quant.capture.checkpoint import load_module
from lightning_quant.errors import QuantizationError

pytestmark = pytest.mark.usefixtures("unmeasured")

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


class Lit(LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lit, Path]:
    torch.manual_seed(0)
    model = Lit(width=12)
    trainer = lightning_models.make_trainer()
    trainer.strategy.connect(model)
    path = tmp_path_factory.mktemp("checkpoint") / "best.ckpt"
    trainer.save_checkpoint(path)
    return model, path


@pytest.mark.parametrize("given", ["class", "instance"])
@pytest.mark.parametrize("module", [None, "net"])
def test_weights_are_those_of_the_checkpoint(
    given: str, module: str | None, saved: tuple[Lit, Path], tmp_path: Path
) -> None:
    model, path = saved
    lightning_module: Any = Lit if given == "class" else Lit(width=12)
    artifact = quantize(
        path, calibration_data=[X], output_dir=tmp_path, lightning_module=lightning_module, module=module, threads=1
    )
    with torch.no_grad():
        expected = model(X)

    assert (load(artifact.path)(X) - expected).abs().max() < 0.05 * expected.abs().max()


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("given", ["class", "instance"])
@pytest.mark.parametrize("form", ["archive", "pickle"])
def test_code_of_a_checkpoint_runs_only_when_told_so(
    given: str, form: str, saved: tuple[Lit, Path], tmp_path: Path
) -> None:
    path, proof = tmp_path / "other.ckpt", tmp_path / "proof"
    content = {**torch.load(saved[1], weights_only=True), "more": Touches(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    lightning_module: Any = Lit if given == "class" else Lit(width=12)
    with pytest.raises(QuantizationError, match=r"whoever wrote the file: say `trust_checkpoint=True`") as caught:
        quantize(path, calibration_data=[X], output_dir=tmp_path / "a", lightning_module=lightning_module)
    assert (": it names " in str(caught.value)) == (form == "archive")
    assert not proof.exists()
    loaded = load_module(path, lightning_module, trust=True)
    assert proof.exists()
    assert loaded.state_dict().keys() == saved[0].state_dict().keys()


def test_trust_is_not_offered_for_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    with pytest.raises(QuantizationError, match=r"model\.onnx .*`torch\.save` has not written it") as caught:
        load_module(tmp_path / "model.onnx", Lit)
    assert "trust_checkpoint" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04", b"\x80\x02]q\x00.", b"\xff" * 100])
@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoint_are_refused(content: bytes, trust: bool, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(QuantizationError, match=r"x\.ckpt"):
        load_module(tmp_path / "x.ckpt", Lit(), trust=trust)


def test_what_does_not_belong_together_is_refused(saved: tuple[Lit, Path], tmp_path: Path) -> None:
    path = saved[1]
    with pytest.raises(QuantizationError, match="`lightning_module` to be the LightningModule of the checkpoint"):
        quantize(path, calibration_data=[X], output_dir=tmp_path)
    with pytest.raises(QuantizationError, match="size mismatch"):
        load_module(path, Lit(width=5))
    with pytest.raises(QuantizationError, match="with a module 'head'"):
        load_module(path, Lit, "head")
    with pytest.raises(QuantizationError, match=r"nowhere\.ckpt"):
        load_module(tmp_path / "nowhere.ckpt", Lit)
    for wrong in ("Lit", object(), list):
        with pytest.raises(QuantizationError, match="its class or an instance, but got"):
            load_module(path, wrong)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="`ckpt_path` to be the path of a Lightning checkpoint, but got a Lit"):
        load_module(Lit(), Lit)  # type: ignore[arg-type]
    with pytest.raises(QuantizationError, match="with the path of a checkpoint only"):
        quantize(nn.Linear(6, 3), calibration_data=[X], output_dir=tmp_path, module="net")


def test_a_checkpoint_of_a_project_that_is_missing_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = types.ModuleType("some_project.layers")
    project.Config = type("Config", (), {"__module__": "some_project.layers"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_project", types.ModuleType("some_project"))
    monkeypatch.setitem(sys.modules, "some_project.layers", project)
    torch.save({"state_dict": {}, "hyper_parameters": project.Config()}, tmp_path / "best.ckpt")
    monkeypatch.delitem(sys.modules, "some_project.layers")
    monkeypatch.delitem(sys.modules, "some_project")

    with pytest.raises(QuantizationError, match=r"Install the project .* it has objects of 'some_project'"):
        load_module(tmp_path / "best.ckpt", Lit(), trust=True)
