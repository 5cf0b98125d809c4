import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant import quantize
from lightning_quant.doors.evaluated import metrics_of
from lightning_quant.errors import EvaluationError, QuantizationError

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class WithBadLayer(nn.Module):
    """A hidden layer with a few channels that are far too large, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bad, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.bad.bias[:2] = 1e5
            self.last.weight[:, :2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.bad(F.relu(self.first(x)))))


def correct(model: nn.Module) -> Any:
    """Return which of the predictions the module makes as it did in float."""
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    return {"equal": (model(inputs).argmax(1) == WithBadLayer()(inputs).argmax(1)).float()}


read: list[int] = []


def part_by_part(model: nn.Module) -> Any:
    """Yield the same batch by batch."""
    for values in correct(model)["equal"].split(32):
        read.append(len(values))
        yield {"equal": values}


def searched(folder: Path, evaluate: Any = correct, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = WithBadLayer()
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(4)).split(16)
    return quantize(model, calibration_data=data, output_dir=folder, evaluate=evaluate, **arguments)


def test_what_keeps_the_limit_on_the_users_own_metric_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_quant.search.candidates.Candidates.accurate", lambda _: None)
    read.clear()
    artifact = searched(tmp_path, part_by_part, limits={"equal": -0.05})
    trials = json.loads((tmp_path / "search.json").read_text())["trials"]
    assert [trials[0]["keeps_all"], trials[0]["kept"]] == [False, {}]
    search = artifact.report["search"]
    assert {"bad", "last"} <= set(search["chosen"]["kept"])
    assert "interval" in search["verdicts"][0]["basis"]
    (row,) = artifact.report["metrics"]
    assert row["float_value"] == 1.0
    assert 1.0 - row["artifact"] <= search["verdicts"][0]["reached"] <= 0.05
    assert artifact.report["failures"] == []
    # A part was enough to see that the whole recipe misses the limit; what is exported was validated on all.
    assert trials[0]["validations"] == trials[0]["measured"]["share"] == 0.125
    assert "validation data" in trials[0]["verdicts"][0]["basis"]
    assert "validation data" not in search["verdicts"][0]["basis"]
    # Float comes on top; the report takes what the trial of the same file said.
    assert sum(read) == 256 * (sum(trial["validations"] for trial in trials) + 1)


def test_metrics_of_a_function_are_held_against_plain_limits(tmp_path: Path) -> None:
    artifact = searched(tmp_path, limits={"max_drop": {"equal": 0.05}, "higher_is_better": ["equal"]})
    assert "limits FAILED: equal fell by" in artifact.report["failures"][0]
    assert "search" not in artifact.report


@pytest.mark.parametrize(
    ("evaluate", "limits", "message"),
    [
        (correct, {"equl": -0.05}, "'equal' was probably meant"),
        (lambda _: "good", {"metric": -0.1}, "to give numbers"),
        ("val_acc", {"metric": -0.1}, "`evaluate` to be a function"),
        (None, {"metric": -0.1}, "`quantize` runs none"),
    ],
)
def test_limits_on_other_metrics_are_refused_first(evaluate: Any, limits: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(QuantizationError, match=message):
        searched(tmp_path, evaluate, limits=limits)
    assert not list(tmp_path.iterdir())


def test_a_function_that_fails_on_the_file_costs_its_metrics_alone(tmp_path: Path) -> None:
    artifact = searched(tmp_path, lambda model: float(model.bad.bias.numel()), limits={"metric": -0.1})
    report = artifact.report
    assert any("metrics of the file are missing" in text for text in report["warnings"])
    assert any("limits FAILED" in text for text in report["failures"])


def test_a_recipe_of_layers_is_tried_as_a_whole(tmp_path: Path) -> None:
    artifact = searched(tmp_path, limits={"equal": -0.05}, recipe="int8_weight_only")
    assert len(artifact.report["search"]["trials"]) == 1
    assert artifact.report["search"]["verdicts"][0]["kept"]


def test_parts_that_are_yielded_make_up_the_whole() -> None:
    torch.manual_seed(0)
    model = WithBadLayer()
    assert metrics_of(part_by_part, model) == metrics_of(correct, model) == {"equal": 1.0}
    assert metrics_of(lambda _: iter(()), model) == {}


@pytest.mark.parametrize("given", [3, torch.tensor(3.0), [2.0, 4.0], torch.tensor([[2.0], [4.0]]), {"metric": 3.0}])
def test_numbers_and_values_of_samples_are_metrics(given: Any) -> None:
    found = metrics_of(lambda _: given, nn.Linear(1, 1))
    assert found == {"metric": 3.0}
    assert bool(found.contributions) == (torch.as_tensor(given).numel() > 1 if not isinstance(given, dict) else False)
    with pytest.raises(EvaluationError):
        metrics_of(lambda _: object(), nn.Linear(1, 1))
