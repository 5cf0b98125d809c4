"""Nets as artifacts of any runtime, each exported once in a session, and what a fresh process gets from them."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import CASES, Case, calibrated
from torch import Tensor

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.export.export import export
from lightning_quant.simulate.prepared import Prepared

BATCHES = (1, 3, 8)
LOAD_AND_RUN = """
import sys
from pathlib import Path

import torch

from lightning_quant import load


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]


folder = Path(sys.argv[1])
results = {}
for name, calls in torch.load(folder / "calls.pt", weights_only=True).items():
    model = load(folder / name, threads=1)
    results[name] = [leaves(model(*args, **kwargs)) for args, kwargs in calls]
assert "models" not in sys.modules
torch.save(results, folder / "results.pt")
"""


@dataclass(frozen=True)
class Made:
    """A net as an artifact of one runtime."""

    runtime: Any
    case: Case
    prepared: Prepared
    artifact: Artifact
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @property
    def operators(self) -> tuple[Any, ...]:
        """What was planned in integers."""
        return tuple(operator for graph in self.prepared.plan.graphs for operator in graph.operators)

    def outputs(self, *contexts: AbstractContextManager[Any]) -> list[list[Tensor]]:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            return [tensor_leaves(self.prepared.root(*args, **kwargs)) for args, kwargs in self.calls]


class Artifacts(dict[tuple[str, str], Made]):
    """Exports each pair of runtime and net when it is first asked for, so that no single test waits for all."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, pair: tuple[str, str]) -> Made:
        runtime, name = pair
        torch.manual_seed(0)
        case = next(case for case in CASES if case.name == name)
        _, prepared = calibrated(case, runtime=runtime)
        artifact = export(prepared, self.folder / f"{runtime}-{name}")
        calls = [case.call(batch) for batch in BATCHES]
        self[pair] = Made(runtimes.get(runtime), case, prepared, artifact, calls)
        return self[pair]


def results_of_a_fresh_process(artifacts: Artifacts, pairs: Iterable[tuple[str, str]]) -> dict[str, list[list[Tensor]]]:
    """Return what one fresh process, which knows none of the nets, gets from their artifacts by folder name."""
    calls = {artifacts[pair].artifact.path.name: artifacts[pair].calls for pair in pairs}
    torch.save(calls, artifacts.folder / "calls.pt")
    ran = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LOAD_AND_RUN, str(artifacts.folder)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == ""
    return torch.load(artifacts.folder / "results.pt", weights_only=True)
