"""search.json: every trial of a search, so that an interrupted one goes on where it was."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.arguments.reading import parse_json, read_bytes
from lightning_quant.artifact.folder import SEARCH
from lightning_quant.errors import ArtifactError
from lightning_quant.measure.contributions import Difference
from lightning_quant.search.choice import Choice, Measured, Trial, Verdict
from lightning_quant.search.find import Space, find
from lightning_quant.search.judge import Judge
from lightning_quant.search.progress import Budget, SearchRecord

SCHEMA_VERSION = 2
_MAX_BYTES = 64 * 2**20


def fingerprint(module: nn.Module, *said: Any) -> str:
    """Return what two searches have in common that try the same: weights, and all that they were told."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        if hasattr(tensor, "detach"):
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(said).encode())
    return digest.hexdigest()


def save(folder: Path, record: SearchRecord, objective: str, mark: str) -> None:
    """Write what a search has found by now, whole or not at all; a folder that takes no file costs the record alone."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": mark,
        "objective": objective,
        "num_steps": record.num_steps,
        "ended": record.ended,
        "trials": [as_dict(trial) for trial in record.trials],
    }
    _write(folder, content)


def save_beside(folder: Path, more: dict[str, Any], *, anew: bool) -> None:
    """Write something else that was tried into the record of a search.

    Args:
        folder: the artifact's.
        more: key to what JSON can hold.
        anew: whether there was no search, so that what stands there is of another run.
    """
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "trials": []}
    with contextlib.suppress(ArtifactError, OSError, ValueError):
        content = content if anew else parse_json(read_bytes(folder / SEARCH, _MAX_BYTES), _MAX_BYTES)
    _write(folder, {**content, **more})


def _write(folder: Path, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".lightning_quant-{SEARCH}"
        temporary.write_text(json.dumps(_plain(content), indent=2, allow_nan=False), encoding="utf-8")
        os.replace(temporary, folder / SEARCH)


def find_on_record(
    space: Space,
    judge: Judge,
    objective: str,
    budget: Budget,
    folder: Path,
    mark: str,
    tell: Callable[[SearchRecord], None] = lambda _: None,
) -> SearchRecord:
    """Search a space, go on from what an interrupted search of the same has recorded, and record every trial.

    Args:
        space: what can be tried.
        judge: gives a verdict for each limit.
        objective: "size", "latency", or a metric.
        budget: what may be spent.
        folder: the artifact's.
        mark: `fingerprint` of the search.
        tell: called after every trial, and in the end.
    """

    def note(record: SearchRecord) -> None:
        save(folder, record, objective, mark)
        tell(record)

    record = find(space, judge, objective, budget, record=load(folder, mark), note=note)
    note(record)
    return record


def as_dict(trial: Trial) -> dict[str, Any]:
    """Return a trial as JSON holds it."""
    return {
        **trial.choice.to_dict(),
        "measured": None if trial.measured is None else dataclasses.asdict(trial.measured),
        "verdicts": [dataclasses.asdict(verdict) for verdict in trial.verdicts],
        "keeps_all": trial.keeps_all,
        "seconds": round(trial.seconds, 3),
        "validations": trial.validations,
        **({"error": trial.error} if trial.error else {}),
    }


def load(folder: Path, mark: str) -> SearchRecord:
    """Return what an interrupted search of the same has found; nothing where there is none."""
    try:
        content = parse_json(read_bytes(folder / SEARCH, _MAX_BYTES), _MAX_BYTES)
        if content["schema_version"] != SCHEMA_VERSION or content["fingerprint"] != mark:
            return SearchRecord()
        return SearchRecord([_trial(values) for values in content["trials"]])
    except (ArtifactError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return SearchRecord()


def _plain(value: Any) -> Any:
    """Write what JSON has no numbers for as nothing."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _trial(values: dict[str, Any]) -> Trial:
    measured = values["measured"]
    if measured is not None:
        differences = {n: Difference(**{**d, "value": _number(d["value"])}) for n, d in measured["differences"].items()}
        metrics = {name: _number(value) for name, value in measured["metrics"].items()}
        measured = Measured(**{**measured, "metrics": metrics, "differences": differences})
    verdicts = tuple(Verdict(**verdict) for verdict in values["verdicts"])
    choice = Choice(tuple(values["kept"].items()), values.get("accurate", False))
    seconds, read = values["seconds"], values.get("validations", 1.0)
    return Trial(choice, measured, verdicts, seconds, values.get("error", ""), read)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
