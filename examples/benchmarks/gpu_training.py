"""What quantization-aware training adds to a training step on a GPU: ResNet50, ViT-B/16, and ResNet18 with few images.

`python examples/benchmarks/gpu_training.py` times float (eager, compiled), lightning_quant (observing, frozen, eager
and compiled) and torch.ao FX with CUDA events, interleaved, under autocast in bfloat16. `--count` runs on the CPU and
counts instead: tensor operations of forward and backward, and the bytes that they read and write, each tensor once an
operation, on the way that a GPU takes.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from gpu_models import ResNet50, VisionTransformer
from peers import freeze_observers, torch_ao_qat
from reference_models import resnet18
from results import publish
from step_count import count_without_computing
from timing import table
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare

PHASES = {"observing": "fake_quantize", "frozen": "frozen"}


@dataclass(frozen=True)
class Contest:
    """A model, its batch, and the side of its images."""

    name: str
    build: Callable[[], nn.Module]
    batch: int
    size: int = 224


CONTESTS = (
    Contest("ResNet50, 128 images", ResNet50, 128),
    Contest("ViT-B/16, 64 images", VisionTransformer, 64),
    Contest("ResNet18, 8 images", resnet18, 8),
)


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, run: Callable[[Tensor], Tensor], prepared: Any = None
) -> Callable[[], None]:
    """Return a whole step of SGD under autocast; for a prepared model, with what the callback does around it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        if prepared is not None:
            prepared.observing = True
            if prepared.quantizes:
                prepared.ranges.grids()
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        if prepared is not None:
            prepared.observing = False
            prepared.ranges.settle()

    return step


def ours(model: nn.Module, images: Tensor, labels: Tensor, phase: str, *, compiled: bool) -> Callable[[], None]:
    """Return the step of a copy prepared by lightning_quant, in a phase, with known ranges."""
    model = copy.deepcopy(model)
    prepared = prepare(model, (images[:2],), recipe="int8", runtime="onnxruntime")
    prepared.attach()
    step = training_step(model, images, labels, model, prepared)
    for known in ("observe", "fake_quantize", PHASES[phase]):
        prepared.set_phase(known)
        step()
        step()
    return training_step(model, images, labels, torch.compile(model), prepared) if compiled else step


def theirs(model: nn.Module, images: Tensor, labels: Tensor, phase: str) -> Callable[[], None]:
    """Return the step of a copy prepared by torch.ao, with known ranges."""
    prepared = torch_ao_qat(copy.deepcopy(model).cpu(), images[:2].cpu()).to(images.device)
    step = training_step(prepared, images, labels, prepared)
    step()
    if phase == "frozen":
        freeze_observers(prepared)
    return step


def contestants(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[], Callable[[], None]]]:
    """Return what makes each contestant's step."""

    def floating(*, compiled: bool) -> Callable[[], None]:
        twin = copy.deepcopy(model)
        return training_step(twin, images, labels, torch.compile(twin) if compiled else twin)

    made: dict[str, Callable[[], Callable[[], None]]] = {
        "float": lambda: floating(compiled=False),
        "float, compiled": lambda: floating(compiled=True),
    }
    for phase in PHASES:
        made[f"lightning_quant, {phase}"] = lambda p=phase: ours(model, images, labels, p, compiled=False)
        made[f"lightning_quant, {phase}, compiled"] = lambda p=phase: ours(model, images, labels, p, compiled=True)
        made[f"torch.ao FX, {phase}"] = lambda p=phase: theirs(model, images, labels, p)
    return made


def milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Time one step."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(step: Callable[[], None], device: torch.device) -> float:
    """Return the memory that a step takes beyond what lies there before it."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@dataclass
class Field:
    """The steps of all contestants over one model, and of those that fail the reason."""

    contest: Contest
    device: torch.device
    steps: dict[str, Callable[[], None]]
    failures: dict[str, str]


def line_up(contest: Contest, device: torch.device) -> Field:
    """Make every contestant's step and call it three times."""
    torch.manual_seed(0)
    model = contest.build().train().to(device, memory_format=torch.channels_last)
    images = torch.randn(contest.batch, 3, contest.size, contest.size, device=device)
    images, labels = images.to(memory_format=torch.channels_last), torch.randint(1000, (contest.batch,), device=device)
    field = Field(contest, device, {}, {})
    for name, make in contestants(model, images, labels).items():
        try:
            step = make()
            for _ in range(3):
                step()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            field.failures[name] = str(error).split("\n")[0][:80]
        else:
            field.steps[name] = step
    return field


def time_field(field: Field, rounds: int) -> str:
    """Return the table of one model's times."""
    times: dict[str, list[float]] = {name: [] for name in field.steps}
    for _ in range(rounds):
        for name, step in field.steps.items():
            times[name].append(milliseconds(step, field.device))
    memory = {name: peak_mib(step, field.device) for name, step in field.steps.items()}
    rows = []
    for name, values in times.items():
        base = "float, compiled" if name.endswith("compiled") else "float"
        low, middle, high = statistics.quantiles(values, n=4)
        ratio = middle / statistics.median(times[base]) if base in times else float("nan")
        ratio_of_memory = memory[name] / memory[base] if base in times else float("nan")
        rows.append((name, f"{middle:.1f} [{low:.1f}, {high:.1f}]", f"{ratio:.2f}", f"{ratio_of_memory:.2f}", ""))
    rows += [(name, "fails", "", "", reason) for name, reason in field.failures.items()]
    return table(rows, (field.contest.name, "ms [quartiles]", "this / float", "peak memory / float", "reason"))


def count_contest(contest: Contest) -> list[tuple[str, ...]]:
    """Return rows of operations and bytes."""
    rows = []
    shape = (contest.batch, 3, contest.size, contest.size)
    steps = {"float": None, **{f"lightning_quant, {name}": phase for name, phase in PHASES.items()}}
    counts = {name: count_without_computing(contest.build, shape, p, torch.bfloat16) for name, p in steps.items()}
    floating = counts["float"]
    for name, found in counts.items():
        more = found.num_operations / floating.num_operations, found.num_bytes / floating.num_bytes
        moved = f"{found.num_bytes / 1e9:.1f}"
        rows.append((contest.name, name, f"{found.num_operations:,}", f"{more[0]:.2f}", moved, f"{more[1]:.2f}"))
    return rows


def main() -> None:
    """Time or count all models and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="count on the CPU instead of timing")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="2 images of 64x64, to try the script")
    parser.add_argument("--models", nargs="+", default=[""], help="parts of their names")
    arguments = parser.parse_args()
    contests = tuple(c for c in CONTESTS if any(part in c.name for part in arguments.models))
    if arguments.small:
        contests = tuple(
            Contest(c.name, (lambda: VisionTransformer(64, 1, 96)) if "ViT" in c.name else c.build, 2, 64)
            for c in contests
        )
    if arguments.count:
        rows = [row for contest in contests for row in count_contest(contest)]
        header = ("model", "step", "operations", "/ float", "GB moved", "/ float")
        publish("gpu_training-count", table(rows, header))
        return
    device = torch.device(arguments.device)
    where = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else "CPU"
    tables = [time_field(line_up(contest, device), arguments.rounds) for contest in contests]
    publish("gpu_training", where, *tables, packages=("triton",) if device.type == "cuda" else ())


if __name__ == "__main__":
    main()
