"""The ranges of all quantized tensors of a module: observers, groups that share a scale, and their state."""

from typing import Any

import torch
from torch import Tensor

from lightning_quant import observers
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.fake_quantize import affine_parameters
from lightning_quant.graph.plan import Edge, identify, path_of
from lightning_quant.recipe import Recipe


class Ranges:
    """One observer per observed edge; edges of a group share the union of their ranges.

    Attributes:
        edges: identity to edge.
        observers: identity to observer, for the edges whose own values count.
        deferred: when a dict, observers stay as they are and it gets `(-low, high)` of what they would have seen:
            several processes count a batch only when the extremes of all are known.
        chosen: identity to the range to use in place of its observer's.
    """

    def __init__(self, edges: dict[str, Edge], recipe: Recipe, observer: str) -> None:
        self.edges = edges
        self.quant_max = recipe.activation.quant_max
        self.observers = {i: observers.build(observer, recipe) for i, edge in edges.items() if edge.observed}
        self.chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._members: dict[str, list[str]] = {}
        for identity in self.observers:
            self._members.setdefault(self._group(identity), []).append(identity)
        self._parameters: dict[str, tuple[Tensor, Tensor]] = {}
        self.deferred: dict[str, Tensor] | None = None

    def observe(self, identity: str, x: Tensor) -> None:
        """Let a tensor count for its edge's range, if the edge is observed.

        Raises:
            CalibrationError: the observer refuses values that are not finite.
        """
        if identity not in self.observers:
            return
        if self.deferred is not None:
            self._defer(self.deferred, identity, x)
            return
        try:
            self.observers[identity].update(x)
        except CalibrationError as error:
            raise CalibrationError(f"Expected finite values at {identity}, but got {error}.") from error
        self._parameters.pop(self._group(identity), None)

    def parameters(self, identity: str) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of an edge, both 0-dim float32.

        Raises:
            CalibrationError: the edge was never observed.
        """
        group = self._group(identity)
        if group not in self._parameters:
            ranges = [self._range(member) for member in self._members[group]]
            low, high = ranges[0]
            for other_low, other_high in ranges[1:]:
                low, high = torch.minimum(low, other_low), torch.maximum(high, other_high)
            self._parameters[group] = affine_parameters(low, high, self.quant_max)
        return self._parameters[group]

    def take_deferred(self) -> dict[str, Tensor]:
        """Return what was kept back, and start anew."""
        taken, self.deferred = self.deferred or {}, {}
        return taken

    def forget_parameters(self) -> None:
        """Drop scales that were computed from earlier ranges."""
        self._parameters = {}

    def check(self) -> None:
        """Raise unless every edge has a finite range.

        Raises:
            CalibrationError: names the edges without one.
        """
        missing = [identity for identity, observer in self.observers.items() if observer.low is None]
        if missing:
            raise CalibrationError(
                f"Expected every quantized tensor to have been observed, but {', '.join(missing[:5])} "
                f"{'was' if len(missing) == 1 else 'were'} not. Train or calibrate with batches that reach it."
            )
        for identity in self.observers:
            low, high = self._range(identity)
            if not torch.isfinite(low + high):
                raise CalibrationError(f"Expected finite values at {identity}, but got the range [{low}, {high}].")

    def to(self, device: torch.device) -> None:
        """Move all statistics to a device."""
        for observer in self.observers.values():
            observer.to(device)
        self.forget_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return identity to observer state: tensors and numbers only."""
        return {identity: observer.state() for identity, observer in self.observers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        different = set(state) ^ set(self.observers)
        if different:
            raise QuantizationError(
                f"Expected quantizer state of this model, but {sorted(different)[:3]} differ. Was the model or the "
                "recipe changed since the checkpoint? Start without the callback's state to observe anew."
            )
        for identity, saved in state.items():
            self.observers[identity].load_state(saved)
        self.forget_parameters()

    @torch.no_grad()
    def _defer(self, deferred: dict[str, Tensor], identity: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        low, high = torch.aminmax(x.detach())
        extremes = torch.stack([-low, high]).float()
        deferred[identity] = torch.maximum(deferred.get(identity, extremes), extremes)
        if self.observers[identity].low is None:
            self._parameters.pop(self._group(identity), None)

    def source(self, identity: str) -> str:
        """Return the observed edge whose range an edge has, the edge itself when it is observed."""
        return identity if identity in self.observers else self._members[self._group(identity)][0]

    def choose(self, identity: str, low: Tensor, high: Tensor) -> None:
        """Use a range for an edge in place of its observer's."""
        self.chosen[identity] = low, high
        self.forget_parameters()

    def _range(self, identity: str) -> tuple[Tensor, Tensor]:
        if identity in self.chosen:
            return self.chosen[identity]
        if self.deferred and identity in self.deferred and self.observers[identity].low is None:
            # The first batch has no other range than what this process has just seen of it.
            return -self.deferred[identity][0], self.deferred[identity][1]
        try:
            return self.observers[identity].range()
        except CalibrationError as error:
            raise CalibrationError(f"{identity}: {error}") from error

    def _group(self, identity: str) -> str:
        return identify(path_of(identity), self.edges[identity].group)
