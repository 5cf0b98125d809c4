"""Nets with planted bad layers, and limits drawn at random: what the search finds, and what it costs in validations.

`python examples/benchmarks/search.py` prints a table, without latencies. Every net is a teacher of its own: labels are
its float answers, one in ten of them wrong, so that float is 90 % right. One or two of its layers answer with channels
that are far too large and that nobody reads, which leaves the others few of the 256 steps. The limit is a fall of 0.5
to 4 points. "unseen" are 20,000 samples that no search has seen. The greedy search keeps one operator more in float
after the other, most harmful first, and validates each time. NNCF's accuracy control runs where it is installed.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from results import publish
from timing import table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.search.candidates import Candidates
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.relaxations import relaxations
from lightning_quant.simulate.prepared import Prepared

CLASSES, NUM_VALIDATION, NUM_UNSEEN, BATCH = 10, 4000, 20000, 500
OURS, GREEDY, NNCF = "lightning_quant", "greedy, one operator at a time", "NNCF accuracy control (OpenVINO)"


class Net(nn.Module):
    """Layers in a row, of which some add what they read: a perceptron, or convolutions, or depthwise ones."""

    def __init__(self, kind: str, depth: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        if kind == "perceptron":
            self.first, self.shape = nn.Linear(32, width), (32,)
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        else:
            groups = width if kind == "depthwise" else 1
            self.first, self.shape = nn.Conv2d(3, width, 3, padding=1), (3, 8, 8)
            self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=groups) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Score a batch."""
        x = F.relu(self.first(x))
        for index, layer in enumerate(self.layers):
            y = F.relu(layer(x))
            x = x + y if self.kind == "residual" and index % 2 else y
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


@dataclass
class Task:
    """A net with planted bad layers, its data, and a limit.

    Attributes:
        net: the float net.
        bad: names of the layers that are bad.
        limit: by how much accuracy may fall.
        data: inputs and labels of calibration, validation and what nobody has seen.
    """

    net: Net
    bad: list[str]
    limit: float
    data: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@torch.no_grad()
def task(seed: int) -> Task:
    """Make a net and its data."""
    generator, chance = torch.Generator().manual_seed(seed), random.Random(seed)
    torch.manual_seed(seed)
    kind = chance.choice(["perceptron", "convolutions", "residual", "depthwise"])
    net = Net(kind, chance.randint(3, 8), chance.choice([16, 24, 32])).eval()
    bad = chance.sample(range(len(net.layers) - 1), chance.choice([1, 1, 2]))
    for index in bad:
        layer, reader = net.layers[index], net.layers[index + 1]
        channels = chance.sample(range(layer.weight.shape[0]), 2)
        layer.bias[channels] = 10 ** chance.uniform(1.5, 3.5)
        if kind == "depthwise":
            reader.weight[channels] = 0.0
        else:
            reader.weight[:, channels] = 0.0
        if kind == "residual":
            net.head.weight[:, channels] = 0.0
            for other in net.layers:
                other.weight[:, channels] = 0.0
    made = Task(net, [f"layers.{index}" for index in bad], chance.choice([0.005, 0.01, 0.02, 0.04]))
    for name, number in (("calibration", 256), ("validation", NUM_VALIDATION), ("unseen", NUM_UNSEEN)):
        inputs = torch.randn(number, *net.shape, generator=generator)
        logits = torch.cat([net(batch) for batch in inputs.split(BATCH)])
        if not made.data:
            spread = logits.std(0) + 1e-6
            middle = logits.mean(0)
            net.head.weight.div_(spread[:, None])
            net.head.bias.copy_((net.head.bias - middle) / spread)
            logits = (logits - middle) / spread
        wrong = torch.rand(number, generator=generator) < 0.1
        others = torch.randint(CLASSES, (number,), generator=generator)
        made.data[name] = inputs, torch.where(wrong, others, logits.argmax(1))
    return made


@torch.no_grad()
def correct(task: Task, name: str) -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return what tells which samples a module gets right."""
    inputs, labels = task.data[name]

    def evaluate(model: nn.Module) -> dict[str, Tensor]:
        answers = torch.cat([model(batch).argmax(1) for batch in inputs.split(BATCH)])
        return {"accuracy": (answers == labels).float()}

    return evaluate


@dataclass
class Outcome:
    """What one way has found for a task.

    Attributes:
        validations: of files.
        num_bytes: of the file.
        drop: fall of accuracy on unseen samples.
        validated_drop: on the samples of validation.
        seconds: that it took.
    """

    validations: int
    num_bytes: int
    drop: float
    validated_drop: float
    seconds: float


def outcome(task: Task, model: nn.Module, validations: int, num_bytes: int, started: float) -> Outcome:
    """Measure what was found."""
    seconds, drops = time.perf_counter() - started, {}
    for name in ("unseen", "validation"):
        evaluate = correct(task, name)
        drops[name] = float((evaluate(task.net)["accuracy"] - evaluate(model)["accuracy"]).mean())
    return Outcome(validations, num_bytes, drops["unseen"], drops["validation"], seconds)


def ours(task: Task, folder: Path) -> Outcome | None:
    """Search; nothing where no file keeps the limit, and the report says so."""
    started = time.perf_counter()
    batches = list(task.data["calibration"][0].split(64))
    judged: dict[str, Any] = {"evaluate": correct(task, "validation"), "limits": {"accuracy": -task.limit}}
    with mock.patch("lightning_quant.report.make_report.measure_latency", return_value=((), ())):
        artifact = lq.quantize(task.net, calibration_data=batches, output_dir=folder, threads=1, **judged)
    search = artifact.report["search"]
    if not all(verdict["kept"] for verdict in search["verdicts"]):
        return None
    return outcome(task, lq.load(folder), len(search["trials"]), artifact.size_bytes, started)


def prepared(task: Task) -> tuple[Prepared, list[Call]]:
    """Return the whole recipe, calibrated, and the calls that it was calibrated on."""
    calls = [Call((batch,)) for batch in task.data["calibration"][0].split(64)]
    model = prepare(task.net, calls[0].args, observer="mse", trains=False)
    calibrate(model, steps_of(model, calls))
    return model, calls


def greedy(task: Task, folder: Path) -> Outcome | None:
    """Keep one operator more in float after the other, and validate each time, on a point estimate."""
    started, (whole, calls) = time.perf_counter(), prepared(task)
    ranked, makes = relaxations(whole, calls[-2:]), Candidates(whole, calls, Selection())
    harm = {name: sum(part.error for part in ranked.parts if name in part.users) for name in ranked.operators}
    kept: list[tuple[str, str]] = []
    evaluate = correct(task, "validation")
    floating = evaluate(task.net)["accuracy"].mean()
    for number, name in enumerate(sorted(ranked.operators, key=lambda name: -harm[name])):
        artifact = export(makes.make(Choice(tuple(kept))).on_host(), folder)
        model = lq.load(folder)
        if floating - evaluate(model)["accuracy"].mean() <= task.limit:
            return outcome(task, model, number + 1, artifact.size_bytes, started)
        kept.append((name, FLOAT))
    return None


def nncf_control(task: Task, folder: Path) -> Outcome | None:
    """Let NNCF revert operators until its validation keeps the limit."""
    import nncf
    import openvino as ov

    started, validations = time.perf_counter(), 0
    inputs, labels = task.data["validation"]

    def validate(model: Any, items: Any) -> tuple[float, None]:
        nonlocal validations
        validations += 1
        answers = torch.cat([torch.from_numpy(model([batch.numpy()])[0]).argmax(1) for batch in inputs.split(BATCH)])
        return float((answers == labels).float().mean()), None

    batches = [batch.numpy() for batch in task.data["calibration"][0].split(64)]
    example = torch.zeros(2, *task.net.shape)
    converted = ov.convert_model(task.net, example_input=example, input=[(-1, *task.net.shape)])
    data = nncf.Dataset(batches)
    found = nncf.quantize_with_accuracy_control(converted, data, data, validate, max_drop=task.limit)
    ov.save_model(found, folder / "nncf.xml", compress_to_fp16=False)
    compiled = ov.compile_model(found, "CPU")

    class Loaded(nn.Module):
        """The compiled file as a module."""

        def forward(self, x: Tensor) -> Tensor:
            """Run it."""
            return torch.from_numpy(compiled([x.numpy()])[0])

    made = outcome(task, Loaded(), validations - 1, (folder / "nncf.bin").stat().st_size, started)
    return made if made.validated_drop <= task.limit else None


def is_found_first(task: Task) -> bool:
    """Tell whether the first step of the ranking keeps a planted bad layer out of the integers."""
    whole, calls = prepared(task)
    return bool(set(dict(relaxations(whole, calls[-2:]).steps()[0].kept)) & set(task.bad))


def row(name: str, outcomes: list[tuple[Task, Outcome | None]]) -> list[str]:
    """Return a row of the table."""
    made = [(task, found) for task, found in outcomes if found is not None]
    unseen = sum(found.drop > task.limit for task, found in made)
    validated = sum(found.validated_drop > task.limit + 1e-6 for task, found in made)
    mean = sum(found.validations for _, found in made) / max(len(made), 1)
    most = max((found.validations for _, found in made), default=0)
    kilobytes = sum(found.num_bytes for _, found in made) / 1000 / max(len(made), 1)
    seconds = sum(found.seconds for _, found in made) / max(len(made), 1)
    cells = [f"{len(made)}/{len(outcomes)}", f"{unseen}/{len(made)}", f"{validated}/{len(made)}"]
    return [name, *cells, f"{mean:.1f} ({most})", f"{kilobytes:.1f}", f"{seconds:.1f}"]


def main() -> None:
    """Run all ways on all nets, and print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", type=int, default=50)
    parser.add_argument("--ranked", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ways: dict[str, Callable[[Task, Path], Outcome | None]] = {OURS: ours, GREEDY: greedy}
    try:
        import nncf  # noqa: F401

        ways[NNCF] = nncf_control
    except ImportError:
        print("NNCF is not installed: its row says so.")
    found: dict[str, list[tuple[Task, Outcome | None]]] = {name: [] for name in ways}
    for seed in range(options.nets):
        made = task(seed)
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                found[name].append((made, way(made, Path(folder).resolve() / "file")))
        print(
            json.dumps(
                {"net": seed, "kind": made.net.kind, "limit": made.limit}
                | {
                    name: None
                    if (last := every[-1][1]) is None
                    else [last.validations, last.num_bytes, round(last.drop, 4)]
                    for name, every in found.items()
                }
            ),
            flush=True,
        )
    first = sum(is_found_first(task(1000 + seed)) for seed in range(options.ranked))
    header = ["way", "files that keep the limit", "violations, unseen", "violations, validation"]
    header += ["validations (most)", "KB", "s"]
    rows = [row(name, every) for name, every in found.items()]
    if NNCF not in found:
        rows.append([NNCF, "not installed", *["-"] * (len(header) - 2)])
    note = f"A planted bad layer was in the first step of the ranking for {first} of {options.ranked} other nets."
    publish("search", f"{table(rows, header)}\n\n{note}")


if __name__ == "__main__":
    main()
