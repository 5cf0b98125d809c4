"""The callbacks in projects that are built on Lightning, each with its own Trainer, loaders and saving.

`python tests/clients/environment.py` makes the environments, `pytest -m clients` runs the fits.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from environment import REPOSITORY, REQUIREMENTS, is_made, python_of

import lightning_quant

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]
# What no recipe can do, with the reason that the refusal must name.
REFUSALS: dict[tuple[str, str], str] = {}


def results(client: str) -> list[dict[str, Any]]:
    """Fit every model of a client with every recipe."""
    if not is_made(client):
        pytest.skip(f"needs the environment that `python tests/clients/environment.py {client}` makes")
    script = Path(__file__).with_name("run_client.py")
    package = Path(lightning_quant.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [python_of(client), "-W", "ignore", script, client]
    run = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("client", REQUIREMENTS)
def test_client(client: str, record_property: Any) -> None:
    found = results(client)
    made = [fit for fit in found if fit["outcome"] == "artifact"]
    record_property("fits", found)

    assert [fit for fit in found if fit["outcome"] == "raised"] == []
    assert [fit for fit in found if fit["outcome"] == "refused" and fit["batches"]] == []
    assert [fit for fit in made if fit["apart"] or not fit["saved"]] == []
    assert len(made) >= 0.8 * len(found), [fit for fit in found if fit not in made]
