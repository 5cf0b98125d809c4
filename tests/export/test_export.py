"""An artifact is written of a calibrated model, and tried before there is one."""

from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from prepared_graphs import evaluated
from torch import nn

from lightning_quant.artifact import golden
from lightning_quant.errors import ExportError
from lightning_quant.export.export import export, trial_export
from lightning_quant.export.prepare import prepare

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_an_artifact_says_what_it_was_made_of_and_for_what(tmp_path: Path) -> None:
    seconds: dict[str, float] = {}
    model = evaluated(net(), X)
    artifact = export(model, tmp_path / "artifact", classes=("cat", "dog", "cow"), seconds=seconds)

    assert (artifact.manifest["recipe"], artifact.manifest["runtime"]) == ("int8", "onnxruntime")
    assert artifact.classes == ("cat", "dog", "cow")
    assert "the forward of Sequential alone" in artifact.manifest["outside"]
    assert f"`input` lay in [{X.min():.4g}, {X.max():.4g}]" in artifact.manifest["outside"]
    assert set(seconds) == {"convert", "export"}
    batch = golden.load(artifact.golden_path, artifact.signature)
    torch.testing.assert_close(batch.float_outputs[0], model.root(batch.inputs[0]).detach())


def test_labels_without_a_score_for_each_are_left_out(tmp_path: Path) -> None:
    assert export(evaluated(net(), X), tmp_path / "artifact", classes=("cat", "dog")).classes is None


def test_a_trial_fails_where_the_end_would_and_leaves_ranges_and_folders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model: Any = prepare(net(), (X,))
    trial_export(model)
    assert model.exported == {"input": {0: "batch"}}
    assert all(observer.low is None for observer in model.ranges.observers.values())
    assert list(tmp_path.iterdir()) == []

    def refuse(*_: Any) -> None:
        raise ExportError("it does not export")

    monkeypatch.setattr(type(model.runtime), "export", refuse)
    with pytest.raises(ExportError, match="it does not export"):
        trial_export(model)
