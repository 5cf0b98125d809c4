"""A calibrated model with some operators kept out of integers: planned anew, with the ranges that are known."""

from dataclasses import dataclass, replace

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.recipe.recipe import INT8_ACCURATE, Recipe
from lightning_quant.search.choice import FLOAT, Choice
from lightning_quant.search.relaxations import names_in_integers
from lightning_quant.simulate.prepared import Prepared


@dataclass
class Candidates:
    """Makes models of choices.

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


def recipe_of(recipe: Recipe, choice: Choice) -> Recipe:
    """Return a recipe that gives what a choice says; the user's own overrides count first."""
    overrides = {**recipe.overrides, **{n: s for n, s in choice.kept if n not in recipe.overrides}}
    steps = INT8_ACCURATE.accuracy_steps if choice.accurate else recipe.accuracy_steps
    return replace(recipe, overrides=overrides, accuracy_steps=steps)


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
