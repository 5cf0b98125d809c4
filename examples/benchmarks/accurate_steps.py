"""Whether `int8_accurate` is ever below `int8`: both of many architectures, on samples that chose nothing.

`python examples/benchmarks/accurate_steps.py` calibrates each network of `coverage.py`, with random weights, with both
recipes on the same calls, and tells the mean over held-back samples of signal over noise of what the file computes,
simulated. Differences are paired by sample. `--only NAME ...` runs some; what has run is kept in `--state`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from coverage import BATCH, NETWORKS, NUM_CALIBRATION_CALLS
from network_cases import settled
from results import publish
from timing import bootstrap_mean, table

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.fit import output_snrs
from lightning_quant.export.prepare import prepare

RECIPES = ("int8", "int8_accurate")
NUM_HELD_BACK = 8  # calls


def run(name: str) -> dict[str, Any]:
    """Calibrate one network with both recipes; return decibels of every held-back sample, and what was kept."""
    torch.manual_seed(0)
    case = NETWORKS[name]()
    net = settled(case.net, case.inputs)
    calls = [case.inputs(BATCH, seed) for seed in range(NUM_CALIBRATION_CALLS)]
    held_back = [((case.inputs(BATCH, 500 + seed),), {}) for seed in range(NUM_HELD_BACK)]
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        started = time.process_time()
        prepared = prepare(net, (calls[0],), recipe=recipe, observer="mse", trains=False)
        calibrate(prepared, steps_of(prepared, calls))
        seconds = time.process_time() - started
        steps = [step.name for step in prepared.accuracy_steps if step.kept]
        found[recipe] = {"db": output_snrs(prepared, held_back), "steps": steps, "cpu_seconds": seconds}
    return found


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Return the row of one network."""
    plain, accurate = (torch.tensor(found[recipe]["db"], dtype=torch.float64) for recipe in RECIPES)
    steps = ", ".join(found[RECIPES[1]]["steps"]) or "none"
    seconds = f"{found[RECIPES[1]]['cpu_seconds']:.0f}"
    return (
        name,
        f"{plain.mean():.1f}",
        f"{accurate.mean():.1f}",
        f"{bootstrap_mean(accurate - plain):+.2f}",
        steps,
        seconds,
    )


def main() -> None:
    """Run the networks one after the other, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NAME")
    parser.add_argument("--state", type=Path, help="JSON file of what has run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    state = arguments.state
    found = json.loads(state.read_text()) if state is not None and state.exists() else {}
    for name in arguments.only:
        if name not in found:
            found[name] = run(name)
            print(row(name, found[name]), flush=True)
            if state is not None:
                state.write_text(json.dumps(found))
    header = ("network", *(f"dB: {recipe}" for recipe in RECIPES), "difference [95 %]", "steps kept", "CPU s")
    publish("accurate_steps", table([row(name, found[name]) for name in arguments.only if name in found], header))


if __name__ == "__main__":
    main()
