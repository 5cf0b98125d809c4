"""Places of a call that its attention mask hides: what stands there takes no part in ranges.

Padding may be of any size, and one scale for a tensor is made for its largest values. Whether an input is such a mask,
and which of its values hides, is found by changing what stands at the hidden places: nothing else may change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_quant.calls.calls import CallSpec, flatten_call, rebuild_call
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.numerics.visible import visible
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.simulate.quantizers import Control


@contextmanager
def hidden_left_out(prepared: Prepared) -> Iterator[None]:
    """Let the calls of a block count for ranges with what their masks do not hide."""
    masks = _Masks(prepared)
    simulation = prepared.simulation

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        simulation.hidden = masks.hidden(args, kwargs)

    def leave(*_: Any) -> None:
        simulation.hidden = None

    handles = (
        prepared.root.register_forward_pre_hook(enter, with_kwargs=True),
        prepared.root.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        simulation.hidden = None
        for handle in handles:
            handle.remove()


class _Masks:
    """Finds the mask among the inputs of calls, once for a prepared module."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    @property
    def padding(self) -> tuple[str, int] | None:
        """Name of the mask and its value at hidden places; None where no mask is known."""
        return next(((name, value) for name, value in self.prepared.masks.items() if value is not None), None)

    @torch.no_grad()
    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return what the mask of a call hides, `(batch, time)`; None where that is nothing."""
        spec, tensors = flatten_call(self.prepared.signature, args, kwargs)
        named = dict(zip(spec.names, tensors, strict=True))
        if self.padding is None:
            known = self.prepared.masks
            for name in [name for name, tensor in named.items() if name not in known and _has_both(tensor)]:
                values = [value for value in (0, 1) if self._hides(spec, tensors, named[name] == value, name)]
                known[name] = values[0] if len(values) == 1 else None
                if known[name] is not None:
                    break
        padding = self.padding
        if padding is None or padding[0] not in named:
            return None
        hidden = named[padding[0]] == padding[1]
        return hidden if hidden.dim() == 2 and bool(hidden.any()) else None

    def _hides(self, spec: CallSpec, tensors: list[Tensor], hidden: Tensor, mask: str) -> bool:
        """Tell whether what stands at some places has no influence on the results of the others."""
        changed = [t if name == mask else _changed(t, hidden) for name, t in zip(spec.names, tensors, strict=True)]
        if all(a is b or torch.equal(a, b) for a, b in zip(tensors, changed, strict=True)):
            return False
        before, after = (tensor_leaves(self._run(spec, values)) for values in (tensors, changed))
        pairs = [(visible(a, hidden), visible(b, hidden)) for a, b in zip(before, after, strict=True)]
        return all(
            a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()), equal_nan=True)
            for a, b in pairs
            if a.is_floating_point() and a.numel()
        )

    def _run(self, spec: CallSpec, tensors: list[Tensor]) -> Any:
        """Run the module in float, past its hooks, unobserved and unwatched."""
        prepared, simulation = self.prepared, self.prepared.simulation
        control, means, watcher = prepared.control, simulation.input_means, simulation.watcher
        prepared.control, simulation.input_means, simulation.watcher = Control(), None, None
        try:
            args, kwargs = rebuild_call(prepared.signature, spec.arguments(tensors))
            with torch.random.fork_rng(devices=[]):
                return prepared.root.forward(*args, **kwargs)
        finally:
            prepared.control, simulation.input_means, simulation.watcher = control, means, watcher


def _has_both(tensor: Tensor) -> bool:
    """Tell whether a tensor may be a mask that hides something: `(batch, time)` of zeros and ones."""
    if tensor.dim() != 2 or tensor.is_complex() or tensor.shape[0] == tensor.shape[1]:
        return False
    zeros, ones = tensor == 0, tensor == 1
    return bool(zeros.any()) and bool(ones.any()) and bool((zeros | ones).all())


def _changed(tensor: Tensor, hidden: Tensor) -> Tensor:
    """Return a tensor with other values at hidden places, where it has places and is no mask itself."""
    places = next((h for h in (hidden, hidden.t()) if tensor.shape[:2] == h.shape), None)
    if places is None or tensor.dtype is torch.bool or _has_both(tensor):
        return tensor
    places = places.reshape(*places.shape, *[1] * (tensor.dim() - 2))
    # Another one of the same indices is an index, too.
    other = tensor + 1 if tensor.is_floating_point() else tensor.flip(1)
    return torch.where(places, other, tensor)
