"""Time and memory of artifacts on this machine, over batch sizes and numbers of threads."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, open_model, private_copy, read
from lightning_quant.artifact.recorded_report import best_float_ms
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.errors import DiskError, QuantizationError
from lightning_quant.machine.latency import measure
from lightning_quant.machine.machine import cpu_name, peak_bytes

_WORKER = "from lightning_quant.measure.bench import _work; _work()"


@dataclass(frozen=True)
class BenchRow:
    """One artifact at one batch size on one number of threads.

    Attributes:
        path: the artifact's folder.
        runtime: its runtime.
        threads: number of threads.
        batch: samples in a call.
        median_ms: of one call.
        low_ms: lower quartile.
        high_ms: upper quartile.
        samples_per_s: samples in a second at the median.
        peak_bytes: memory of the process at its peak above what it had before loading the artifact.
        float_ms: median of the faster float peer in the artifact's report, measured when it was written; None when
            the report has none for this batch size, number of threads and processor.
    """

    path: str
    runtime: str
    threads: int
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    samples_per_s: float
    peak_bytes: int
    float_ms: float | None

    @property
    def speedup(self) -> float | None:
        """Float median divided by this median."""
        return None if self.float_ms is None else self.float_ms / self.median_ms


def bench(
    paths: Sequence[str | os.PathLike[str]],
    batches: Sequence[int] | None = None,
    threads: Sequence[int] | None = None,
) -> list[BenchRow]:
    """Measure artifacts, interleaved, on inputs of their golden batches repeated to each batch size.

    Every number of threads, and every artifact's memory, has a process of its own.

    Args:
        paths: the artifacts' folders.
        batches: batch sizes; by default those in the reports, which have float peers, or 1 and 8.
        threads: numbers of threads; by default those in the reports, or 1.

    Raises:
        QuantizationError: a folder is no artifact, or an artifact does not take such batches.
    """
    names = [str(path) for path in paths]
    reports = [report for name in names if (report := read(name).report) is not None]
    batches = (
        batches or list(dict.fromkeys(r["batch"] for report in reports for r in report.get("latency", []))) or [1, 8]
    )
    threads = threads or list(dict.fromkeys(report["threads"] for report in reports if "threads" in report)) or [1]
    rows = []
    for number in threads:
        peaks = {name: _in_process([name], batches, number)["peak_bytes"] for name in names}
        timings = _in_process(names, batches, number)["timings"]
        for name in names:
            artifact = read(name)
            for batch in batches:
                timing = timings[name][str(batch)]
                rows.append(
                    BenchRow(
                        path=name,
                        runtime=artifact.manifest["runtime"],
                        threads=number,
                        batch=batch,
                        **timing,
                        samples_per_s=1000 * batch / timing["median_ms"],
                        peak_bytes=peaks[name],
                        float_ms=_recorded_float(artifact.report, batch, number),
                    )
                )
    return rows


def peak_of(own: Artifact, threads: int) -> int:
    """Return the bytes that a process of its own takes at its peak for loading an artifact and for one call of it.

    That is on top of what the process has before, and in a call of the golden batch: the less of two processes', of
    which one may hold pages of libraries for some MiB more.

    Args:
        own: private copy of the artifact, or one that nobody else writes to.
        threads: of the process.

    Raises:
        QuantizationError: it does not run by itself.
    """
    return min(_in_process([str(own.path)], [], threads, own=own.manifest)["peak_bytes"] for _ in range(2))


def as_dict(row: BenchRow) -> dict[str, Any]:
    """Return a row with its speed-up, for JSON."""
    return {**asdict(row), "speedup": row.speedup}


def _recorded_float(report: dict[str, Any] | None, batch: int, threads: int) -> float | None:
    if report is None or (report.get("threads"), report.get("cpu")) != (threads, cpu_name()):
        return None
    for row in report.get("latency", []):
        if row["batch"] == batch:
            return best_float_ms(row)
    return None


def _in_process(
    names: list[str], batches: Sequence[int], threads: int, own: dict[str, Any] | None = None
) -> dict[str, Any]:
    task = json.dumps({"names": names, "batches": list(batches), "threads": threads, "own": own})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _WORKER]
    try:
        ran = subprocess.run(command, input=task, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise DiskError(
            f"Expected a process of its own for each measurement, but it does not start: {error}."
        ) from error
    if ran.returncode != 0:
        last = ran.stderr.strip().splitlines()[-1:] or ["no message"]
        raise QuantizationError(f"Expected {', '.join(names)} to run in batches of {list(batches)}, but {last[0]}")
    return json.loads(ran.stdout.splitlines()[-1])


def _work() -> None:
    """Measure what standard input asks for, in this process, and print the answer."""
    task = json.load(sys.stdin)
    torch.set_num_threads(task["threads"])
    before = peak_bytes()
    contestants: dict[str, Callable[[], Any]] = {}
    for name in task["names"]:
        own = task.get("own") and Artifact(Path(name), task["own"])
        with nullcontext(own) if own else private_copy(name) as artifact:
            inputs = golden.load(artifact.golden_path, artifact.signature).inputs
            model = open_model(artifact, threads=task["threads"])
        if not task["batches"]:
            _call(model, list(inputs))()
        for batch in task["batches"]:
            tensors = [
                _repeated(tensor, batch) if info.shape and info.shape[0] == "batch" else tensor
                for tensor, info in zip(inputs, artifact.signature.inputs, strict=True)
            ]
            contestants[f"{name}\n{batch}"] = _call(model, tensors)
    timings = measure(contestants) if contestants else {}
    results: dict[str, dict[str, Any]] = {}
    for key, timing in timings.items():
        name, _, batch = key.rpartition("\n")
        values = {"median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
        results.setdefault(name, {})[batch] = values
    print(json.dumps({"timings": results, "peak_bytes": peak_bytes() - before}))


def _call(model: LoadedModule, tensors: list[torch.Tensor]) -> Callable[[], Any]:
    """Return a call as the report times it, with its checks; without them where tensors come in dicts or lists."""
    named = {info.name: tensor for info, tensor in zip(model.signature.inputs, tensors, strict=True)}
    try:
        model.signature.flatten((), named)
    except QuantizationError:
        return functools.partial(model.run, tensors)
    return functools.partial(model, **named)


def _repeated(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    times = -(-batch // tensor.shape[0])
    return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch].contiguous()
