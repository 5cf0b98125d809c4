"""The table of tests/README.md is what the tests show, no more and no less."""

import json
import os
import subprocess
import sys
from pathlib import Path

import features
import guards
import pytest

TESTS = Path(__file__).parent
README = TESTS / "README.md"
HEAD = """# What the tests show

`pytest` runs the ordinary suite, `pytest -m slow` the rest. A tiny net, tiny data and one or two epochs each.

## Features of Lightning

Every row is made of the tests that it names:
`PYTHONPATH=tests/support python tests/test_feature_table.py` writes this file, and a test
compares. *Verified*: a real Trainer ran it, and the artifact agrees with the module. *Refused*: before the first
batch, for the reason given.
"""
DEVICES = """## Devices

`tests/devices` runs the callbacks and `quantize` on a device that the CPU emulates: `support/emulated` is a backend of
PyTorch whose tensors lie elsewhere and raise, as CUDA's do, when they meet those of the CPU. A C++ compiler builds it
once, in about half a minute. `pytest -m gpu` runs the same tests on a CUDA device, and skips them where there is none.

| device | torch | what ran |
|---|---|---|
| emulated | 2.13.0, CPU | `tests/devices`, slow tests too. Training: `int8` in every precision, `int4_weights`, \
islands, batch norm, best weights. After training: `int8` on three runtimes, `int8_accurate`, five recipes of layers \
on two. Both: under `torch.compile` (its `eager` backend), `runtime="auto"`, averages of weights, checkpoints. \
Resuming from and to the CPU; two callbacks. One process; no speed is told |
| CUDA 13.0, one H100 80GB | 2.11.0, Triton 3.6.0 | On 2026-11-27, Lightning 2.6.6, driver 580.159: of `tests/devices` \
(44 s on ten processes), the kernels and 16-mixed 101 of 107 passed. Four of the others let Lightning choose the \
device that they were to resume on; two, `16-true` and `bf16-true`, found a table in the default dtype. All six are \
repaired, and have not run on a GPU since |
"""


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[features.Row]:
    shown = request.config.stash[features.SHOWN]
    if {item.path for item in shown} >= set((TESTS / "callbacks").glob("test_*.py")):
        return features.rows_of(shown)
    return collected(tmp_path_factory.mktemp("features") / "rows.json")


def collected(path: Path) -> list[features.Row]:
    """Collect all tests, slow ones included, in a process of its own."""
    environment = os.environ | {"LIGHTNING_QUANT_FEATURES": str(path)}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", str(TESTS / "callbacks")]
    result = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    if not path.exists():
        raise RuntimeError(result.stdout + result.stderr)
    return json.loads(path.read_text())


def readme(rows: list[features.Row]) -> str:
    return f"{HEAD}\n{features.table(rows)}\n\n{DEVICES}\n{guards.table()}\n"


def test_table_is_up_to_date(rows: list[features.Row]) -> None:
    assert README.read_text() == readme(rows), "run `PYTHONPATH=tests/support python tests/test_feature_table.py`"


def test_every_row_names_its_tests(rows: list[features.Row]) -> None:
    assert len({(row["group"], row["name"]) for row in rows}) > 60
    assert {row["callback"] for row in rows} == {"QAT", "PTQ"}
    assert all("::test_" in row["test"] for row in rows)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        README.write_text(readme(collected(Path(folder) / "rows.json")))
