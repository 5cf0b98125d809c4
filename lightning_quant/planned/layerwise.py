"""Quantization layer by layer: dynamic, weight-only and half precision, without a graph and without calibration.

One call of the float model decides: each layer is tried where it runs, on what it really reads, and the safest scheme
that is needed takes its place. Layers that stay float, and all that is no layer, are shared with the float model.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_quant import runtimes
from lightning_quant.calls.calls import Call, CapturedCall, spec_of
from lightning_quant.calls.signature import described, tensor_leaves
from lightning_quant.calls.structures import reachable_tensors
from lightning_quant.capture.capture import isolated_rng
from lightning_quant.capture.together import join_parts, part, parts_of, signature_of_parts
from lightning_quant.errors import CaptureError, ExportError, PlanError
from lightning_quant.graph.analyze import check_patterns, own_signature
from lightning_quant.graph.plan import Plan, Row
from lightning_quant.graph.state import check_call
from lightning_quant.graph.table import Selection
from lightning_quant.layers.correction import correct_biases
from lightning_quant.layers.finite import check_output
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.placement import place, placed
from lightning_quant.layers.refine import refine
from lightning_quant.layers.rows import rows_of
from lightning_quant.layers.trial import Trial
from lightning_quant.numerics.noise import alike, signal_to_noise
from lightning_quant.planned.layer_parity import LayerParity, check_layer_parity
from lightning_quant.planned.overrides import select
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.planned.refusals import check_runs
from lightning_quant.planned.try_layers import try_layers
from lightning_quant.recipe import recipe as recipes
from lightning_quant.recipe.recipe import AnyRecipe, LayerRecipe
from lightning_quant.surgery.host import give_back_memory, moved_call, on_host
from lightning_quant.surgery.routing import clone, evaluation_mode, without_fast_path


class Layerwise(PlannedModel):
    """A float module, the plan for its layers, and the quantized layers that can take their places.

    Attributes:
        layers: name of every place to the quantized layer for it; a layer that is used in two places is one object.
        outputs: what the float module and the quantized one make of the captured call.
        given: the captured call itself, where it holds what no spec can describe.
    """

    GUESSES_SEQUENCES = True
    recipe: LayerRecipe

    def __init__(
        self,
        root: nn.Module,
        captured: CapturedCall,
        recipe: LayerRecipe,
        plan: Plan,
        layers: dict[str, StoredLayer],
        selection: Selection,
    ) -> None:
        self.root, self.captured = root, captured
        self.recipe, self.plan, self.layers, self.selection = recipe, plan, layers, selection
        self.varying: set[tuple[str, int]] = set()
        self.outputs: tuple[Any, Any] = (None, None)
        self.given: Call | None = None

    @property
    def least_stored_share(self) -> float:
        """Share of the weights that must be stored with fewer bits."""
        return self.recipe.min_stored_share

    @property
    def evaluated_layers(self) -> tuple[str, ...]:
        """Names of the quantized layers' places."""
        return tuple(self.layers)

    @property
    def takes_any_call(self) -> bool:
        """Whether the user's own code runs around an artifact's layers, with whatever calls it makes."""
        return self.runtime.IN_PROCESS

    @property
    def runs_inside(self) -> bool:
        """Whether an artifact is evaluated inside the module: one that is a layer itself has nothing to be filled."""
        return self.takes_any_call and "" not in self.layers

    @property
    def may_give_up_program(self) -> bool:
        """Whether the runtime has artifacts without a program, and there is a module around the layers to be filled."""
        return self.runtime.FILLS_MODULES and "" not in self.layers

    def call(self, tensors: list[Tensor] | None = None) -> Call:
        """Return the captured call, with these tensors in place of its own where one can be made with them."""
        return super().call(tensors) if self.given is None else self.given

    def note_sizes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember in which dimensions another call differs from the captured one."""
        if self.given is None:
            super().note_sizes(args, kwargs)

    def give_up_program(self, reason: str) -> None:
        """Note why an artifact will have layers and tensors alone.

        Raises:
            ExportError: the runtime has no such artifacts, or there is no module around the layer to be filled.
        """
        if not self.may_give_up_program:
            raise ExportError(reason)
        self.into_only = reason.rstrip(".")

    def compare(self) -> None:
        """Run the float module and the quantized one on the captured call, and keep what they answer.

        Raises:
            CalibrationError: the float module itself does not answer with numbers.
            PlanError: the quantized one cannot be called: its code reads a weight that is now stored otherwise.
        """
        args, kwargs = self.call()
        with torch.no_grad(), evaluation_mode(self.root), without_fast_path():
            with isolated_rng(0):
                float_output = self.root(*args, **kwargs)
            try:
                tensor_leaves(float_output)
            except ExportError as error:
                self.give_up_program(str(error))
                float_output = reachable_tensors(float_output)
            check_output(self.root, float_output, self.spec.names, self.tensors, lambda: self.root(*args, **kwargs))
            try:
                with self.attached(), isolated_rng(0):
                    self.outputs = float_output, described(self.root(*args, **kwargs))
            except (RuntimeError, TypeError) as error:
                raise PlanError(
                    f"Expected {type(self.root).__name__} to run with quantized layers, but {error}. If its code uses "
                    "the weight of a layer beside the layer, keep that layer float with `exclude`."
                ) from error
        if math.isnan(signal_to_noise(*alike(*self.outputs))):
            raise PlanError(
                f"Expected {type(self.root).__name__} to give numbers with quantized layers, but it gives NaN. If its "
                "code uses the weight of a layer beside the layer, keep that layer float with `exclude`."
            )

    def release(self) -> None:
        """Give up the quantized layers, once they are on disk; the outputs stay."""
        self.layers = {}
        give_back_memory()

    def converted(self, *, static_sizes: bool) -> tuple[nn.Module, Any]:
        """Return the quantized module and its result for the captured call; it is the same for all sizes."""
        return self.quantized(), self.outputs[1]

    def parity(self, loaded: nn.Module, model_path: Path) -> LayerParity:
        """Compare a loaded artifact with the float model and the quantized layers."""
        return check_layer_parity(self.call(self.tensors), self.outputs, loaded)

    def quantized(self) -> nn.Module:
        """Return a copy of the module with the quantized layers in place; other tensors are shared."""
        if "" in self.layers:
            return self.layers[""]
        duplicate = clone(self.root).eval()
        place(duplicate, self.layers)
        return duplicate

    @contextmanager
    def attached(self, phase: str = "frozen") -> Iterator[None]:
        """Put the quantized layers into the float module while a block runs."""
        with placed(self.root, self.layers):
            yield

    def on_host(self) -> Self:
        """Return itself: layers are made on the CPU in float32."""
        return self

    def detach(self) -> None:
        """Leave the module as it was; outside of `attached` that is so but for the calls of parts that it answers."""
        part(self.root)

    def _copy_of_root(self) -> nn.Module:
        root = super()._copy_of_root()
        if self.parts:
            join_parts(root)
        return root

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "Layerwise":
        """Return the layers of another module of the same structure, chosen anew on its weights."""
        args, kwargs = self.call(tensors)
        other = quantize_layers(
            root,
            args,
            kwargs,
            recipe=self.recipe,
            runtime=self.plan.runtime,
            selection=self.selection,
            module=self.plan.module,
        )
        self.share_sizes(other)
        return other


def quantize_layers(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    recipe: str | AnyRecipe,
    runtime: str = "torch",
    selection: Selection | None = None,
    module: str = "",
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
    only: frozenset[str] | None = None,
) -> Layerwise:
    """Choose a scheme for each layer of a module from one call, and quantize it; the module is left as it was.

    Args:
        model: the float module.
        args: positional arguments of one real call.
        kwargs: keyword arguments of the same call.
        recipe: schemes and how close to float they must be.
        runtime: name of the runtime, which says how half precision is computed.
        selection: patterns of layers to include and exclude.
        module: the module's qualified name, for the plan.
        calls: more calls of the module for recipes with GPTQ; the one call alone by default.
        only: names of the layers to quantize, where something else takes care of the others.

    Raises:
        PlanError: no layer can be quantized, or a pattern names none.
        CalibrationError: a weight of a layer, or what the module answers, is not finite.
    """
    chosen = recipes.get(recipe)
    if chosen.needs_calibration:
        raise PlanError(f"Expected `recipe` to quantize layers, but {chosen.name!r} needs `prepare` and calibration.")
    selection = selection or Selection()
    source, model = model, on_host(model)
    more = [Call(*call) for call in calls or [(args, kwargs or {})]]
    call = moved_call(args, kwargs or {})
    if parts := parts_of(call.args):
        join_parts(model)
    captured, opaque = _captured(model, call, runtime)
    half, wanted = check_runs(runtime, chosen), select(selection, chosen)
    tried = try_layers(model, call, chosen, wanted, half_arithmetic=half, parts=parts, only=only)
    rows = rows_of(model, list(tried.values()), *call)
    _check_patterns(wanted, chosen, rows, tried)
    layers = {name: trial.layer for trial in tried.values() if trial.layer is not None for name in trial.places}
    plan = Plan(chosen.name, runtime, module, (), rows)
    if not layers:
        raise PlanError(_nothing(model, chosen.name, rows))
    if chosen.gptq:
        refine(source, layers, more)
    if chosen.bias_correction:
        correct_biases(model, tried, *call)
    quantized = Layerwise(model, captured, chosen, plan, layers, selection)
    quantized.parts = parts
    _give_up_program(quantized, call, opaque)
    quantized.compare()
    return quantized


def _check_patterns(wanted: Selection, recipe: LayerRecipe, rows: tuple[Row, ...], tried: dict[str, Trial]) -> None:
    """Make sure that patterns name layers; those of what stays float, also what is inside one that is stored whole."""
    inside = (Row(name, kind, "float") for trial in tried.values() for name, kind in trial.inside())
    check_patterns(wanted, [*rows, *inside])
    check_patterns(Selection(exclude=tuple(p for p in recipe.overrides if p not in wanted.exclude)), list(rows))


def _give_up_program(quantized: Layerwise, call: Call, opaque: str) -> None:
    """Note that there will be no program, where the call is opaque, of several modules, or changes what it reads."""
    if opaque:
        quantized.give_up_program(opaque)
        quantized.given, quantized._batch = call, None
    elif parts := quantized.parts:
        quantized.give_up_program(f"it is of several modules, which other code calls one by one: {', '.join(parts)}")
    else:
        try:
            check_call(quantized.root, call)
        except CaptureError as error:
            quantized.give_up_program(str(error))


def _captured(model: nn.Module, call: Call, runtime: str) -> tuple[CapturedCall, str]:
    """Return a call as data, and why no program can be made of it, where the runtime can do without one."""
    signature = signature_of_parts() if parts_of(call.args) else own_signature(model)
    needs_program = not runtimes.get(runtime, exporting=True).FILLS_MODULES
    spec, tensors, opaque = spec_of(signature, call, needs_program=needs_program)
    return CapturedCall(signature, spec, tensors), opaque


def _nothing(model: nn.Module, recipe: str, rows: Sequence[Row]) -> str:
    reasons = "; ".join(f"{row.name} ({row.kind}): {row.reason}" for row in rows[:3]) or "it has no such layer"
    return (
        f"Expected {type(model).__name__} to have a layer for recipe {recipe!r}, but nothing can be "
        f"quantized: {reasons}."
    )
