"""Calls of any number of samples on a file that takes one number alone."""

from typing import Any

import torch
from torch import Tensor

from lightning_quant.calls.calls import flatten_call
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import FixedSizesError
from lightning_quant.planned.decisions import decisions, in_words
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.routing import evaluation_mode


class InParts:
    """Calls an artifact on as many samples at a time as it takes; the last part is filled up, and cut off again.

    Args:
        artifact: whose file has the captured sizes.
        captured: what it was exported from; its samples do not depend on each other.
    """

    def __init__(self, artifact: LoadedModule, captured: PlannedModel) -> None:
        self.artifact, self.captured = artifact, captured

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a call of the captured structure.

        Raises:
            FixedSizesError: it has other sizes, and cannot be divided.
        """
        names, batch = self.captured.spec.names, self.captured.batch
        spec, tensors = flatten_call(self.captured.signature, args, kwargs)
        captured = [tuple(tensor.shape) for tensor in self.captured.tensors]
        if spec.names != names or [tuple(tensor.shape) for tensor in tensors] == captured:
            return self.artifact(*args, **kwargs)
        if batch is None or not batch.independent:
            sizes = [tuple(tensor.shape) for tensor in tensors]
            raise FixedSizesError(
                f"Expected sizes {captured} of {names}, the only ones that the file takes, but got {sizes}."
            )
        number = next(
            t.shape[batch.inputs[name]] for name, t in zip(names, tensors, strict=True) if name in batch.inputs
        )
        parts = [self._run(batch.cut(names, tensors, start, batch.size)) for start in range(0, number, batch.size)]
        outputs = []
        for index, place in enumerate(batch.outputs):
            first = parts[0][index]
            if place is not None:
                first = torch.cat([part[index] for part in parts], place[0]).narrow(place[0], 0, number * place[1])
            outputs.append(first)
        return self.artifact.signature.unflatten(outputs)

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        args, kwargs = self.captured.call(
            [self._filled(n, t) for n, t in zip(self.captured.spec.names, tensors, strict=True)]
        )
        return tensor_leaves(self.artifact(*args, **kwargs))

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        """Repeat the last sample until there are as many as the file takes."""
        batch = self.captured.batch
        if batch is None or name not in batch.inputs:
            return tensor
        dimension = batch.inputs[name]
        missing = batch.size - tensor.shape[dimension]
        last = tensor.narrow(dimension, tensor.shape[dimension] - 1, 1)
        return torch.cat([tensor, *[last] * missing], dimension) if missing else tensor


def in_parts(artifact: LoadedModule, captured: PlannedModel) -> LoadedModule | InParts:
    """Return what takes any number of samples, where the file alone does not."""
    return artifact if captured.varies_in_file else InParts(artifact, captured)


def check_takes(captured: PlannedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make sure that evaluation can call the file as it does the module.

    Raises:
        FixedSizesError: the file takes other sizes alone, or calls alone that decide otherwise.
    """
    if captured.decided:
        with evaluation_mode(captured.root):
            decided = decisions(captured.root, args, kwargs)
        if decided != captured.decided:
            other = next((now for now, known in zip(decided, captured.decided, strict=False) if now != known), None)
            what = "it reads other values" if other is None else f"a batch has {in_words((other,))[0]}"
            raise FixedSizesError(
                f"Expected validation to call so that {' and '.join(in_words(captured.decided))}, as in the call that "
                f"was exported, but {what}. Train and validate with calls that decide alike, or pass `evaluate=False`."
            )
    exported, batch = captured.exported or {}, captured.batch
    spec, tensors = flatten_call(captured.signature, args, kwargs)
    if spec.names != captured.spec.names:
        return
    divisible = dict(batch.inputs) if batch is not None and batch.independent else {}
    for name, tensor, known in zip(spec.names, tensors, captured.tensors, strict=True):
        for dimension, (size, expected) in enumerate(zip(tensor.shape, known.shape, strict=False)):
            if size != expected and dimension not in exported.get(name, {}) and divisible.get(name) != dimension:
                raise FixedSizesError(
                    f"Expected validation to call with dimension {dimension} of `{name}` {expected}, the only size "
                    f"that the file takes, but got {size}. Train and validate with calls of one size, or pass "
                    "`evaluate=False`."
                )
