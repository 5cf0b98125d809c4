"""What `QuantizationMonitor(regularize=...)` gains: digits, float training, then weights of eight, four and three bits.

`python examples/benchmarks/regularize.py` trains with three strengths of the penalty, from the same random weights, and
quantizes each network without accuracy steps: scales follow from the largest weights, so that outliers hurt. Rows of
integers are files that ONNX Runtime ran. The images that it reports on chose nothing: all strengths are shown.
"""

import argparse
import functools
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from digits import DigitClassifier, Digits
from lightning.pytorch import Trainer, seed_everything
from results import publish
from timing import bootstrap_mean, table
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare

FLOAT, STRENGTHS, BITS = "float", (0.0, 0.1, 1.0), (8, 4, 3)


def trained(seed: int, epochs: int, strength: float, data: Digits) -> nn.Module:
    """Train in float."""
    seed_everything(seed, verbose=False)
    classifier = DigitClassifier()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    callbacks = [lq.QuantizationMonitor(10_000, regularize=strength)] if strength else []
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, limit_val_batches=0, **dict.fromkeys(quiet, False)
    )
    trainer.fit(classifier, datamodule=data)
    return classifier.net.eval()


def rounded(net: nn.Module, bits: int, calls: list[Tensor]) -> nn.Module:
    """Return the artifact of post-training quantization, without a report, which would take most of the time."""
    prepared = prepare(net, (calls[0],), recipe={"name": "coarse weights", "weight": {"bits": bits}})
    calibrate(prepared, (functools.partial(net, call) for call in calls))
    with tempfile.TemporaryDirectory() as name:
        return lq.load(export(prepared, Path(name, "artifact")).path, threads=1)


def right(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Tell which images are classified right."""
    with torch.inference_mode():
        return (torch.cat([net(part) for part in images.split(64)]).argmax(1) == labels).double()


def kurtosis(net: nn.Module) -> float:
    """Return the mean kurtosis of the layers' weights; a uniform distribution has 1.8, a normal one 3."""
    layers = [m.weight.detach() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    centred = [weight - weight.mean() for weight in layers]
    return float(torch.stack([c.pow(4).mean() / c.square().mean().square() for c in centred]).mean())


def main() -> None:
    """Train and quantize all, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = Digits()
    data.setup("fit")
    parts = [torch.cat(tensors) for tensors in zip(*data.val_dataloader(), strict=True)]
    calls = [batch[0] for batch in data.train_dataloader()][:4]
    answers: dict[tuple[float, int | str], list[Tensor]] = {}
    shapes: dict[float, list[float]] = {}
    for seed in arguments.seeds:
        for strength in STRENGTHS:
            net = trained(seed, arguments.epochs, strength, data)
            shapes.setdefault(strength, []).append(kurtosis(net))
            answers.setdefault((strength, FLOAT), []).append(right(net, *parts))
            for bits in BITS:
                answers.setdefault((strength, bits), []).append(right(rounded(net, bits, calls), *parts))
    means = {key: torch.stack(values).mean(0) for key, values in answers.items()}
    rows = []
    for strength in STRENGTHS:
        gains = {kind: 100 * (means[strength, kind] - means[0.0, kind]) for kind in (FLOAT, *BITS)}
        cells = [
            f"{100 * means[strength, kind].mean():.2f} ({bootstrap_mean(gain):+.2f})" for kind, gain in gains.items()
        ]
        rows.append((f"{strength:g}", f"{sum(shapes[strength]) / len(shapes[strength]):.2f}", *cells))
    number = f"digits, {len(arguments.seeds)} seeds, {arguments.epochs} epochs, {len(parts[1])} images: `regularize`"
    header = (number, "kurtosis", "float, % (more than without [95 %])", *(f"weights of {bits} bits" for bits in BITS))
    publish("regularize", table(rows, header))


if __name__ == "__main__":
    main()
