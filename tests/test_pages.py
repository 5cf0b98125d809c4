"""Pages show what the benchmarks' files say, and their links lead somewhere."""

import inspect
import re
from pathlib import Path

import pytest
import results

import lightning_quant as lq
from lightning_quant.callbacks.ptq import Calibration
from lightning_quant.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
PLACES = ("README.md", "*/README.md", "examples/*.md", "examples/*/README.md")
PAGES = sorted({path for place in PLACES for path in ROOT.glob(place)})


@pytest.mark.parametrize("path", results.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tables_come_from_the_files(path: Path) -> None:
    text = path.read_text()
    assert results.shown(text)
    assert results.page(text) == text, "run `python examples/benchmarks/results.py`"


def test_every_result_is_shown_with_its_command_and_day() -> None:
    on_pages = set().union(*(results.shown(path.read_text()) for path in results.PAGES))
    files = {path.stem: path.read_text() for path in results.RESULTS.iterdir()}
    assert on_pages == {*files, "BEST"}
    for name, text in files.items():
        heading = re.match(r"`python (\S+)[^`]*`, \d{4}-\d\d-\d\d, .*torch \d", text)
        assert heading is not None, name
        assert (ROOT / heading[1]).is_file()
        # Nobody else has the folders of the machine that it ran on.
        assert not re.search(r"\s/\w", heading[0]), name


def test_commands_do_not_say_where_a_run_keeps_its_state() -> None:
    given = ["--cases", "residual", "--runs", "runs", "--seeds", "0", "1", "--state=state.json"]
    assert results._without_folders(given) == ["--cases", "residual", "--seeds", "0", "1"]


def test_best_rows_are_the_best_of_their_tables() -> None:
    rows = {row.split("|")[1].strip(): row for row in results.best_rows().splitlines()[2:]}
    for best in results.BEST:
        lines = (results.RESULTS / f"{best.name}.md").read_text().splitlines()
        cells = [line.split("|") for line in lines if line.startswith("|")]
        column = [cell.strip() for cell in cells[0]].index(best.column)
        ours = [float(row[column].split()[0]) for row in cells[2:] if row[1].strip().startswith("lightning_quant")]
        shown = float(rows[best.what].split("|")[4].split()[0])
        assert shown == (max(ours) if best.higher else min(ours))


def test_the_first_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", path.read_text()):
        page = path if not target else path.parent / target
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_what_others_are_told_to_type_is_an_argument_here() -> None:
    doors = (lq.quantize, lq.PostTrainingQuantization, lq.QuantizationAwareTraining, lq.load, Recipe, Calibration)
    known = set().union(*(inspect.signature(door).parameters for door in doors))
    rows = [line.split("|")[2] for line in (ROOT / "examples" / "migration.md").read_text().splitlines() if "|" in line]
    named = set(re.findall(r"`(\w+)=", " ".join(rows)))

    assert {"engine", "exclude", "limits", "overrides", "schedule"} <= named
    assert named <= known
