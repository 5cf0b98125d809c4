"""The report as a page: what it says first, that it is whole, needs no network, and holds nobody's code but its own."""

import copy
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from torch import nn

from lightning_quant import Artifact, quantize
from lightning_quant.artifact.artifact import add_report, page_of, read
from lightning_quant.cli.cli import main
from lightning_quant.errors import ArtifactError, NoEffectWarning
from lightning_quant.report.page import broken, coded, comparison, share, size, to_html

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")

HOSTILE = "<script>run('it')</script>"
VOID = {"meta", "input", "br", "link"}


class Whole(HTMLParser):
    """Notes the tags of a page, and fails where one closes that is not open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    torch.manual_seed(0)
    parts = {"first": nn.Linear(6, 8), HOSTILE: nn.ReLU(), "gelu": nn.GELU(), "last": nn.Linear(8, 3)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    calls = [torch.randn(8, 6) for _ in range(2)]
    return quantize(model, calibration_data=calls, output_dir=tmp_path_factory.mktemp("a") / "a", sensitivity=True)


def text_of(artifact: Artifact) -> str:
    return (artifact.path / "report.html").read_text(encoding="utf-8")


def test_page_is_whole_and_stands_alone(artifact: Artifact) -> None:
    parser = Whole()
    parser.feed(text_of(artifact))

    assert parser.open == []
    used = [value for _, attributes in parser.seen for name, value in attributes.items() if name in ("src", "href")]
    assert used == []
    policy = next(attributes["content"] for tag, attributes in parser.seen if "http-equiv" in attributes)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert len(text_of(artifact)) < 5e6


def test_every_row_of_the_plan_and_every_file_of_the_model_is_there(artifact: Artifact) -> None:
    text = text_of(artifact)
    for row in artifact.plan["rows"]:
        assert html.escape(row["name"], quote=True).replace("&#x27;", "&#39;") in text
        assert html.escape(row["reason"]) in text
    for name, value in artifact.manifest["sha256"].items():
        if not name.startswith("report."):
            assert value in text, name
    assert "session.run(" in text


def test_network_is_drawn_with_noise_and_time_of_its_operators(artifact: Artifact) -> None:
    report, text = artifact.report, text_of(artifact)
    assert report is not None
    assert [one["name"] for one in report["numbers"]] == ["first", "last"]
    assert set(report["operator_ms"]) <= {row["name"] for row in report["plan"]["rows"]} | {""}
    assert report["operator_ms"]["first"] > 0
    assert {row["name"]: row["reads"] for row in report["plan"]["rows"]}["last"] == ["gelu"]
    assert text.count('<g class="node') == sum(row["action"] != "fused" for row in report["plan"]["rows"])
    assert text.count("<figure>") == 3
    assert report["changed"]["num_samples"] == 8


def changed_page(artifact: Artifact, **values: Any) -> str:
    sample = {"before": 0, "after": 2, "margin": 0.5, "reversed_margin": 0.1, "image": "", "text": "", "causes": []}
    found = {"num_samples": 500, "num_changed": 1, "num_tried": 2, "operators": {}, "base": "validation"}
    manifest = copy.deepcopy(artifact.manifest)
    manifest["report"]["changed"] = {**found, "samples": [{**sample, **values}]}
    manifest["classes"] = ["cat", HOSTILE]
    return page_of(Artifact(artifact.path, manifest), to_html)


def test_samples_that_changed_are_shown_as_what_they_are(artifact: Artifact) -> None:
    text = changed_page(artifact, image="aGk=", text=HOSTILE, causes=["first", "last"])

    assert "1 of 500 samples (0.2%)" in text
    assert "<b>cat</b> became <b>2</b>" in text
    assert 'src="data:image/png;base64,aGk="' in text
    assert HOSTILE not in text
    assert "<code>first</code> or one of 1 more in float brings it back" in text
    # An address of a stranger's is no picture, and quotes do not end the attribute.
    assert 'src="data:image/png;base64,&#34; onerror' in changed_page(artifact, image='" onerror="x')
    assert "None of 2 operators" in text


def test_parts_with_graphs_of_their_own_stand_behind_their_row(artifact: Artifact) -> None:
    manifest = copy.deepcopy(artifact.manifest)
    row = manifest["report"]["plan"]["rows"][0]
    names = ("enc", "head", "enc.a", "enc.b", "enc.b.c", "other.d")
    manifest["report"]["plan"]["rows"] = [{**row, "name": name, "reads": []} for name in names]
    page = page_of(Artifact(artifact.path, manifest), to_html).replace("<wbr>", "")
    shown = re.findall(r"<td><code>(.*?)</code></td>", page)

    assert shown[1:7] == ["enc", "enc.a", "enc.b", "enc.b.c", "head", "other.d"]


def test_reports_from_before_these_sections_have_a_page(artifact: Artifact) -> None:
    manifest = copy.deepcopy(artifact.manifest)
    for name in ("numbers", "operator_ms", "changed"):
        del manifest["report"][name]
    for row in manifest["report"]["plan"]["rows"]:
        del row["reads"]

    assert '<table id="network">' in page_of(Artifact(artifact.path, manifest), to_html)


def test_words_of_code_and_paths_of_modules_are_shown_as_such() -> None:
    assert coded("output `out` is <b>noise</b>") == "output <code>out</code> is &lt;b&gt;noise&lt;/b&gt;"
    assert broken("net.a_block.0<i>") == "net.<wbr>a_<wbr>block.<wbr>0&lt;i&gt;"


def test_texts_of_others_are_no_code(artifact: Artifact) -> None:
    assert HOSTILE in json.dumps(artifact.plan)
    assert HOSTILE not in text_of(artifact)
    assert text_of(artifact).count("<script") == 1


def test_metrics_of_training_stand_beside_what_they_were(artifact: Artifact) -> None:
    row = {"name": "val_acc", "float_value": 0.9, "simulated": 0.89, "artifact": 0.885, "before": 0.91}
    manifest = copy.deepcopy(artifact.manifest)
    manifest["report"] |= {"metrics": [row], "trained": True, "warnings": [], "failures": []}
    text = page_of(Artifact(artifact.path, manifest), to_html)

    assert "val_acc -0.0150 at 0.885" in text
    assert "trained weights without rounding" in text
    assert ">0.91<" in text


def test_numbers() -> None:
    assert [size(value) for value in (999, 1000, 12_345_678)] == ["999 B", "1 kB", "12.3 MB"]
    assert [share(value) for value in (1.0, 0.99951, 0.1234, None)] == ["100%", "100%", "12.3%", "-"]


def test_command_writes_and_opens_the_page(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    (copied := tmp_path / "copy").mkdir()
    shutil.copytree(artifact.path, copied, dirs_exist_ok=True)

    assert main(["report", str(copied), "--html", str(tmp_path / "r.html"), "--open"]) == 0
    assert opened == [(tmp_path / "r.html").as_uri()]
    assert artifact.manifest["sha256"]["model.onnx"] in (tmp_path / "r.html").read_text()
    assert main(["report", str(copied), "--html", str(tmp_path / "none" / "r.html")]) == 2


def test_report_of_another_shape(artifact: Artifact) -> None:
    manifest: dict[str, Any] = {**artifact.manifest, "report": {"plan": {"rows": []}}}
    with pytest.raises(ArtifactError, match="to be one of this version"):
        page_of(Artifact(artifact.path, manifest), to_html)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium: apt-get install chromium")
def test_page_in_a_browser(artifact: Artifact, tmp_path: Path) -> None:
    clicks = """<script>
    document.querySelectorAll("#network button")[4].click();
    const input = document.querySelector("input"); input.value = "linear"; input.dispatchEvent(new Event("input"));
    const rows = [...document.querySelectorAll("#network tbody tr")].filter((row) => !row.hidden);
    document.body.dataset.shown = rows.map((row) => row.cells[1].textContent).join(" ");
    document.body.dataset.bright = [...document.querySelectorAll("g.node:not(.dim) text:not(.side)")]
      .map((label) => label.textContent).join(" ");
    const before = document.getElementById("graph").getBoundingClientRect().width;
    document.querySelector("[data-zoom='1.25']").click();
    document.body.dataset.zoomed = document.getElementById("graph").getBoundingClientRect().width / before;
    document.querySelector("g.node:not(.dim)").dispatchEvent(new MouseEvent("click"));
    document.body.dataset.clicked = document.querySelector("tr.shown").cells[1].textContent;
    </script></body>"""
    written = tmp_path / "page.html"
    written.write_text(text_of(artifact).replace("</body>", clicks))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--enable-logging=stderr", "--dump-dom", written.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)

    assert "CONSOLE" not in ran.stderr
    found = re.search(r'data-shown="([^"]*)"', ran.stdout)
    assert found is not None
    assert found[1].split() == ["first", "last"]
    assert 'data-bright="first last"' in ran.stdout
    assert 'data-clicked="first"' in ran.stdout
    zoomed = re.search(r'data-zoomed="([^"]*)"', ran.stdout)
    assert zoomed is not None
    assert float(zoomed[1]) == pytest.approx(1.25, abs=0.01)


def test_a_page_that_cannot_be_made_costs_no_artifact(artifact: Artifact, tmp_path: Path) -> None:
    copied = read(Path(shutil.copytree(artifact.path, tmp_path / "copy")))
    with pytest.warns(NoEffectWarning, match=r"report.html could not be made: KeyError\('plan'\)"):
        again = add_report(copied, {"unlike": "any"}, "# Report", to_page=to_html)

    assert "report.html" not in again.manifest["files"]
    assert read(again).report == {"unlike": "any"}


def test_artifacts_side_by_side_on_a_page(artifact: Artifact, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    folder = str(artifact.path)
    assert main(["compare", folder, folder, "--max-size-ratio", "0.01", "--html", str(page)]) == 1
    text = page.read_text(encoding="utf-8")
    seen = Whole()
    seen.feed(text)

    assert not seen.open
    assert sum(tag == "tr" for tag, _ in seen.seen) == 3
    assert "its size ratio is" in text
    assert HOSTILE not in text


def test_a_comparison_holds_nobodys_code() -> None:
    row = dict.fromkeys(("artifact", "recipe", "runtime", "bytes", "size_ratio", "coverage"), HOSTILE)
    row |= {"metrics": {HOSTILE: {"artifact": 1.0, "delta": 0.0}}, "speedup": {HOSTILE: 1.0}, "warnings": [HOSTILE]}

    assert HOSTILE not in comparison([row], [HOSTILE])
