"""Several recipes and runtimes of `quantize`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant import load, quantize
from lightning_quant.doors import making
from lightning_quant.errors import QuantizationError
from lightning_quant.search.sweep import Sweep

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]
X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))


def made(folder: Path, **arguments: Any) -> Any:
    return quantize(net(), **{"calibration_data": iter(X.split(16)), "output_dir": folder, **arguments})


def test_one_reading_of_the_data_and_of_float_makes_an_artifact_of_each(tmp_path: Path) -> None:
    expected, asked = net()(X).argmax(1), []

    def evaluate(model: nn.Module) -> Any:
        asked.append(type(model))
        return {"equal": (model(X).argmax(1) == expected).float()}

    names = ["int8", "int8_weight_only"]
    sweep = made(tmp_path, recipe=names, runtime=["torch", "executorch"][:1], evaluate=evaluate)
    assert isinstance(sweep, Sweep)
    assert set(sweep.artifacts) == {f"{name}-torch" for name in names}
    assert asked.count(nn.Sequential) == 1
    assert len(asked) == 3
    for artifact in sweep.artifacts.values():
        assert load(artifact.path)(X[:2]).shape == (2, 4)
        assert artifact.report is not None
    assert all(point.contributions for point in sweep.points)
    assert (tmp_path / "sweep.html").is_file()
    # What is known of no direction is no ground to call a point dominated.
    assert sweep.directions == {}


def test_a_member_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = making.export

    def failing(model: Any, *arguments: Any, **options: Any) -> Any:
        if model.recipe.name == "int8":
            raise RuntimeError("a kernel of another library")
        return export(model, *arguments, **options)

    monkeypatch.setattr(making, "export", failing)
    sweep = made(tmp_path, recipe=["int8", "float16"], runtime=["onnxruntime"])
    assert [(point.name, point.reason) for point in sweep.points] == [
        ("float16-onnxruntime", ""),
        ("int8-onnxruntime", "a kernel of another library"),
    ]
    monkeypatch.setattr(making, "export", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(QuantizationError, match="none was made: interrupted"):
        made(tmp_path, recipe=["int8", "float16"])


def test_what_a_runtime_does_not_run_is_a_row_without_a_try(tmp_path: Path) -> None:
    sweep = made(tmp_path, recipe="int8_dynamic", runtime=["executorch", "onnxruntime"])
    assert "executorch" in sweep.points[1].reason
    with pytest.raises(QuantizationError, match="executorch"):
        made(tmp_path, recipe=["int8_dynamic"], runtime="executorch")


def test_limits_say_in_which_direction_points_are_compared(tmp_path: Path) -> None:
    limits = {"max_drop": {"metric": 0.5}, "higher_is_better": ["metric"]}
    sweep = made(tmp_path, recipe=["int8", "float16"], evaluate=lambda model: float(model(X).mean()), limits=limits)
    assert sweep.directions == {"metric": True}
