"""A model with some operators or layers in safer schemes: planned anew, with what calibration has learned by then."""

from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.recipe.recipe import INT8_ACCURATE, LayerRecipe, Recipe
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.layer_ranking import rank_layers
from lightning_quant.search.places import places_of
from lightning_quant.search.quicker import floating
from lightning_quant.search.relaxations import Relaxations, names_in_integers, relaxations
from lightning_quant.simulate.prepared import Prepared

AnyKind = TypeVar("AnyKind", Recipe, LayerRecipe)


class Makes(Protocol):
    """Makes models of choices."""

    def accurate(self) -> Choice | None:
        """Return the whole recipe with more done for accuracy; None where there is no more."""

    def operators(self) -> tuple[str, ...]:
        """Return the names of what the whole recipe computes or stores in integers, in their order."""

    def all_float(self) -> Choice | None:
        """Return what keeps everything in float; None where no file holds that."""

    def make(self, choice: Choice) -> PlannedModel:
        """Return the model of a choice.

        Raises:
            QuantizationError: nothing is left to quantize, or a layer cannot be kept as chosen.
        """

    def ranked(self, calls: list[Call], *, by_time: bool) -> Relaxations:
        """Measure on some calls what safer schemes gain, and what they cost."""


def candidates(whole: PlannedModel, calls: list[Call], selection: Selection, *, trained: bool = False) -> Makes:
    """Return what makes models of choices, over a whole recipe.

    Args:
        whole: calibrated, or its layers quantized.
        calls: that it was calibrated on.
        selection: which operators the user wants quantized.
        trained: whether ranges were learned by training.
    """
    if isinstance(whole, Layerwise):
        return LayerCandidates(whole, calls)
    return Candidates(Prepared.of(whole), calls, selection, trained)


@dataclass
class LayerCandidates:
    """Makes models of choices, of a recipe that quantizes layer by layer.

    Attributes:
        whole: with the whole recipe.
        calls: that GPTQ learns from, where the recipe has it.
    """

    whole: Layerwise
    calls: list[Call]

    def accurate(self) -> Choice | None:
        """Return nothing: there is no calibration of which more could be done."""
        return None

    def operators(self) -> tuple[str, ...]:
        """Return the names of the quantized layers, in their order."""
        whole = self.whole
        return tuple(places_of(whole.root, whole.layers, whole.plan, whole.recipe.overrides))

    def all_float(self) -> Choice | None:
        """Return nothing: an artifact of layers has one at least."""
        return None

    def make(self, choice: Choice) -> Layerwise:
        """Return a model over the same module, its layers tried anew."""
        whole = self.whole
        if choice == Choice():
            return whole
        args, kwargs = whole.call()
        made = quantize_layers(
            whole.root,
            args,
            kwargs,
            recipe=recipe_of(whole.recipe, choice),
            runtime=whole.plan.runtime,
            selection=whole.selection,
            module=whole.plan.module,
            calls=self.calls,
        )
        whole.share_sizes(made)
        return made

    def ranked(self, calls: list[Call], *, by_time: bool) -> Relaxations:
        """Measure on some calls what safer schemes of layers gain, and what they cost."""
        return rank_layers(self.whole, calls, by_time=by_time)


@dataclass
class Candidates:
    """Makes models of choices, of a recipe that is calibrated.

    Attributes:
        whole: calibrated, with the whole recipe.
        calls: that it was calibrated on.
        selection: which operators the user wants quantized.
        trained: whether ranges were learned by training, which takes the place of what calibration does for accuracy.
    """

    whole: Prepared
    calls: list[Call]
    selection: Selection
    trained: bool = False

    def accurate(self) -> Choice | None:
        """Return the whole recipe with the steps of `int8_accurate`; None where it has steps, or they cannot run."""
        steps = self.whole.recipe.accuracy_steps
        return None if steps or self.trained or len(self.calls) < 2 else Choice(accurate=True)

    def operators(self) -> tuple[str, ...]:
        """Return the names of what the whole recipe computes or stores in integers, in their order."""
        return names_in_integers(self.whole)

    def all_float(self) -> Choice | None:
        """Return what keeps everything in float."""
        return floating(Choice(), self.operators())

    def ranked(self, calls: list[Call], *, by_time: bool) -> Relaxations:
        """Measure on some calls what keeping operators out of integers gains, and what it costs."""
        return relaxations(self.whole, calls, by_time=by_time)

    def make(self, choice: Choice) -> Prepared:
        """Return a model over the same module, calibrated.

        Raises:
            QuantizationError: nothing is left to quantize, or a layer cannot be kept as chosen.
        """
        whole = self.whole
        if choice == Choice():
            return whole
        args, kwargs = whole.call()
        recipe = recipe_of(whole.recipe, choice)
        if choice.accurate:
            recipe = replace(recipe, accuracy_steps=INT8_ACCURATE.accuracy_steps)
        made = prepare(
            whole.root,
            args,
            kwargs,
            recipe=recipe,
            runtime=whole.plan.runtime,
            selection=self.selection,
            observer=recipe.calibration_observer if choice.accurate else whole.observer,
            module=whole.plan.module,
            trains=False,
            may_stay_float={name for name, scheme in choice.kept if scheme == FLOAT} >= set(self.operators()),
        )
        whole.share_sizes(made)
        made.learns_from_captured = whole.learns_from_captured
        if not _carried(whole, made) or choice.accurate:
            calibrate(made, steps_of(made, self.calls))
        return made


def recipe_of(recipe: AnyKind, choice: Choice) -> AnyKind:
    """Return a recipe that gives what a choice says; the user's own overrides count first."""
    overrides = {**recipe.overrides, **{n: s for n, s in choice.kept if n not in recipe.overrides}}
    return replace(recipe, overrides=overrides)


def _carried(whole: Prepared, made: Prepared) -> bool:
    """Give a model the ranges that another plan of the same module has learned; tell whether those are all it needs.

    Layers and channel scales that steps for accuracy have changed belong to the tensors around them, which another plan
    may not round, and corrections of biases to the bits of their weights.
    """
    known, wanted = whole.ranges.observers, made.ranges.observers
    others = [i for i in made.weight_quant_maxima if made.weight_quant_max(i) != whole.weight_quant_max(i)]
    if whole.layers or whole.channels or others or not set(wanted) <= set(known):
        return False
    for identity, observer in wanted.items():
        observer.load_state(known[identity].state())
    made.ranges.chosen.update({i: ends for i, ends in whole.ranges.chosen.items() if i in wanted})
    made.ranges.forget_parameters()
    kept = {i: correction for i, correction in whole.bias_corrections.items() if i in made.operators}
    made.bias_corrections.update(kept)
    made.learned_steps, made.accuracy_steps = whole.learned_steps, whole.accuracy_steps
    made.to(whole.ranges.device)
    return True
