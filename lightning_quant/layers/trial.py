"""Which scheme a layer can bear: tried where the float model calls the layer, on what it reads there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.graph.plan import join
from lightning_quant.graph.table import Selection, matches
from lightning_quant.layers import KINDS, class_for
from lightning_quant.layers.layer import StoredLayer, computes_weight, from_float, plain
from lightning_quant.layers.parameters import StoredParameters, child_of
from lightning_quant.layers.products import multiplied
from lightning_quant.layers.storage import SCHEMES, Scheme, dequantize
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import RECIPES, LayerRecipe

_BITS = {"int4": 4, "int8": 8, "float16": 16, "bfloat16": 16}


class Trial:
    """The search for the first scheme whose output is close enough to the float layer's.

    Attributes:
        names: the places where the layer stands; empty for the module itself.
        label: the first of them, or the type of the module itself.
        float_layer: the layer.
        kind: its type.
        layer: the quantized layer so far; None where the layer stays float.
        unwanted: why it stays float whatever its outputs; empty when it may be quantized.
        excluded: whether that is because the user wants it.
        place: where the model's modules have it first.
        apart: multiply-adds of the calls seen that have nothing to do with its weights.
        parameters: names of the weights, where it is a module of its own code whose weights alone are stored.
    """

    def __init__(self, name: str, float_layer: nn.Module, recipe: LayerRecipe, known: dict[Any, Any]) -> None:
        self.names, self.float_layer = [name], float_layer
        self.label = name or type(float_layer).__name__
        self.kind = type(float_layer).__name__.removeprefix("Parametrized")
        self.layer: StoredLayer | None = None
        self.unwanted, self.excluded = "", False
        self.place, self.apart = name, 0
        self.parameters: list[str] | None = None
        self._recipe, self._known = recipe, known
        self._schemes: list[Scheme] = []
        self._notes: list[str] = []
        self._num_calls = 0

    def inside(self) -> Iterator[tuple[str, str]]:
        """Yield name and kind of every module inside the layer."""
        for name, module in self.float_layer.named_modules():
            if name:
                yield join(self.place, name), type(module).__name__

    def allow(self, stored_class: type[StoredLayer], *, half_arithmetic: bool) -> None:
        """Let the layer be tried with the schemes that its class has a form for.

        Args:
            stored_class: what it becomes.
            half_arithmetic: whether the runtime computes in half precision; otherwise only weights are stored so.
        """
        self._stored_class = stored_class
        for scheme in (SCHEMES[name] for name in self._recipe.schemes):
            if scheme.arithmetic == "half" and not half_arithmetic:
                scheme = replace(scheme, arithmetic="float")
            refusal = stored_class.refusal(plain(self.float_layer), scheme, self._recipe.group_size)
            if refusal:
                self._notes.append(f"{scheme.action}: {refusal}")
            else:
                self._schemes.append(scheme)

    def allow_parameters(self, names: list[str], *, half_arithmetic: bool) -> None:
        """Let weights be stored that the module's own code multiplies by."""
        self.parameters = names
        self.allow(StoredParameters, half_arithmetic=half_arithmetic)

    def open_weights(self, reason: str, *, half_arithmetic: bool) -> None:
        """Store the weights where code outside the layer, which reads them, too, gets them in float; or keep it float.

        Args:
            reason: what the row says.
            half_arithmetic: as for `allow`.
        """
        own = [name for name, p in self.float_layer._parameters.items() if p is not None and p.dim() > 1]
        if isinstance(self.float_layer, nn.RNNBase) or len(own) != len(self.weights):
            self.stay_float(reason)
            return
        self.layer, self._schemes, self._notes, self._num_calls = None, [], [f"{reason}, in float"], 0
        self.allow_parameters(own, half_arithmetic=half_arithmetic)
        self.finish()

    @property
    def places(self) -> list[str]:
        """Where the quantized layer goes."""
        return self.names if self.parameters is None else [child_of(name) for name in self.names]

    @property
    def weights(self) -> list[Tensor]:
        """The float layer's weights; where there is no form for a module, what is inside it is not part of it."""
        if self.parameters is not None:
            return [self.float_layer.get_parameter(name) for name in self.parameters]
        is_whole = class_for(self.float_layer) is not None
        return [p for p in self.float_layer.parameters(recurse=is_whole) if p.dim() > 1]

    @property
    def others(self) -> list[tuple[str, Tensor]]:
        """Weights of a module of its own code that stay as they are, by name."""
        if self.parameters is None:
            return []
        own = self.float_layer.named_parameters(recurse=False)
        return [(name, p) for name, p in own if p.dim() > 1 and name not in self.parameters]

    @property
    def bits(self) -> int:
        """Bits of a stored value."""
        return 32 if self.layer is None else _BITS[self.layer.scheme.storage]

    @property
    def reason(self) -> str:
        """Why the layer does not have the scheme that the recipe wants; empty when it has."""
        return self.unwanted or "; ".join(self._notes)

    def see(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Take one call of the float layer into account; a forward hook."""
        if self.parameters is not None:
            return
        self._num_calls += 1
        stored_class = class_for(module)
        self.apart += 0 if stored_class is None else stored_class.multiply_adds_apart(module, args, kwargs)
        while not self.unwanted and (layer := self._advance()) is not None:
            if self._is_close(signal_to_noise(output, layer(*args, **kwargs))):
                return

    def finish(self) -> None:
        """Judge a layer that was never called, or weights alone, by the weights."""
        if self._num_calls or self.unwanted:
            return
        if self.parameters is None:
            self._schemes = [scheme for scheme in self._schemes if scheme.arithmetic != "integer"]
            self._notes.append("not called on the captured call: judged by its weights")
        while (layer := self._advance()) is not None:
            rows = {name: layer.rows(plain(self.float_layer), name) for name in layer.names}
            stored = {name: dequantize(*layer.stored(name)) for name in layer.names}
            if self._is_close(signal_to_noise(rows, stored)):
                return

    def follow(self, other: "Trial") -> None:
        """Take the form in which another layer needs a weight that both share."""
        storage = None if other.layer is None else other.layer.scheme.storage
        self._schemes = [] if storage is None else [s for s in self._schemes if s.storage == storage]
        self.layer = None
        self._notes.append(f"its weight is that of {other.label}, which is stored with {other.bits} bits")
        self._advance()

    def stay_float(self, reason: str) -> None:
        """Keep the layer float whatever its outputs."""
        self.unwanted, self.layer, self._schemes = reason, None, []

    def _advance(self) -> StoredLayer | None:
        """Return the layer of the current scheme, made now unless it exists; None when there is no scheme left."""
        if self.layer is None and self._schemes:
            known, group_size = dict(self._known), self._recipe.group_size
            self.layer = from_float(
                self._stored_class, plain(self.float_layer), self._schemes[0], group_size, known, self.parameters
            )
            self._added = known.keys() - self._known.keys()
            self._known.update(known)
        return self.layer

    def _is_close(self, ratio_db: float) -> bool:
        if ratio_db >= self._recipe.floor_db:
            return True
        self._notes.append(
            f"{self._schemes[0].action}: {ratio_db:.1f} dB signal-to-noise where {self._recipe.floor_db:g} are wanted"
        )
        for key in self._added:
            del self._known[key]
        self.layer = None
        self._schemes = self._schemes[1:]
        return False


def trials(
    model: nn.Module,
    recipe: LayerRecipe,
    selection: Selection,
    call: Call,
    *,
    half_arithmetic: bool,
) -> dict[str, Trial]:
    """Return a trial for every layer with weights, by the first name of its place.

    Args:
        model: the float module.
        recipe: what is tried.
        selection: what the user wants.
        call: of the model, which tells what code of its own multiplies by.
        half_arithmetic: whether the runtime computes in half precision; otherwise only weights are stored so.
    """
    unknown = sorted(set(recipe.schemes) - set(SCHEMES))
    if unknown or not recipe.schemes:
        raise QuantizationError(f"Expected `schemes` to be out of {sorted(SCHEMES)}, but got {list(recipe.schemes)}.")
    if recipe.group_size < 1:
        raise QuantizationError(f"Expected `group_size` to be positive, but got {recipe.group_size}.")
    known: dict[Any, Any] = {}
    by_module: dict[int, Trial] = {}
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in by_module:
            by_module[id(module)].names.append(name)
            continue
        if any(not outer or name.startswith(f"{outer}.") for outer in inside):
            continue
        stored_class = class_for(module)
        has_weights = any(p.dim() > 1 for p in module.parameters(recurse=False))
        if stored_class is None and not has_weights:
            continue
        trial = by_module[id(module)] = Trial(name, module, _own(recipe, name, module), known)
        if stored_class is not None:
            inside.append(name)
        excluded = selection.refusal(trial.label, trial.kind)
        if stored_class is not None and not excluded:
            excluded = next(iter(_excluded_inside(trial, selection)), "")
        trial.unwanted, trial.excluded = excluded or _refusal(module, stored_class), bool(excluded)
        if not trial.unwanted and stored_class is not None:
            trial.allow(stored_class, half_arithmetic=half_arithmetic)
    _allow_parameters(model, list(by_module.values()), call, half_arithmetic=half_arithmetic)
    return {trial.label: trial for trial in by_module.values()}


def _own(recipe: LayerRecipe, name: str, module: nn.Module) -> LayerRecipe:
    """Return the recipe of one layer: that of the first override which names it, or the recipe of all."""
    kind = type(module).__name__.removeprefix("Parametrized")
    targets = (target for pattern, target in recipe.overrides.items() if matches(pattern, name or kind, kind))
    named = RECIPES.get(next(targets, ""))
    return recipe if named is None or named.needs_calibration else named


def _excluded_inside(trial: Trial, selection: Selection) -> Iterator[str]:
    """Yield why a layer stays float that would be stored with layers inside it which the user wants in float."""
    for name, kind in trial.inside():
        if any(matches(pattern, name, kind) for pattern in selection.exclude):
            yield f"{name} is excluded, and is stored together with it"


def _allow_parameters(model: nn.Module, tried: list[Trial], call: Call, *, half_arithmetic: bool) -> None:
    """Let weights of modules without a quantized form be stored, where the modules' code multiplies by them."""
    owners = [t for t in tried if class_for(t.float_layer) is None and not t.excluded]
    owners = [t for t in owners if not isinstance(t.float_layer, StoredLayer | parametrize.ParametrizationList)]
    read = multiplied(model, [t.float_layer for t in owners], *call)
    for trial in owners:
        names = [name for name, p in trial.float_layer.named_parameters(recurse=False) if id(p) in read]
        if names:
            trial.unwanted = ""
            trial.allow_parameters(names, half_arithmetic=half_arithmetic)


def _refusal(module: nn.Module, stored_class: type[StoredLayer] | None) -> str:
    if stored_class is None:
        base = next((kind for kind in KINDS if isinstance(module, kind)), None)
        return (
            f"it overrides the forward of {base.__name__}" if base else f"no quantized form of {type(module).__name__}"
        )
    if any(p.dim() > 1 and not p.numel() for p in module.parameters()):
        return "it has a weight without values"
    if "forward" in module.__dict__:
        return "its forward was replaced by another one"
    if any(not computes_weight(hook) for hook in module._forward_pre_hooks.values()):
        return "it has forward pre-hooks"
    return ""
