"""Quantization layer by layer: dynamic, weight-only and half precision, without a graph and without calibration.

One call of the float model decides: each layer is tried where it runs, on what it really reads, and the safest scheme
that is needed takes its place. Layers that stay float, and all that is no layer, are shared with the float model.
"""

import ctypes
import inspect
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant import recipe as recipes
from lightning_quant import runtimes
from lightning_quant.calls import CallSpec, flatten_call
from lightning_quant.captured import CapturedModel
from lightning_quant.errors import PlanError
from lightning_quant.graph.analyze import check_patterns, own_signature
from lightning_quant.graph.claims import Claim, settle
from lightning_quant.graph.counting import observe_call
from lightning_quant.graph.plan import Plan, Row, join
from lightning_quant.graph.table import Selection
from lightning_quant.host import moved_call, on_host
from lightning_quant.layers.correction import correct_biases
from lightning_quant.layers.finite import check_output, check_weights
from lightning_quant.layers.layer import StoredLayer
from lightning_quant.layers.placement import place, placed
from lightning_quant.layers.refine import refine
from lightning_quant.layers.trial import Trial, trials
from lightning_quant.noise import alike, signal_to_noise
from lightning_quant.recipe import AnyRecipe, LayerRecipe
from lightning_quant.routing import (
    call_watched,
    clone,
    evaluation_mode,
    without_fast_path,
)
from lightning_quant.signature import tensor_leaves


class Layerwise(CapturedModel):
    """A float module, the plan for its layers, and the quantized layers that can take their places.

    Attributes:
        layers: name of every place to the quantized layer for it; a layer that is used in two places is one object.
        outputs: what the float module and the quantized one make of the captured call.
    """

    def __init__(
        self,
        root: nn.Module,
        signature: inspect.Signature,
        spec: CallSpec,
        tensors: list[Tensor],
        recipe: LayerRecipe,
        plan: Plan,
        layers: dict[str, StoredLayer],
        selection: Selection,
    ) -> None:
        self.root, self.signature, self.spec, self.tensors = root, signature, spec, tensors
        self.recipe, self.plan, self.layers, self.selection = recipe, plan, layers, selection
        self.varying: set[tuple[str, int]] = set()
        self.outputs: tuple[Any, Any] = (None, None)

    def compare(self) -> None:
        """Run the float module and the quantized one on the captured call, and keep what they answer.

        Raises:
            CalibrationError: the float module itself does not answer with numbers.
            PlanError: the quantized one cannot be called: its code reads a weight that is now stored otherwise.
        """
        args, kwargs = self.call(self.tensors)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(self.root), without_fast_path():
            float_output = self.root(*args, **kwargs)
            check_output(self.root, float_output, self.spec.names, self.tensors, lambda: self.root(*args, **kwargs))
            try:
                with self.attached():
                    self.outputs = float_output, self.root(*args, **kwargs)
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
        # glibc keeps what was freed in pieces of a few megabytes: a fifth of the float model's bytes, as measured.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
        if trim is not None:
            trim(0)

    def quantized(self) -> nn.Module:
        """Return a copy of the module with the quantized layers in place; other tensors are shared."""
        if "" in self.layers:
            return self.layers[""]
        duplicate = clone(self.root).eval()
        place(duplicate, self.layers)
        return duplicate

    @contextmanager
    def attached(self, phase: str = "frozen") -> Iterator[None]:
        """Put the quantized layers into the float module for the time of a block."""
        with placed(self.root, self.layers):
            yield

    def on_host(self) -> "Layerwise":
        """Return itself: layers are made on the CPU in float32."""
        return self

    def detach(self) -> None:
        """Do nothing: outside of `attached` the module is as it was."""

    def bound_to(self, root: nn.Module, tensors: list[Tensor] | None = None) -> "Layerwise":
        """Return the layers of another module of the same structure, chosen anew on its weights."""
        args, kwargs = self.call(self.tensors if tensors is None else tensors)
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
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None,
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
    if not isinstance(chosen, LayerRecipe):
        raise PlanError(f"Expected `recipe` to quantize layers, but {chosen.name!r} needs `prepare` and calibration.")
    selection = selection or Selection()
    source, model = model, on_host(model)
    more = calls or [(args, kwargs or {})]
    args, kwargs = moved_call(args, kwargs or {})
    signature = own_signature(model)
    spec, tensors = flatten_call(signature, args, kwargs)
    where = runtimes.get(runtime, exporting=True)
    if where.HALF_ARITHMETIC is None:
        raise PlanError(
            f"Expected `runtime` to run quantized layers for {chosen.name!r}, but {runtime!r} does not. Use runtime "
            f"{runtimes.that(lambda other: other.runs_layers(chosen.schemes))}, or recipe 'int8'."
        )
    refused = next((name for name in chosen.schemes if name in where.LAYER_REFUSALS), None)
    if refused is not None:
        reason = where.LAYER_REFUSALS[refused]
        raise PlanError(f"Expected a recipe that {runtime!r} runs, but got {chosen.name!r}: {reason}.")
    found = trials(model, chosen, selection, (args, kwargs), half_arithmetic=where.HALF_ARITHMETIC)
    if only is not None:
        found = {label: trial for label, trial in found.items() if label in only}
    check_weights(found)
    _run(model, list(found.values()), args, kwargs)
    for trial in found.values():
        trial.finish()
    _keep_ties(found)
    for name in _read_beside(model, found, args, kwargs):
        found[name].stay_float("code outside it reads its weight")
    _keep_ties(found)
    rows = _rows(model, list(found.values()), args, kwargs)
    check_patterns(selection, list(rows))
    layers = {name: trial.layer for trial in found.values() if trial.layer is not None for name in trial.places}
    plan = Plan(chosen.name, runtime, module, (), rows)
    if not layers:
        reasons = "; ".join(f"{row.name} ({row.kind}): {row.reason}" for row in rows[:3]) or "it has no such layer"
        raise PlanError(
            f"Expected {type(model).__name__} to have a layer for recipe {chosen.name!r}, but nothing can be "
            f"quantized: {reasons}."
        )
    if chosen.gptq:
        refine(source, layers, more)
    if chosen.bias_correction:
        correct_biases(model, found, args, kwargs)
    quantized = Layerwise(model, signature, spec, tensors, chosen, plan, layers, selection)
    quantized.compare()
    return quantized


@torch.no_grad()
def _run(model: nn.Module, found: list[Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Call the float model once; every layer's trial sees what the layer reads and answers."""
    # Before the user's hooks, which may change what the layer answers.
    handles = [trial.float_layer.register_forward_hook(trial.see, with_kwargs=True, prepend=True) for trial in found]
    call_watched(model, args, kwargs, handles)


@torch.no_grad()
def _read_beside(model: nn.Module, found: dict[str, Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Return the layers whose weights are used outside of them, too, where only the integers would be found.

    Mamba's discretization and DeBERTa's relative positions do so. Reading a shape or a type does no harm.
    """

    def fails(names: list[str]) -> bool:
        layers = {place: found[name].layer for name in names for place in found[name].places}
        with placed(model, layers):  # type: ignore[arg-type]
            try:
                output = model(*args, **kwargs)
            except (RuntimeError, TypeError):
                return True
        return any(t.is_floating_point() and bool(t.isnan().any()) for t in tensor_leaves(output))

    def culprits(names: list[str]) -> list[str]:
        if not names or not fails(names):
            return []
        half = len(names) // 2
        return names if len(names) == 1 else culprits(names[:half]) + culprits(names[half:])

    stored = [name for name, trial in found.items() if trial.layer is not None]
    with torch.random.fork_rng(devices=[]), evaluation_mode(model), without_fast_path():
        if not fails(stored) or fails([]):
            return []
        return culprits([name for name in stored if found[name].layer.read_beside])  # type: ignore[union-attr]


def _keep_ties(found: dict[str, Trial]) -> None:
    """Give layers that share a weight one form of it: the form of the one that needs most bits."""
    by_weight: dict[int, list[Trial]] = {}
    for trial in found.values():
        # Empty ones have no address.
        for weight in filter(torch.Tensor.numel, trial.weights):
            by_weight.setdefault(weight.data_ptr(), []).append(trial)
    for sharing in by_weight.values():
        neediest = max(sharing, key=lambda trial: trial.bits)
        for trial in sharing:
            if trial.bits != neediest.bits:
                trial.follow(neediest)


def _rows(model: nn.Module, found: list[Trial], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Row, ...]:
    """Return a row for every layer, and for what the call computes beside them."""
    claims = []
    counted: set[int] = set()
    for trial in found:
        weights = [weight for weight in trial.weights if weight.data_ptr() not in counted]
        counted.update(weight.data_ptr() for weight in weights)
        action = "float" if trial.layer is None else trial.layer.scheme.action
        row = Row(trial.label, trial.kind, action, trial.reason, excluded=trial.excluded)
        row = replace(row, weights=sum(weight.numel() for weight in weights))
        claims.append(Claim(row, trial.place, "whole", apart=trial.apart))
        for name, weight in trial.others:
            row = Row(join(trial.place, name), "Parameter", "float", "no product reads it", weights=weight.numel())
            claims.append(Claim(row, row.name, "layer"))
    with evaluation_mode(model):
        return tuple(settle(claims, observe_call(model, args, kwargs)))
