"""What `lightning_quant/README.md` says under "How to extend": one new thing and one line, right in every place."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from reports import changed
from torch import Tensor, nn

from lightning_quant import load, quantize, runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.callbacks.loggers import Entry, write_down
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.graph import operations
from lightning_quant.layers import StoredLayer
from lightning_quant.ranges import observers
from lightning_quant.ranges.observers import Observer
from lightning_quant.recipe.recipe import RECIPES, IntegerSpec, Recipe
from lightning_quant.report import make_report as making
from lightning_quant.report.report import Report
from lightning_quant.report.section import Section

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    # Tiny files are larger than float.
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
]
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def made(folder: Path, model: nn.Module | None = None, recipe: Any = "int8", runtime: str = "onnxruntime") -> Artifact:
    return quantize(
        model or mlp(), recipe, runtime, calibration_data=X.split(8), output_dir=folder / "artifact", threads=1
    )


def decibels(model: nn.Module, artifact: Artifact) -> float:
    with torch.no_grad():
        expected, actual = model(X), load(artifact)(X)
    return float(10 * torch.log10(expected.square().sum() / (actual - expected).square().sum()))


@pytest.mark.parametrize(
    "activation", [IntegerSpec(bits=16), IntegerSpec(symmetric=True)], ids=["16 bits", "symmetric"]
)
def test_a_recipe_is_one_constant(activation: IntegerSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECIPES, "own", Recipe(name="own", activation=activation))
    artifact = made(tmp_path, recipe="own")

    assert artifact.manifest["recipe"] == "own"
    assert decibels(mlp(), artifact) > 30
    assert artifact.report is not None
    assert not any("FAILED" in text for text in artifact.report["warnings"])
    with pytest.raises(QuantizationError, match=r"'own'\].* Did you mean 'own'"):
        made(tmp_path, recipe="onw")


class Quantiles(Observer):
    """A mean of the 2 % and 98 % quantiles of every batch."""

    merge = {"low": "mean", "high": "mean", "num_updates": "sum"}  # noqa: RUF012

    def _update(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        low, high = x.float().quantile(torch.tensor([0.02, 0.98])).unbind()
        share = 1 / (self.num_updates + 1)
        self.low = low if self.low is None else self.low.lerp(low, share)
        self.high = high if self.high is None else self.high.lerp(high, share)


def test_an_observer_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(observers.OBSERVERS, "quantiles", lambda recipe: Quantiles())
    recipe = {"calibration_observer": "quantiles"}
    artifact = made(tmp_path, recipe=recipe)
    prepared = prepare(mlp(), (X,), recipe=Recipe(**recipe), observer="quantiles")
    for batch in X.split(8):
        prepared.ranges.observe(":input", batch)

    seen = [batch.quantile(0.98) for batch in X.split(8)]
    torch.testing.assert_close(prepared.ranges.observers[":input"].range()[1], torch.stack(seen).mean())
    assert 10 < decibels(mlp(), artifact) < decibels(mlp(), made(tmp_path, recipe={"calibration_observer": "min_max"}))
    with pytest.raises(QuantizationError, match="Did you mean 'quantiles'"):
        made(tmp_path, recipe={"calibration_observer": "quantile"})


class Gated(nn.Module):
    """A convolution whose result goes through an activation in a spelling of its own."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def test_a_spelling_of_an_operator_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Gated(torch.special.expit).eval()
    assert all(row.kind != "sigmoid" or row.action == "float" for row in prepare(model, (X,)).plan.rows)
    monkeypatch.setitem(operations._FUNCTIONS, torch.special.expit, "sigmoid")
    artifact = made(tmp_path, model)

    assert artifact.report is not None
    assert artifact.report["operators"]["QLinearSigmoid"] == 1
    assert artifact.report["still_float"] == {}
    assert decibels(model, artifact) > 30


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.where(x[:, :1] > 0, self.first(x), self.second(x)))


def test_a_kind_of_operator_is_its_spelling_and_a_row_of_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, runtime = Choosing().eval(), runtimes.get("onnxruntime")
    assert all(row.kind != "where" for row in prepare(model, (X,)).plan.rows)
    monkeypatch.setitem(operations._FUNCTIONS, torch.where, "where")
    # Made of the spellings when the module is read.
    monkeypatch.setattr(operations, "LISTED", operations.LISTED | {"where"})
    assert {row.action for row in prepare(model, (X,)).plan.rows if row.kind == "where"} == {"float"}

    table = replace(runtime.TABLE, own_scale=runtime.TABLE.own_scale | {"where"})
    monkeypatch.setattr(type(runtime), "TABLE", table)
    monkeypatch.setitem(runtime.INTEGER_OPERATORS, "where", ("QLinearWhere",))
    artifact = made(tmp_path, model)
    rows = {row["kind"]: row["action"] for row in artifact.plan["rows"]}
    assert rows["where"] == "int8"
    assert artifact.report is not None
    assert artifact.report["operators"]["QLinearWhere"] == 1
    assert artifact.report["still_float"] == {}
    assert not any("FAILED" in text for text in artifact.report["warnings"])
    assert decibels(model, artifact) > 30


class StoredBilinear(StoredLayer):
    """`nn.Bilinear` with stored weights."""


class Pairing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.last = nn.Bilinear(6, 6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pair(x, x))


def test_a_kind_of_layer_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning_quant.layers as room

    monkeypatch.setattr(room, "_CLASSES", (*room._CLASSES, ((nn.Bilinear,), StoredBilinear)))
    torch.manual_seed(0)
    model = Pairing().eval()
    artifact = made(tmp_path, model, "int8_weight_only", "torch")
    rows = {row["name"]: row for row in artifact.plan["rows"]}

    assert (rows["pair"]["kind"], rows["pair"]["action"]) == ("Bilinear", "int8 weights")
    assert rows["pair"]["weights"] == 6 * 6 * 16
    assert sum(row["macs"] for row in rows.values()) >= rows["pair"]["macs"] > 0
    assert artifact.plan["stored_share"] == 1.0
    assert decibels(model, artifact) > 30


RUNTIME_FILE = '''
"""ONNX Runtime under another name."""

from lightning_quant.runtimes import onnxruntime


class Mirror(type(onnxruntime.RUNTIME)):
    NAME = "mirror"


RUNTIME = Mirror()
'''


def test_a_runtime_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mirror.py").write_text(RUNTIME_FILE)
    monkeypatch.setattr(runtimes, "__path__", [*runtimes.__path__, str(tmp_path)])
    try:
        artifact = made(tmp_path, runtime="mirror")
        assert artifact.manifest["runtime"] == "mirror"
        assert decibels(mlp(), artifact) > 30
        assert "'mirror'" in runtimes.that(lambda runtime: runtime.KEEPS_EDGES)
        with pytest.raises(QuantizationError, match="Did you mean 'mirror'"):
            made(tmp_path, runtime="miror")
    finally:
        sys.modules.pop("lightning_quant.runtimes.mirror", None)
        vars(runtimes).pop("mirror", None)


@dataclass(frozen=True)
class Carbon(Section):
    """What an artifact costs the climate, drawn as well."""

    grams: float

    def text(self) -> str:
        return f"A call costs {self.grams} g."

    def warnings(self) -> list[str]:
        return ["it is not free"]

    def scalars(self) -> dict[str, float | None]:
        return {"grams": self.grams}

    def figures(self) -> dict[str, Any]:
        return {"carbon": self._bar}

    def _bar(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().bar([0], [self.grams])
        return figure


def with_carbon(report: Report) -> Report:
    return Report(report.recipe, report.runtime, report.versions, (*report.sections, Carbon(0.25)))


def test_a_section_of_the_report_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = making.with_limits
    monkeypatch.setattr(making, "with_limits", lambda report, limits: held(with_carbon(report), limits))
    artifact = made(tmp_path)

    assert artifact.report is not None
    assert artifact.report_path is not None
    assert "A call costs 0.25 g." in artifact.report_path.read_text()
    assert "it is not free" in artifact.report["warnings"]
    assert json.loads((artifact.path / "report.json").read_text())["grams"] == 0.25
    assert artifact.report["scalars"]["quant/grams"] == 0.25


def test_a_figure_is_one_method_and_reaches_loggers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    artifact = Artifact(tmp_path, {"plan": {"rows": []}, "runtime": "torch", "recipe": "int8", "files": {}})
    entry = Entry("quant", 3, {"recipe": "int8"}, with_carbon(changed()), artifact)
    drawn: list[str] = []

    logger = TensorBoardLogger(tmp_path / "logs")
    logger.experiment.add_figure = lambda name, *_, **__: drawn.append(name)
    write_down(logger, entry)
    logger.experiment.close()
    assert set(drawn) == {"quant/latency", "quant/carbon"}
