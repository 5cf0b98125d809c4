"""What a report says FAILED is heard by whoever made or reads the artifact."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant import quantize
from lightning_quant.artifact.artifact import Artifact, add_report
from lightning_quant.cli import cli
from lightning_quant.errors import NoEffectWarning
from lightning_quant.report.limits import failures_in

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("artifact")
    with pytest.warns(NoEffectWarning, match="larger than the float model"):
        return quantize(net(), calibration_data=[X, X], output_dir=folder, threads=1)


def test_a_recipe_that_failed_is_a_warning_of_the_function(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.head = nn.Parameter(torch.randn(400, 32)), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((x + self.shift).mean(1))

    data = [torch.randn(4, 400, 32)]
    with pytest.warns(NoEffectWarning, match=r"int8_weight_only FAILED: only \d+\.\d% of the weights"):
        quantize(Shifted().eval(), "int8_weight_only", "torch", calibration_data=data, output_dir=tmp_path / "q")


@pytest.mark.parametrize("which", ["parity", "recipe", "scalar alone"])
def test_commands_end_with_one_where_the_report_says_failed(
    which: str, artifact: Artifact, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report: dict[str, Any] = dict(artifact.report or {})
    texts = {"parity": ["parity FAILED: made so"], "recipe": ["int8_weight_only FAILED: made so"], "scalar alone": []}
    report["warnings"] = texts[which]
    report["scalars"] = {**report["scalars"], "quant/parity_failed": float(which != "recipe")}
    doctored = add_report(artifact, report, "# failed")
    monkeypatch.setattr("lightning_quant.measure.bench.bench", lambda *_: [])
    path = str(doctored.path)

    for command in (("report", path), ("compare", path, path), ("bench", path), ("verify", path)):
        assert cli.main([*command]) == 1
        assert "FAILED" in capsys.readouterr().err
    add_report(artifact, dict(artifact.report or {}), "# well")
    for command in (("report", path), ("compare", path), ("bench", path), ("verify", path)):
        assert cli.main([*command]) == 0


def test_nothing_failed_where_nothing_was_measured() -> None:
    assert failures_in({}) == []
