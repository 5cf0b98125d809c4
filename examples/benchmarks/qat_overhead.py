"""What quantization-aware training adds to the CPU time of a training step: ResNet18, 32 images of 64x64, SGD.

`python examples/benchmarks/qat_overhead.py` compares float, lightning_quant and torch.ao, with and without observers.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from peers import freeze_observers, torch_ao_qat
from reference_models import resnet18
from results import publish
from timing import bootstrap_ratio, interleaved, median_ms, table
from torch import Tensor, nn

from lightning_quant.export.prepare import prepare

OURS, OURS_FROZEN = "lightning_quant, observing", "lightning_quant, observers frozen"
PEER, PEER_FROZEN = "torch.ao FX, observing", "torch.ao FX, observers frozen"


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return a function that does one whole SGD step on the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def ours(images: Tensor, labels: Tensor, phase: str) -> Callable[[], None]:
    """Return the training step of a ResNet18 prepared by lightning_quant, in the given phase, with known ranges."""
    model = resnet18().train()
    prepared = prepare(model, (images,), recipe="int8", runtime="onnxruntime")
    prepared.attach()
    prepared.observing = True
    step = training_step(model, images, labels)
    for known in ("observe", "fake_quantize", phase):
        prepared.set_phase(known)
        step()
    return step


def theirs(images: Tensor, labels: Tensor, freeze: bool) -> Callable[[], None]:
    """Return the training step of a ResNet18 prepared by torch.ao, with known ranges."""
    model = torch_ao_qat(resnet18(), images)
    step = training_step(model, images, labels)
    step()
    if freeze:
        freeze_observers(model)
    return step


def main() -> None:
    """Time all steps in interleaved rounds and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(arguments.batch_size, 3, 64, 64), torch.randint(1000, (arguments.batch_size,))
    steps = {
        "float": training_step(resnet18().train(), images, labels),
        OURS: ours(images, labels, "fake_quantize"),
        OURS_FROZEN: ours(images, labels, "frozen"),
        PEER: theirs(images, labels, freeze=False),
        PEER_FROZEN: theirs(images, labels, freeze=True),
    }
    seconds = interleaved(steps, rounds=arguments.rounds, warmup=2)
    peer_of = {OURS: PEER, OURS_FROZEN: PEER_FROZEN}
    rows = [
        (
            name,
            f"{median_ms(times):.0f}",
            f"{bootstrap_ratio(times, seconds['float']):.2f}",
            f"{bootstrap_ratio(times, seconds[peer_of[name]]):.2f}" if name in peer_of else "",
        )
        for name, times in seconds.items()
    ]
    header = ("ResNet18 training step", "median CPU ms", "this / float [95 %]", "this / torch.ao [95 %]")
    publish("qat_overhead", table(rows, header))


if __name__ == "__main__":
    main()
