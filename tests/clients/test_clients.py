"""The callbacks in projects that are built on Lightning, each with its own Trainer, loaders and saving.

`python tests/clients/environment.py` makes the environments, `pytest -m clients` fits a few models of each with every
recipe; `python tests/clients/table.py` fits all, and writes what came of it to README.md beside this file.
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
# A few models of each: their fits take seconds, and every kind of batch, forward and saving is there.
MODELS = {
    "darts": ["NBEATS", "TFT"],
    "forecasting": ["NBeats", "DecoderMLP"],
    "neuralforecast": ["MLP", "LSTM"],
    "gluonts": ["SimpleFeedForward", "DLinear"],
}


def results(client: str, *models: str) -> list[dict[str, Any]]:
    """Fit models of a client, all when none is named, with every recipe."""
    script = Path(__file__).with_name("run_client.py")
    package = Path(lightning_quant.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    command = [python_of(client), "-W", "ignore", script, client, *models]
    run = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("client", REQUIREMENTS)
def test_client(client: str) -> None:
    if not is_made(client):
        pytest.skip(f"needs the environment that `python tests/clients/environment.py {client}` makes")
    found = results(client, *MODELS.get(client, ()))
    made = [fit for fit in found if fit["outcome"] == "artifact"]

    assert [fit for fit in found if fit["outcome"] == "raised"] == []
    assert [fit for fit in found if fit["outcome"] == "refused" and fit["batches"]] == []
    assert [fit for fit in made if fit["apart"] or not fit["saved"]] == []
    if client in MODELS:
        assert len(made) == len(found), [fit for fit in found if fit not in made]
