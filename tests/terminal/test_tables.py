"""Names that somebody else chose, where they become Markdown, HTML or code."""

import re
import sys
from pathlib import Path

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from reports import changed
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.artifact.artifact import add_report
from lightning_quant.cli import cli
from lightning_quant.report.limits import Limits
from lightning_quant.report.metrics import MetricRow
from lightning_quant.terminal.tables import one_line, text_table

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]
ODD = ["line\nbreak", 'quote"), setattr(__import__("sys"), "odd", 1), str("']
ODD += ["class", "back\\slash\\", "a|b", "<script>", "ü in", "0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("val_accuracy", "val_accuracy"),
        ("a < b, x -> y, 3 <= 4", "a < b, x -> y, 3 <= 4"),
        ("two\nlines\r\n\tand\x1b[31m colour", "two lines and [31m colour"),
        ("<script>alert(1)</script>", "\\<script>alert(1)\\</script>"),
        ("[click](http://evil)", "[click]\\(http://evil)"),
        ("<!-- hidden", "\\<!-- hidden"),
        # A backslash in front would take the one in front of the markup away.
        ("\\<script>", "\\\\\\<script>"),
        ("\\[click](http://evil)", "\\\\[click]\\(http://evil)"),
        ("C:\\folder", "C:\\folder"),
    ],
)
def test_text_becomes_one_line_without_markup(text: str, expected: str) -> None:
    assert one_line(text) == expected


def test_a_cell_stays_a_cell() -> None:
    table = text_table(("name|of", "value"), [("a\n| b |", "1"), ("<img src=x>", "2")])

    assert table == (
        "| name\\|of     | value |\n|--------------|------:|\n| a \\| b \\|    |     1 |\n| \\<img src=x> |     2 |"
    )


def test_a_cell_stays_a_cell_behind_a_backslash() -> None:
    assert text_table(("name",), [("a\\|b",)]).splitlines()[-1] == "| a\\\\\\|b |"


def unescaped(markdown: str) -> list[str]:
    """Return the elements of HTML that a text has for a reader of Markdown: an even number of backslashes is none."""
    return re.findall(r"(?<!\\)(?:\\\\)*<[A-Za-z/!?]", markdown)


class Named(nn.Module):
    """Layers whose names are anything that PyTorch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in ODD})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return x


def test_layers_may_be_called_anything(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Named().eval(), torch.randn(8, 6)
    artifact = quantize(model, calibration_data=[x], output_dir=tmp_path, exclude=["layers.a|b"])

    assert not hasattr(sys, "odd")
    assert {f"layers.{name}" for name in ODD} <= {row["name"] for row in artifact.plan["rows"]}
    assert sum(row["action"] == "int8" for row in artifact.plan["rows"]) == len(ODD) - 1
    with torch.no_grad():
        torch.testing.assert_close(load(artifact)(x), model(x), atol=0.1, rtol=0.1)
    report = (tmp_path / "report.md").read_text()
    assert "| layers.a\\|b |" in report
    assert "<script>" not in report.replace("\\<script>", "")


def test_metrics_may_be_called_anything() -> None:
    cells = text_table(("validation", "float"), [(MetricRow("<b>acc</b>\n|", 1.0, None, None).name, "1.0000")])

    assert cells.splitlines()[-1] == "| \\<b>acc\\</b> \\| | 1.0000 |"


class Answers(nn.Module):
    """A layer, an input and an output with the name of an element."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({NAME: nn.Linear(6, 6), f"{NAME}2": nn.Linear(6, 6)})

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in self.layers.values():
            y = torch.relu(layer(x[NAME]))
        return {NAME: y}


NAME = "\\<img src=q onerror=alert(1)>`](http:"


def test_no_part_of_a_report_lets_a_name_become_markup(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = {"name": NAME, "weight": {}, "activation": {}}
    call = ({NAME: torch.randn(8, 6)},)
    artifact = quantize(Answers().eval(), recipe, calibration_data=[call, call], output_dir=tmp_path, sensitivity=True)
    written = (tmp_path / "report.md").read_text().partition("## Run it")[0]
    assert written.count("onerror") > 5
    assert unescaped(written) == []
    assert unescaped(artifact._repr_markdown_().partition("## Run it")[0]) == []
    rows = (MetricRow(NAME, 1.0, 1.0, 0.5),)
    report = changed(
        **{"recipe": NAME, "runtime": NAME, "versions": {}, "float_bytes": 1, "artifact_bytes": 2, "metrics": rows},
        **{"still_float": {NAME: 1}, "operators": {NAME: 1}, "plan": artifact.plan, "notes": (NAME,)},
        limits=Limits({NAME: 0.1, f"{NAME}3": 0.1}),
    )
    assert len(report.warnings) > 3
    assert unescaped(report.to_markdown()) == []


def test_a_strangers_report_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = quantize(nn.Linear(6, 3), calibration_data=torch.randn(8, 6), output_dir=tmp_path)
    add_report(artifact, {"warnings": []}, "# A report\n\n\x1b[2J\x1b]0;title\x07done\u202e\n")

    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("# A report\n\n[2J]0;titledone\n")
