"""A module with one captured call and the plan for it: what every way of quantizing starts from, and gives an artifact.

What stages ask of it is the same whether its recipe needs a graph or not, so that none of them has to know which it is.
"""

import inspect
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.calls.calls import Call, CallSpec, CapturedCall, DynamicShapes, flatten_call
from lightning_quant.calls.signature import leaves_of
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.errors import ExportError
from lightning_quant.graph.plan import Plan
from lightning_quant.numerics.adjustments import AccuracyStep
from lightning_quant.planned.batch import Batch, checked_states, find_batch
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.runtimes import Runtime
from lightning_quant.surgery.host import HOST, copied_to
from lightning_quant.surgery.routing import evaluation_mode, without_fast_path

# The name of the dimension of samples.
BATCH = "batch"


class Compared(Protocol):
    """How far an artifact agrees with what was exported to it: `Parity`, or `LayerParity`.

    Attributes:
        artifact_db: signal-to-noise of what was exported against the artifact, in decibels.
        worst_share: of the worst operator, the share of values within one step; None where none is compared alone.
    """

    @property
    def artifact_db(self) -> float: ...  # noqa: D102

    @property
    def worst_share(self) -> float | None: ...  # noqa: D102

    @property
    def failures(self) -> list[str]:
        """What is wrong, in plain words; empty when the artifact is what was exported."""


class PlannedModel:
    """Base of `StaticModel`, for recipes that need a graph, and of `Layerwise`, for those that need none.

    Attributes:
        root: the float module; it owns every parameter and buffer.
        recipe: numerics.
        captured: the captured call, on the CPU in float32; `signature`, `spec` and `tensors` are its own.
        plan: what happens to each layer, and why.
        varying: `(input, dimension)` whose size differed from the captured call in some call since.
        exported: input name to dimension to its name, of what may vary in the file that was written last.
        refused: what was tried to let vary and did not export, with the reason.
        decided: what Python reads out of tensors in the captured call, where the file answers such calls alone.
        into_only: why there is no program of it, so that an artifact is loaded into a module of the user's; empty where
            there is one.
        parts: names of the modules that are quantized together, where it is not the root itself.
        learns_from_captured: whether training calls the module otherwise than it was captured, so that tensors which
            training never reaches have the ranges of the captured call.
        accuracy_steps: what calibration tried for accuracy, and what came of it.
    """

    # Whether token ids and masks may be of any length though all calls had one: where nothing in a file depends on it.
    GUESSES_SEQUENCES: ClassVar[bool] = False

    root: nn.Module
    recipe: AnyRecipe
    captured: CapturedCall
    plan: Plan
    varying: set[tuple[str, int]]
    # What of the sizes was found out by trying: found once, and shared by all bindings of the same plan.
    _batch: Batch | EllipsisType | None = ...
    exported: DynamicShapes | None = None
    refused: tuple[tuple[DynamicShapes, str], ...] = ()
    decided: tuple[tuple[str, Any], ...] = ()
    into_only: str = ""
    parts: tuple[str, ...] = ()
    learns_from_captured: bool = False
    accuracy_steps: tuple[AccuracyStep, ...] = ()

    @property
    def signature(self) -> inspect.Signature:
        """Signature of the module's own forward."""
        return self.captured.signature

    @property
    def spec(self) -> CallSpec:
        """What of the captured call is tensors and what is constant."""
        return self.captured.spec

    @property
    def tensors(self) -> list[Tensor]:
        """The captured call's tensors, on the CPU in float32."""
        return self.captured.tensors

    @cached_property
    def runtime(self) -> Runtime:
        """Where it will run: the runtime that the plan names."""
        return runtimes.get(self.plan.runtime)

    @property
    def batch(self) -> Batch | None:
        """Where the samples of the captured call lie; None where the module takes the captured sizes alone."""
        if isinstance(self._batch, EllipsisType):
            root = checked_states(self._copy_of_root())

            def run(tensors: list[Tensor]) -> list[Tensor]:
                args, kwargs = self.call(tensors)
                with torch.no_grad(), isolated_rng(0), evaluation_mode(root), without_fast_path():
                    return leaves_of(root(*args, **kwargs))

            self._batch = find_batch(run, self.spec.names, self.tensors)
        return self._batch

    def _copy_of_root(self) -> nn.Module:
        """Return an independent copy of the module on the CPU, with every forward its own."""
        return copied_to(self.root, HOST, unrouted=True)

    def samples(self, number: int) -> list[Tensor]:
        """Return the captured tensors with at most that many samples; all of them where a file takes no fewer."""
        batch = self.batch
        if batch is None or (self.exported is not None and not self.varies_in_file):
            return list(self.tensors)
        return batch.cut(self.captured.names, self.captured.tensors, 0, max(number, batch.smallest))

    @property
    def smallest(self) -> int:
        """Number of samples of the smallest call that the module, and the file once it is written, takes."""
        if self.batch is None or (self.exported is not None and not self.varies_in_file):
            return self.num_samples
        return self.batch.smallest

    @property
    def varies_in_file(self) -> bool:
        """Whether the file that was written last takes any number of samples."""
        exported, batch = self.exported or {}, self.batch
        return batch is not None and all(exported.get(name, {}).get(d) == BATCH for name, d in batch.inputs.items())

    @property
    def num_samples(self) -> int:
        """Number of samples of the captured call, or the first input's first size where nobody knows."""
        if self.batch is not None:
            return self.batch.size
        return self.tensors[0].shape[0] if self.tensors and self.tensors[0].dim() else 1

    def share_sizes(self, other: "PlannedModel") -> None:
        """Let another binding know what was found out of the sizes."""
        other.varying = self.varying
        other.take_sizes(self.found_sizes())

    def found_sizes(self) -> tuple[Any, ...]:
        """Return what was found out of the sizes, plain data."""
        return self._batch, self.exported, self.refused, self.decided, self.into_only

    def take_sizes(self, sizes: tuple[Any, ...]) -> None:
        """Take over what another binding, or process, found out."""
        self._batch, self.exported, self.refused, self.decided, self.into_only = sizes

    def call(self, tensors: list[Tensor] | None = None) -> Call:
        """Return the captured call, with these tensors in place of its own if there are any."""
        return self.captured.bind(tensors)

    @property
    def least_stored_share(self) -> float | None:
        """Share of the weights that must be stored with fewer bits; None where the recipe asks for none."""
        return None

    @property
    def evaluated_layers(self) -> tuple[str, ...]:
        """Names of the layers that do not run themselves when the artifact runs in the module's place."""
        raise NotImplementedError

    @property
    def has_graphs(self) -> bool:
        """Whether graphs take the place of the module's own code."""
        return False

    @property
    def rounds_now(self) -> bool:
        """Whether a call of the module is rounded as things stand."""
        return False

    @property
    def takes_any_call(self) -> bool:
        """Whether the user's own code runs around an artifact's layers, with whatever calls it makes."""
        return False

    @property
    def runs_inside(self) -> bool:
        """Whether an artifact is evaluated inside the module, which there must be something around its layers for."""
        return False

    @property
    def may_give_up_program(self) -> bool:
        """Whether an artifact may have layers and tensors alone."""
        return False

    def give_up_program(self, reason: str) -> None:
        """Note why an artifact will have layers and tensors alone.

        Raises:
            ExportError: it cannot be without a program.
        """
        raise ExportError(reason)

    def on_host(self) -> Self:
        """Return the same over a float32 module on the CPU, where it is converted and measured: itself if it is so."""
        raise NotImplementedError

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "PlannedModel":
        """Return the same over another module of the same structure, and another captured call."""
        raise NotImplementedError

    def for_trial(self) -> Self:
        """Return what can be exported before there is anything but the captured call."""
        return self

    def observe_unreached(self) -> None:
        """Learn from the captured call what no batch has taught, where training calls otherwise."""

    def converted(self, *, static_sizes: bool) -> tuple[nn.Module, Any]:
        """Return the module to export and its result for the captured call, on the CPU.

        Args:
            static_sizes: whether all dimensions but the batch stay as captured.

        Raises:
            ExportError: it does not compute what was simulated.
        """
        raise NotImplementedError

    def attached(self, phase: str = "frozen") -> AbstractContextManager[None]:
        """Let the module compute what its artifact will, while a block runs."""
        raise NotImplementedError

    def parity(self, loaded: nn.Module, model_path: Path) -> Compared:
        """Compare a loaded artifact, and its model file, with what was exported to it."""
        raise NotImplementedError

    def release(self) -> None:
        """Give up what is of no use once it is on disk."""

    def detach(self) -> None:
        """Leave the module as it was."""
        raise NotImplementedError

    def note_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember in which dimensions another call differs from the captured one."""
        spec, tensors = flatten_call(self.signature, args, kwargs)
        self.note_sizes_of(spec.names, tensors)

    def note_sizes_of(self, names: tuple[str, ...], tensors: list[Tensor]) -> None:
        """Remember in which dimensions tensors of these names differ from those of the captured call."""
        sizes = self.captured.sizes
        for name, tensor in zip(names, tensors, strict=True):
            if len(sizes.get(name, ())) == tensor.dim():
                self.varying.update((name, d) for d in range(tensor.dim()) if tensor.shape[d] != sizes[name][d])
