import gc
import inspect
import json
import os
from pathlib import Path
from typing import Any

import pytest
import quick_exports
import quick_trials
import torch
from exported import Artifacts
from features import SHOWN, rows_of
from quick_exports import make_exports_quick
from slow_cases import is_slow

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.report import speed

# Fixtures that several files share; one conftest.py is all that doctests can tell apart.
pytest_plugins = ("command_line", "small_artifacts")
# They import projects that only environments of their own have.
collect_ignore_glob = ["clients/client_*.py", "clients/run_client.py"]

# Test machines share their cores; the nets here are too small to gain from threads.
torch.set_num_threads(1)
make_exports_quick()
quick_trials.make_trials_quick()
# Nets this small are rarely much faster than float, and each report would write float for another runtime for a second.
speed.CLOSE = 1.0


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _tried_for_real(request: pytest.FixtureRequest) -> None:
    """Let tests that patch something try each export for real."""
    quick_exports.for_real = quick_trials.for_real = "monkeypatch" in inspect.signature(request.function).parameters


@pytest.fixture(params=[QuantizationAwareTraining, PostTrainingQuantization])
def kind(request: pytest.FixtureRequest) -> Any:
    """Each of the two callbacks."""
    return request.param


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Nets as artifacts, by runtime and name of the net."""
    return Artifacts(tmp_path_factory.mktemp("made"))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the latencies out of reports, which take longer than all the rest of a run with a tiny net."""
    monkeypatch.setattr("lightning_quant.report.make_report.measure_latency", lambda *_, **__: ((), ()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark slow cases, and note what the collected tests show, slow ones included; in a file when asked to."""
    for item in items:
        if is_slow(item.nodeid):
            item.add_marker(pytest.mark.slow)
    config.stash[SHOWN] = [item for item in items if item.path.parent.name == "callbacks"]
    if "LIGHTNING_QUANT_FEATURES" in os.environ:
        Path(os.environ["LIGHTNING_QUANT_FEATURES"]).write_text(json.dumps(rows_of(items)))


def pytest_collection_finish() -> None:
    """Keep the garbage collector off the libraries' own objects, which it would look through in every test."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
