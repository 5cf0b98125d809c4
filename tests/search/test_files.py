from typing import Any

import pytest
import torch
from lightning_models import ConvNet

from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.measure.contributions import Metrics
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.report.make_report import make_report
from lightning_quant.search import files as module
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.files import Files
from lightning_quant.search.relaxations import relaxations


@pytest.mark.usefixtures("unmeasured")
def test_a_choice_is_measured_on_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [Call((torch.randn(8, 1, 8, 8),)) for _ in range(2)]
    whole = prepare(ConvNet(width=64), calls[0].args, trains=False)
    calibrate(whole, steps_of(whole, calls))
    seen: list[int] = []

    def validate(model: PlannedModel, artifact: Artifact, _: Any) -> Metrics:
        seen.append(artifact.size_bytes)
        return Metrics({"m": 0.5, "other": 1.0})

    files = Files(
        Metrics({"m": 0.75}),
        validate,
        lambda made: made.on_host(),
        whole,
        Candidates(whole, calls, Selection()),
        lambda: relaxations(whole, calls),
    )
    monkeypatch.setattr(module, "peak_of", lambda artifact, threads: 2**20 * (artifact.path / "manifest.json").exists())
    monkeypatch.setattr(module, "float_peak_of", lambda model, artifact, threads: 2**22)
    small, files.weighed, files.weighs_float = files.measure(Choice()), True, True
    large = files.measure(Choice((("head", FLOAT),)))
    assert (small.peak_memory_mb, large.peak_memory_mb) == (None, 1.0)
    assert (small.peak_memory_ratio, large.peak_memory_ratio, large.no_peak) == (None, 0.25, "")
    assert [small.size_bytes, large.size_bytes] == seen
    assert large.size_bytes - small.size_bytes == pytest.approx(3 * 4 * 1024, rel=0.2)
    assert small.differences["m"].value == -0.25
    assert set(small.differences) == {"m"}
    assert files.model(Choice()) is whole
    assert len(files.steps()) > 0
    assert not small.latency_ms


def test_a_process_that_does_not_run_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(artifact: Artifact, threads: int) -> int:
        raise QuantizationError("it does not run by itself")

    monkeypatch.setattr(module, "peak_of", failing)
    nothing: Any = None
    files = Files(Metrics(), nothing, nothing, nothing, nothing, nothing, weighed=True)
    assert files._memory(nothing, nothing) == {"peak_memory_mb": None, "no_peak": "it does not run by itself"}


def test_everything_in_float_is_a_file_that_computes_what_the_module_does(
    unmeasured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [Call((torch.randn(8, 1, 8, 8),)) for _ in range(2)]
    whole = prepare(ConvNet().eval(), calls[0].args, trains=False)
    calibrate(whole, steps_of(whole, calls))
    candidates, made = Candidates(whole, calls, Selection()), []

    def validate(model: PlannedModel, artifact: Artifact, _: Any) -> Metrics:
        report = make_report(model, artifact)
        made.append(report.failures)
        return Metrics()

    files = Files(Metrics(), validate, lambda one: one.on_host(), whole, candidates, lambda: relaxations(whole, calls))
    choice = files.all_float()
    assert choice is not None
    assert files.measure(choice).transitions == 0
    assert made == [[]]
    assert files.measure(Choice()).transitions == 2
    # Two files are timed in turn.
    first, second = files.times((choice, Choice()))
    assert 0 < first / second < 100
    with module._Opened(files) as opened:
        opened.time_ratio(choice, Choice())
        monkeypatch.setattr(module, "export", None)
        # Both are there already.
        assert 0 < opened.time_ratio(choice, Choice()) < 100
