"""What several artifacts of one training have in common, made once."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from lightning_quant.export.export import trial_export
from lightning_quant.export.float_peers import TIMING_S, FloatPeers
from lightning_quant.planned.planned_model import PlannedModel

Value = TypeVar("Value")


class Shared:
    """Keeps what was made for the first that asked, for the others.

    Attributes:
        peers: float models that artifacts are timed beside; None where there is one artifact.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}
        self.peers: FloatPeers | None = FloatPeers(TIMING_S)

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return what is made for a key, by the first call of it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def tried(self, model: PlannedModel, **how: Any) -> tuple[int, tuple[Any, ...]]:
        """Export a model on trial, once for all that export alike; return its bytes, and what was found of its sizes.

        Args:
            model: of one module, which all have in common.
            how: as `trial_export` takes it, and all have it.
        """

        def attempt() -> tuple[int, tuple[Any, ...]]:
            return trial_export(model, **how), model.found_sizes()

        return self.once(("tried", model.plan.runtime, repr(model.recipe.exported)), attempt)

    def clear(self) -> None:
        """Give it all up."""
        self._made.clear()
        if self.peers is not None:
            self.peers.close()


class Alone(Shared):
    """Nothing is shared, and so nothing is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.peers = None

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Make it."""
        return make()
