"""Along which dimensions of a call its samples lie: found by running the module on parts of the call.

Sizes do not tell. A state `(layers, batch, hidden)`, sequences with time in front, and images of a list, whose first
dimension is channels, are all there; and a module may take one sample only.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.numerics.noise import signal_to_noise

# Samples of the largest part that is run, and ways to cut a call that are tried.
_SAMPLES, _TRIES = 4, 32
# Decibels at which results of a part are those of the whole; kernels for other sizes differ in the last bits.
_EQUAL_DB = {torch.float64: 50.0, torch.float32: 50.0}
_EQUAL_HALF_DB = 25.0

Run = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Batch:
    """Where the samples of a call lie.

    Attributes:
        inputs: name to dimension, of the inputs that have one place for each sample.
        outputs: of each output the dimension and how many places in it belong to one sample; None when it has none.
        size: number of samples of the captured call.
        independent: whether each sample's result is the same whichever others are in the call.
        smallest: number of samples of the smallest call that the module takes, 1 or 2.
    """

    inputs: Mapping[str, int]
    outputs: tuple[tuple[int, int] | None, ...]
    size: int
    independent: bool
    smallest: int = 1

    def cut(self, names: tuple[str, ...], tensors: list[Tensor], start: int, number: int) -> list[Tensor]:
        """Return a call's tensors with that many samples from the first wanted one on, fewer where there are fewer."""
        return [
            t.narrow(self.inputs[name], start, min(number, t.shape[self.inputs[name]] - start))
            if name in self.inputs
            else t
            for name, t in zip(names, tensors, strict=True)
        ]


def checked_states(root: nn.Module) -> nn.Module:
    """Let the LSTMs of a module refuse states that do not fit a packed sequence, and return the module.

    PyTorch does not check those, reads memory that is not theirs, and the process ends.
    """

    def check(layer: nn.LSTM, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("input", "hx"), args, strict=False)) | kwargs
        packed, states = given["input"], given.get("hx")
        if isinstance(packed, PackedSequence) and states is not None:
            wanted = [
                size(packed.data, packed.batch_sizes)
                for size in (layer.get_expected_hidden_size, layer.get_expected_cell_size)
            ]
            if [tuple(state.shape) for state in states] != wanted:
                raise ValueError(f"Expected states of shapes {wanted}, but got {[tuple(s.shape) for s in states]}.")

    for layer in root.modules():
        if isinstance(layer, nn.LSTM):
            layer.register_forward_pre_hook(check, with_kwargs=True)
    return root


def find_batch(run: Run, names: tuple[str, ...], tensors: list[Tensor]) -> Batch | None:
    """Find out where the samples of a call lie.

    A way to cut the call is right when each part gives its part of the whole result. Where none is, as in modules that
    draw random numbers or mix samples, the first dimension is taken if the module runs on parts at all.

    Args:
        run: gives the flat outputs of the float module in evaluation for flat inputs; may raise whatever it does.
        names: of the inputs.
        tensors: of the captured call.

    Returns:
        None where the module takes the captured sizes alone.
    """
    fallback = None
    for inputs in itertools.islice(_candidates(names, tensors), _TRIES):
        batch = _tried(run, names, tensors, inputs)
        if batch is not None and batch.independent:
            return _with_smallest(run, names, tensors, batch)
        fallback = fallback or (batch if set(inputs.values()) == {0} else None)
    return fallback and _with_smallest(run, names, tensors, fallback)


def _with_smallest(run: Run, names: tuple[str, ...], tensors: list[Tensor], batch: Batch) -> Batch:
    """Find out whether one sample is a batch: forwards that squeeze their result know none of one."""
    try:
        outputs = run(batch.cut(names, tensors, 0, 1))
    # Whatever a user's forward raises.
    except Exception:
        return replace(batch, smallest=2)
    dimensions = [o.dim() for o in run(batch.cut(names, tensors, 0, 2))] if batch.size > 1 else None
    return batch if dimensions in (None, [o.dim() for o in outputs]) else replace(batch, smallest=2)


def _candidates(names: tuple[str, ...], tensors: list[Tensor]) -> Iterator[dict[str, int]]:
    """Yield ways to cut a call, the usual one first: dimensions of one size, at most one of each input."""
    shapes = {name: tuple(t.shape) for name, t in zip(names, tensors, strict=True) if t.dim()}
    if not shapes:
        return
    size = next(iter(shapes.values()))[0]
    yield (usual := {name: 0 for name, shape in shapes.items() if shape[0] == size})
    for size in dict.fromkeys(size for shape in shapes.values() for size in shape):
        places = [[d for d, s in enumerate(shape) if s == size] for shape in shapes.values()]
        for chosen in itertools.product(*([*dimensions, None] for dimensions in places)):
            inputs = {name: d for name, d in zip(shapes, chosen, strict=True) if d is not None}
            if inputs and inputs != usual:
                yield inputs


def _tried(run: Run, names: tuple[str, ...], tensors: list[Tensor], inputs: dict[str, int]) -> Batch | None:
    """Run the module on parts of a call that is cut in one way; None where it does not run."""
    size = next(t.shape[inputs[name]] for name, t in zip(names, tensors, strict=True) if name in inputs)
    if size == 0:
        return None
    batch = Batch(inputs, (), size, independent=True)
    try:
        if size == 1:
            number, parts = 2, {start: _other(tensors, start) for start in (0, 1)}
            whole = [
                torch.cat([first, second], inputs[name]) if name in inputs else first
                for name, first, second in zip(names, parts[0], parts[1], strict=True)
            ]
        else:
            number, half = min(size, _SAMPLES), max(min(size, _SAMPLES) // 2, min(size - 1, 2))
            whole = batch.cut(names, tensors, 0, number)
            parts = {start: batch.cut(names, tensors, start, half) for start in (0, number - half)}
        expected = run(whole)
        results = {start: run(part) for start, part in parts.items()}
    # Whatever a user's forward raises when it is run on other sizes.
    except Exception:
        return None
    part = 1 if size == 1 else half
    if any(len(result) != len(expected) for result in results.values()):
        return None
    outputs, independent = [], True
    for index, output in enumerate(expected):
        place = _place(output.shape, results[0][index].shape, number, part)
        outputs.append(place)
        for start, result in results.items():
            wanted = output if place is None else output.narrow(place[0], start * place[1], part * place[1])
            independent = independent and _equal(wanted, result[index])
    return Batch(inputs, tuple(outputs), size, independent and any(place is not None for place in outputs))


def _other(tensors: list[Tensor], index: int) -> list[Tensor]:
    """Return the tensors, or for a second sample others like them."""
    return [t * 0.5 if index and t.is_floating_point() else t for t in tensors]


def _place(whole: torch.Size, part: torch.Size, number: int, cut: int) -> tuple[int, int] | None:
    """Return the dimension that shrank with the number of samples, and its places for each sample."""
    if len(whole) != len(part):
        return None
    differing = [d for d in range(len(whole)) if whole[d] != part[d]]
    if len(differing) != 1:
        return None
    (dimension,) = differing
    each = whole[dimension] // number
    return (dimension, each) if (whole[dimension], part[dimension]) == (each * number, each * cut) else None


def _equal(expected: Tensor, actual: Tensor) -> bool:
    if expected.shape != actual.shape:
        return False
    if not expected.is_floating_point():
        return expected.numel() == 0 or bool((expected == actual).double().mean() > 0.99)
    return signal_to_noise(expected, actual) > _EQUAL_DB.get(expected.dtype, _EQUAL_HALF_DB)
