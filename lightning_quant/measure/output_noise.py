"""How far the artifact's answers are from the float model's: each output, its worst channel, and its predictions."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import Call
from lightning_quant.calls.signature import output_names, tensor_leaves
from lightning_quant.errors import QuantizationError
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path
from lightning_quant.terminal.tables import text_table

# A tenth of the signal's power, a third of its amplitude: what is noisier is of hardly any use. Artifacts that are well
# reach 20 to 50 dB with eight bits, 12 to 20 with four-bit weights.
FLOOR_DB = 10.0
# Share of equal predictions below which they are another model's.
MINIMUM_EQUAL = 0.8
# Values that a channel, and predictions that an output, must have to be judged: few are near zero, or tied, by chance.
_ENOUGH_VALUES, _ENOUGH_PREDICTIONS = 8, 16
# Share of an output's largest value below which a whole channel counts as zero.
_NOTHING = 1e-4
# Values compared at a time.
_PART = 1 << 20
# For loggers, which have no infinity: what equal outputs count as.
_EQUAL_DB = 200.0


@dataclass(frozen=True)
class HeldOut:
    """Calls to compare on, best ones that chose nothing, and in words which they are."""

    calls: tuple[Call, ...]
    base: str


def held_back(calls: Iterable[Call], least: int, held: list[Call]) -> Iterator[Call]:
    """Yield calls but for the last one, which is appended to `held` once at least `least` others were yielded."""
    every = iter(calls)
    number, last = 0, next(every, None)
    for call in every:
        if last is not None:
            yield last
        number, last = number + 1, call
    if last is not None and number < least:
        yield last
    elif last is not None:
        held.append(last)


@dataclass(frozen=True)
class OutputNoise:
    """Float against artifact, for one output.

    Attributes:
        name: of the output.
        db: signal-to-noise ratio of all its values in decibels; None where it holds none to compare.
        axis: the dimension of its channels, classes or columns; None without one.
        channel: index of the worst of them; None where none can be judged.
        channel_db: its signal-to-noise ratio.
        equal: share of equal largest channels, of equal values where they are no floats; None without channels.
        remark: why it was not compared, or not as a whole.
    """

    name: str
    db: float | None
    axis: int | None = None
    channel: int | None = None
    channel_db: float | None = None
    equal: float | None = None
    remark: str = ""


@dataclass(frozen=True)
class Noise:
    """Float against artifact, for every output.

    Attributes:
        outputs: one for each tensor of the result.
        base: in words, which calls were compared.
    """

    outputs: tuple[OutputNoise, ...]
    base: str

    def warnings(self, usual_db: float = FLOOR_DB) -> list[str]:
        """Say in plain words which outputs are mostly noise, or have more of it than is usual.

        Args:
            usual_db: signal-to-noise ratio in decibels that all values of an output usually reach.
        """
        lines = []
        for output in self.outputs:
            if output.db is not None and not output.db >= FLOOR_DB:
                lines.append(f"output `{output.name}` is {output.db:.1f} dB from float, mostly noise")
            elif output.channel_db is not None and not output.channel_db >= FLOOR_DB:
                lines.append(
                    f"channel {output.channel} of output `{output.name}` (dimension {output.axis}) is "
                    f"{output.channel_db:.1f} dB from float, mostly noise, in an output of {output.db:.1f} dB"
                )
            elif output.db is not None and not output.db >= usual_db:
                lines.append(
                    f"output `{output.name}` is {output.db:.1f} dB from float, where {usual_db:g} dB or more are "
                    "usual, and no metric judges it"
                )
            if output.equal is not None and output.equal < MINIMUM_EQUAL:
                lines.append(f"only {output.equal:.1%} of the predictions of output `{output.name}` are those of float")
        return lines

    def scalars(self) -> dict[str, float]:
        """Return quantity to number: the worst output's, and each one's where there are several."""
        quantities = {
            "snr_db": [(o.name, o.db) for o in self.outputs],
            "worst_channel_db": [(o.name, o.channel_db) for o in self.outputs],
            "equal_predictions": [(o.name, o.equal) for o in self.outputs],
        }
        values: dict[str, float] = {}
        for quantity, known in quantities.items():
            numbers = {name: max(min(v, _EQUAL_DB), -_EQUAL_DB) for name, v in known if v is not None and v == v}
            if numbers:
                values[quantity] = min(numbers.values())
            if len(self.outputs) > 1:
                values |= {f"{quantity}/{name}": number for name, number in numbers.items()}
        return values

    def __str__(self) -> str:
        header = ("output, float against artifact", "dB", "worst channel", "its dB", "equal predictions")
        rows = [
            (
                f"{output.name}{f' ({output.remark})' if output.remark else ''}",
                _decibels(output.db),
                "-" if output.channel is None else f"{output.channel} of dimension {output.axis}",
                _decibels(output.channel_db),
                "-" if output.equal is None else f"{output.equal:.1%}",
            )
            for output in self.outputs
        ]
        return f"{text_table(header, rows)}\n\nOn {self.base}."


def _decibels(value: float | None) -> str:
    return "-" if value is None else "identical" if value == math.inf else f"{value:.1f}"


@torch.no_grad()
def measure_noise(root: nn.Module, artifact: Any, held: HeldOut) -> Noise:
    """Run the float module and the artifact on calls and compare what they answer.

    Args:
        root: the float module.
        artifact: the loaded artifact, called in the same way.
        held: calls of the module.

    Raises:
        QuantizationError: a call does not fit the artifact.
    """
    pairs: list[tuple[list[Tensor], list[Tensor]]] = []
    names: list[str] = []
    read: set[torch.Size] = set()
    for args, kwargs in held.calls:
        here = artifact(*args, **kwargs)
        with torch.random.fork_rng(devices=[]), evaluation_mode(root), without_fast_path():
            floating = root(*args, **kwargs)
        names = output_names(floating, ())
        leaves = tensor_leaves(floating), tensor_leaves(here)
        if len(leaves[0]) != len(leaves[1]):
            raise QuantizationError(f"Expected {len(leaves[0])} tensors as of float, but got {len(leaves[1])}.")
        pairs.append(leaves)
        read |= {tensor.shape for tensor in tensor_leaves((args, kwargs)) if tensor.is_floating_point()}
    outputs = [
        _of_output(name, [floating[i] for floating, _ in pairs], [here[i] for _, here in pairs], read)
        for i, name in enumerate(names)
    ]
    return Noise(tuple(outputs), held.base)


@torch.no_grad()
def drawn_outputs(root: nn.Module, call: Call) -> list[str]:
    """Return the names of the outputs that differ between two calls in evaluation, as a module draws random numbers."""
    answers: list[list[Tensor]] = []
    result: Any = None
    for seed in (0, 1):
        with torch.random.fork_rng(devices=[]), evaluation_mode(root), without_fast_path():
            torch.manual_seed(seed)
            result = root(*call.args, **call.kwargs)
            answers.append([tensor.nan_to_num() for tensor in tensor_leaves(result)])
    named = zip(output_names(result, ()), *answers, strict=True)
    return [name for name, first, second in named if first.shape != second.shape or not torch.equal(first, second)]


def _of_output(name: str, floating: list[Tensor], here: list[Tensor], read: set[torch.Size]) -> OutputNoise:
    kept = [(a.cpu(), b.cpu()) for a, b in zip(floating, here, strict=True) if a.shape == b.shape and a.numel()]
    if not kept:
        sizes = f"{tuple(floating[0].shape)} and {tuple(here[0].shape)}"
        empty = all(tensor.numel() == 0 for tensor in (*floating, *here))
        return OutputNoise(name, None, remark="empty" if empty else f"sizes depend on values: {sizes}")
    remark = "sizes differ in other calls" if len(kept) < len(floating) else ""
    if not kept[0][0].is_floating_point():
        equal = sum(int((a == b).sum()) for a, b in kept) / sum(a.numel() for a, _ in kept)
        return OutputNoise(name, None, remark=f"no floats, {equal:.1%} equal values")
    if all(_is_zero(a) and _is_zero(b) for a, b in kept):
        return OutputNoise(name, None, remark="all zeros")
    db = signal_to_noise(*zip(*kept, strict=True))
    axis = channel_axis(kept[0][0])
    if axis is None or any(a.shape[axis] != kept[0][0].shape[axis] for a, _ in kept):
        return OutputNoise(name, db, remark=remark)
    channel, channel_db = _worst_channel(kept, axis)
    # An image or a series of an input's sizes is that input again, changed or cleaned, and holds no scores.
    is_image = floating[0].dim() > 2 and floating[0].shape in read
    predicted = None if is_image else _equal_predictions(kept, axis)
    return OutputNoise(name, db, axis, channel, channel_db, predicted, remark)


def channel_axis(output: Tensor) -> int | None:
    """Return the dimension of an output's channels, classes or columns.

    The last of two, as in `(batch, classes)`; of three the shorter one behind the batch, as in `(batch, places,
    classes)` or `(batch, channels, length)`; of images the second, but for equal height and width in front of the last.
    """
    shape = output.shape
    if len(shape) < 2:
        return None
    if len(shape) <= 3:
        return 1 if len(shape) == 2 or shape[1] < shape[2] else 2
    last = len(shape) - 1
    return last if shape[last - 2] == shape[last - 1] != shape[last] else 1


def _worst_channel(pairs: list[tuple[Tensor, Tensor]], axis: int) -> tuple[int | None, float | None]:
    number = sum(a.numel() for a, _ in pairs) // pairs[0][0].shape[axis]
    if number < _ENOUGH_VALUES:
        return None, None
    size = pairs[0][0].shape[axis]
    signal, noise, peak = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for pair in pairs:
        # Part by part: scores for a whole vocabulary in double precision would be several times the output.
        samples = max(1, _PART // max(1, pair[0][0].numel()))
        for a, b in zip(*(tensor.split(samples) for tensor in pair), strict=True):
            a, b = (_finite(tensor.transpose(0, axis).flatten(1)) for tensor in (a, b))
            signal, noise = signal + a.square().sum(1), noise + (a - b).square().sum(1)
            peak = torch.maximum(peak, torch.maximum(a.abs(), b.abs()).amax(1))
    # Columns that are next to nothing in both hold nothing to lose.
    counts = (peak > _NOTHING * peak.max()) & (signal > 0)
    if not counts.any():
        return None, None
    decibels = torch.where(counts, 10 * torch.log10(signal / noise), torch.inf)
    worst = int(decibels.argmin())
    return worst, float(decibels[worst])


def _equal_predictions(pairs: list[tuple[Tensor, Tensor]], axis: int) -> float | None:
    """Return the share of equal largest channels, where what is largest varies: else they are no scores."""
    if pairs[0][0].shape[axis] < 2:
        return None
    a, b = (torch.cat([t.argmax(axis).flatten() for t in tensors]) for tensors in zip(*pairs, strict=True))
    if len(a) < _ENOUGH_PREDICTIONS or len(a.unique()) < 2:
        return None
    return (a == b).double().mean().item()


def _is_zero(tensor: Tensor) -> bool:
    """Tell whether no value is a normal number: runtimes may flush smaller ones to zero."""
    return bool((tensor.abs() < torch.finfo(tensor.dtype).tiny).all())


def _finite(tensor: Tensor) -> Tensor:
    return tensor.double().nan_to_num(0.0, 0.0, 0.0)
