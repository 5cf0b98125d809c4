"""The ranges of all quantized tensors of a module: observers, groups that share a scale, and their state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.graph.plan import Edge
from lightning_quant.numerics import kernels
from lightning_quant.numerics.fake_quantize import affine_parameters, fake_quantize
from lightning_quant.numerics.grid import Grid
from lightning_quant.numerics.learned_steps import LearnedSteps
from lightning_quant.ranges import observers
from lightning_quant.ranges.grids import Grids, Seen, joined, padded_members, scales_of
from lightning_quant.ranges.observer import Ends
from lightning_quant.ranges.observers import Extremes, Observer
from lightning_quant.recipe.recipe import Recipe


class Ranges:
    """One observer per observed edge; edges of a group share the union of their ranges.

    What a run of a graph sees counts from the next run on, for all edges in one operation. An edge without any range
    has that of what is seen first.

    Attributes:
        edges: identity to edge.
        rows: identity to its place in `Grids`.
        grid: the integers of every edge but the `wide` ones, which have eight bits; `grids_by_edge` has those of all.
        more_bits: by how many bits grids are wider than the recipe's, which are `narrow`; those of weights as well.
        learned: steps and zero points that training has learned, which count before observers'; None without.
        needs_values: whether the observers look at more than extremes.
        waits: whether what is seen waits for `take_seen`: several processes count a batch only when the extremes of
            all are known.
        chosen: identity to the range to use in place of its observer's.
        device: where all of it lies.
    """

    def __init__(
        self, edges: dict[str, Edge], recipe: Recipe, observer: str, wide: frozenset[str] = frozenset()
    ) -> None:
        self.edges, self.wide = edges, wide
        self.rows = {identity: row for row, identity in enumerate(edges)}
        self.grid = recipe.activation_grid
        wider = replace(recipe, activation=replace(recipe.activation, bits=8)) if wide else recipe
        self.grids_by_edge = {i: (wider if i in wide else recipe).activation_grid for i in edges}
        self.narrow, self.more_bits = (self.grid, self.grids_by_edge), 0
        self.learned: LearnedSteps | None = None
        self._observers = {
            i: observers.build(observer, wider if i in wide else recipe) for i, edge in edges.items() if edge.observed
        }
        self.needs_values = observers.build(observer, recipe).needs_values
        self.waits = False
        self.chosen: dict[str, tuple[Tensor, Tensor]] = {}
        self._group = {identity: edge.shared for identity, edge in edges.items()}
        self._members: dict[str, list[str]] = {}
        for identity in self._observers:
            self._members.setdefault(self._group[identity], []).append(identity)
        self._padded: Tensor | None = None
        self._parameters: dict[str, tuple[Tensor, Tensor]] = {}
        self._grids: Grids | None = None
        self._seen: list[Seen] = []
        self._ends: Ends | None = None
        self._is_running = False
        # Ranges of edges in the first run that reaches them.
        self._first: dict[str, tuple[Tensor, Tensor]] = {}
        self.device = torch.device("cpu")

    def anew(self, recipe: Recipe, observer: str) -> "Ranges":
        """Return ranges of the same edges that nothing was seen of."""
        return Ranges(self.edges, recipe, observer, self.wide)

    def grid_of(self, identity: str) -> Grid:
        """Return the integers of an edge."""
        return self.grids_by_edge[identity]

    def rounded(self, identity: str, x: Tensor) -> Tensor:
        """Return values rounded to the grid of an edge."""
        return fake_quantize(x, *self.parameters(identity), self.grid_of(identity))

    @property
    def observers(self) -> dict[str, Observer]:
        """Identity to observer, for the edges whose own values count."""
        self.settle()
        return self._observers

    @property
    def has_grids(self) -> bool:
        """Whether every edge has a range and its scale is known by now."""
        return self._grids is not None and self._grids.is_complete

    @property
    def has_seen(self) -> bool:
        """Whether something was seen that is not taken in yet."""
        return bool(self._seen)

    def observe(self, identity: str, x: Tensor) -> None:
        """Let a tensor count for its edge's range, if the edge is observed.

        Raises:
            CalibrationError: the observer refuses values that are not finite.
        """
        if identity not in self._observers or x.numel() == 0:
            return
        if self.needs_values:
            try:
                self._observers[identity].update(x)
            except CalibrationError as error:
                raise CalibrationError(f"Expected finite values at {identity}, but got {error}.") from error
            self._forget(identity)
            return
        low, high = (end.float() for end in torch.aminmax(x.detach()))
        self.note(Seen((identity,), low.view(1), high.view(1)))
        if self._observers[identity].low is None:
            self._first[identity] = low, high
            self._forget(identity)

    def note(self, seen: Seen) -> None:
        """Let extremes count for the ranges of their edges, which are observed ones, from the next run on."""
        self._seen.append(seen)

    def begin_run(self, edges: Sequence[str], *, observing: bool) -> None:
        """Take in what was seen before a graph with these edges runs; islands of one pass are taken in together."""
        is_new = not any(identity in seen.edges for seen in self._seen for identity in edges)
        if self._seen and not self.waits and not (observing and is_new):
            self.settle()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let what a block sees wait for its end, though it asks for scales."""
        self._is_running = True
        try:
            yield
        finally:
            self._is_running = False

    def settle(self) -> None:
        """Take in what was seen; does nothing where that has to wait, for other processes or for the end of a run."""
        if self._seen and not self.waits and not self._is_running:
            seen = self._seen[0] if len(self._seen) == 1 else joined(self._seen)
            self.take_in(seen.edges, seen.lows, seen.highs)

    def take_in(self, edges: Sequence[str], lows: Tensor, highs: Tensor) -> None:
        """Let extremes count as an update of the ranges of these edges, `(edges,)` each."""
        taking = [o for identity in edges if isinstance(o := self._observers[identity], Extremes)]
        if taking:
            self._ends = type(taking[0]).update_all(taking, lows, highs, self._ends)
        self._seen, self._first = [], {}
        self.forget_parameters()

    def take_seen(self, device: torch.device) -> Tensor:
        """Return `(observers, 2)`: minus the lowest and the highest value seen, or minus infinity; and start anew.

        Args:
            device: where the result lies when nothing was seen.
        """
        device = self._seen[0].lows.device if self._seen else device
        rows = torch.full((len(self._observers), 2), -torch.inf, dtype=torch.float32, device=device)
        if self._seen:
            seen, places = joined(self._seen), {edge: place for place, edge in enumerate(self._observers)}
            index = torch.tensor([places[identity] for identity in seen.edges], device=device)
            rows[index] = torch.stack([-seen.lows.float(), seen.highs.float()], 1)
        self._seen, self._first = [], {}
        return rows

    def parameters(self, identity: str) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of an edge, both 0-dim float32.

        Raises:
            CalibrationError: the edge was never observed.
        """
        self.settle()
        group = self._group[identity]
        if self.learned is not None and (learned := self.learned.parameters(group, self.grid_of(identity))) is not None:
            return learned
        if group not in self._parameters:
            members = self._members[group]
            # In the first run the members of a group are reached one after the other.
            known = [m for m in members if m in self._first or self._has_range(m)] if self._first else members
            ranges = [self._range(member) for member in known or members]
            low, high = ranges[0]
            for other_low, other_high in ranges[1:]:
                low, high = torch.minimum(low, other_low), torch.maximum(high, other_high)
            self._parameters[group] = affine_parameters(low, high, self.grid_of(identity))
        return self._parameters[group]

    def grids(self) -> Grids:
        """Return scale and zero point of all edges, the same as `parameters` gives, in one operation for all."""
        if self._grids is None:
            # As they stand beside each other after a training step, when nothing else has moved them.
            if not self.chosen and self._ends is not None and self._ends.are_of(self._observers.values()):
                ends, missing = (self._ends.lows, self._ends.highs), frozenset[str]()
            else:
                ends, missing = self._all_ends(), self._missing()
            device = ends[0].device
            if self._padded is None or self._padded.device != device:
                self._padded = padded_members(self._observers, self._members, self._group.values()).to(device)
            lows, highs = (end[self._padded] for end in ends)
            ends, is_plain = (lows.amin(1), highs.amax(1)), not self.wide and self.learned is None
            scales, zero_points = affine_parameters(*ends, self.grid) if is_plain else scales_of(self, *ends)
            on_host = device.type == "cpu" and not kernels.serve(device, torch.float32)
            numbers = list(zip(scales.tolist(), zero_points.tolist(), strict=True)) if on_host else None
            self._grids = Grids(scales, zero_points, numbers, missing, not missing)
        return self._grids

    def forget_parameters(self) -> None:
        """Drop scales that were computed from earlier ranges."""
        self._parameters, self._grids = {}, None

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
        for identity in self._observers:
            low, high = self._range(identity)
            if not torch.isfinite(low + high):
                raise CalibrationError(f"Expected finite values at {identity}, but got the range [{low}, {high}].")

    def to(self, device: torch.device) -> None:
        """Move all statistics to a device."""
        self.device = device
        for observer in self.observers.values():
            observer.to(device)
        self.chosen.update({i: (low.to(device), high.to(device)) for i, (low, high) in self.chosen.items()})
        self._seen = [Seen(seen.edges, seen.lows.to(device), seen.highs.to(device)) for seen in self._seen]
        self._first = {identity: (low.to(device), high.to(device)) for identity, (low, high) in self._first.items()}
        self.forget_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return identity to observer state: tensors and numbers only."""
        return {identity: observer.state() for identity, observer in self.observers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a saved state; may be called more than once.

        Raises:
            QuantizationError: the state belongs to another model.
        """
        different = set(state) ^ set(self._observers)
        if different:
            raise QuantizationError(
                f"Expected quantizer state of this model, but {sorted(different)[:3]} differ. Was the model or the "
                "recipe changed since the checkpoint? Start without the callback's state to observe anew."
            )
        for identity, saved in state.items():
            self._observers[identity].load_state(saved)
        self._seen, self._first = [], {}
        self.forget_parameters()

    def source(self, identity: str) -> str:
        """Return the observed edge whose range an edge has, the edge itself when it is observed."""
        return identity if identity in self._observers else self._members[self._group[identity]][0]

    def choose(self, identity: str, low: Tensor, high: Tensor) -> None:
        """Use a range for an edge in place of its observer's."""
        self.chosen[identity] = low, high
        self.forget_parameters()

    def _forget(self, identity: str) -> None:
        self._parameters.pop(self._group[identity], None)
        self._grids = None

    def _all_ends(self) -> tuple[Tensor, Tensor]:
        """Return the ends of all observers' ranges, `(observers,)` each."""
        device = next((o.low.device for o in self._observers.values() if o.low is not None), torch.device("cpu"))
        # What is infinite leaves minimum and maximum over a group as they are.
        low, high = torch.tensor([torch.inf, -torch.inf], dtype=torch.float32, device=device).unbind()
        ranges = [self._range(i) if self._has_range(i) else (low, high) for i in self._observers]
        lows, highs = (torch.stack(ends) for ends in zip(*ranges, strict=True))
        return lows, highs

    def _missing(self) -> frozenset[str]:
        """Return the edges without a range."""
        known = {g for g, members in self._members.items() if all(self._has_range(m) for m in members)}
        return frozenset(identity for identity, group in self._group.items() if group not in known)

    def _has_range(self, identity: str) -> bool:
        return identity in self.chosen or self._observers[identity].low is not None

    def _range(self, identity: str) -> tuple[Tensor, Tensor]:
        if identity in self.chosen:
            return self.chosen[identity]
        if identity in self._first:
            return self._first[identity]
        try:
            return self._observers[identity].range()
        except CalibrationError as error:
            raise CalibrationError(f"{identity}: {error}") from error
