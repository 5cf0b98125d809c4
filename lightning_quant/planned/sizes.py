"""Which sizes may vary in a file: what is tried, in which order, and what a reader should know of the outcome."""

from collections.abc import Callable
from keyword import iskeyword
from typing import Literal

from lightning_quant.calls.calls import DynamicShapes
from lightning_quant.calls.loaded import into_how
from lightning_quant.errors import QuantizationError
from lightning_quant.planned.decisions import in_words
from lightning_quant.planned.planned_model import BATCH, PlannedModel

STATIC = "static"
ChosenShapes = DynamicShapes | Literal["static"] | None


def chosen_shapes(given: ChosenShapes) -> DynamicShapes | None:
    """Return the user's choice as names of dimensions; none at all when the captured sizes are to stay.

    Raises:
        QuantizationError: it is something else.
    """
    if given == STATIC:
        return {}
    if given is None:
        return None
    if isinstance(given, dict) and all(_are_names(names) for names in given.values()):
        return given
    raise QuantizationError(
        f"Expected `dynamic_shapes` to be {STATIC!r}, which keeps the captured sizes, or input name to dimension to "
        f"its name, such as {{'image': {{2: 'height'}}}}, but got {given!r}."
    )


def _are_names(names: object) -> bool:
    """Tell whether something maps numbers of dimensions, which YAML may hold as texts, to names."""
    return isinstance(names, dict) and all(
        str(dimension).isdecimal() and isinstance(name, str) and name.isidentifier() and not iskeyword(name)
        for dimension, name in names.items()
    )


def dynamic_dimensions(model: PlannedModel, chosen: DynamicShapes | None = None) -> DynamicShapes:
    """Return input name to dimension to its name for all dimensions that may vary.

    These are the samples, what differed between calls, and what the user chose; none when that is none. Where inputs
    varied in the same dimension and had the same size in it, the two share a name.

    Raises:
        QuantizationError: a chosen input or dimension does not exist.
    """
    if chosen == {}:
        return {}
    sizes = model.captured.sizes
    batch = model.batch
    result: DynamicShapes = {} if batch is None else {name: {d: BATCH} for name, d in batch.inputs.items()}
    for name, dimension in sorted(model.varying):
        result.setdefault(name, {}).setdefault(dimension, f"dim{dimension}_{sizes[name][dimension]}")
    for name, dimensions in (chosen or {}).items():
        for dimension, label in dimensions.items():
            if name not in sizes or not 0 <= int(dimension) < len(sizes[name]):
                raise QuantizationError(
                    f"Expected `dynamic_shapes` to name inputs out of {sizes}, but got {name!r}: {dimension}."
                )
            result.setdefault(name, {})[int(dimension)] = label
    return result


def only_batches(dynamic: DynamicShapes) -> bool:
    """Tell whether nothing but the number of samples may vary."""
    return all(label == BATCH for dimensions in dynamic.values() for label in dimensions.values())


def attempts(model: PlannedModel, chosen: DynamicShapes | None) -> list[DynamicShapes]:
    """Return what is tried to let vary, the most first: what the user did not ask for is given up where it must be.

    What has been refused before is not tried again.
    """
    most = dynamic_dimensions(model, chosen)
    wanted = [most]
    if model.GUESSES_SEQUENCES and chosen != {}:
        wanted.insert(0, _with_sequences(model, most))
    wanted.append(_without(most, lambda label: label != BATCH and not _is_chosen(label, chosen)))
    wanted.append(_without(most, lambda label: not _is_chosen(label, chosen)))
    refused = [dynamic for dynamic, _ in model.refused]
    distinct = [dynamic for index, dynamic in enumerate(wanted) if dynamic not in wanted[:index]]
    return [dynamic for dynamic in distinct if dynamic not in refused] or distinct[-1:]


def notes_of_sizes(model: PlannedModel) -> tuple[str, ...]:
    """Return in words which sizes, or what else of a call, the file keeps that might have varied, and why, if any."""
    if model.exported is None:
        return ()
    if model.into_only:
        how = into_how(model.plan.to_dict())
        return (f"the artifact has no program: it is loaded into the float module by {how}. Why: {model.into_only}",)
    return (*_decided(model), *_kept_sizes(model))


def _decided(model: PlannedModel) -> tuple[str, ...]:
    words = in_words(model.decided)
    if not words:
        return ()
    return (f"the file answers calls alone in which {' and '.join(words)}, and NaN to others",)


def _kept_sizes(model: PlannedModel) -> tuple[str, ...]:
    exported = model.exported or {}
    reasons = {
        (name, dimension): why
        for dynamic, why in model.refused
        for name, dimensions in dynamic.items()
        for dimension, label in dimensions.items()
        if dimension not in exported.get(name, {}) and not label.startswith("sequence")
    }
    sizes = model.captured.sizes
    if reasons:
        kept = " and ".join(f"dimension {d} of `{name}` is {sizes[name][d]}" for name, d in reasons)
        return (f"the file takes calls alone where {kept}: {next(iter(reasons.values()))}",)
    if model.batch is None and sizes and not exported:
        listed = ", ".join(f"`{name}` {shape}" for name, shape in sizes.items())
        return (f"the file takes the captured sizes alone ({listed}): the module itself runs on no part of that call",)
    return ()


def _without(dynamic: DynamicShapes, drop: Callable[[str], bool]) -> DynamicShapes:
    kept = {name: {d: label for d, label in dims.items() if not drop(label)} for name, dims in dynamic.items()}
    return {name: dimensions for name, dimensions in kept.items() if dimensions}


def _is_chosen(label: str, chosen: DynamicShapes | None) -> bool:
    return any(label == name for dimensions in (chosen or {}).values() for name in dimensions.values())


def _with_sequences(model: PlannedModel, dynamic: DynamicShapes) -> DynamicShapes:
    """Let the second dimension of integer inputs vary, too, where they are token ids and masks of sequences.

    Inputs of one length share its name, but for those of a decoder. Columns of a table are one long.
    """
    names: dict[tuple[int, bool], str] = {}
    result = {name: dict(dimensions) for name, dimensions in dynamic.items()}
    for name, tensor in zip(model.spec.names, model.tensors, strict=True):
        is_sequence = tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] > 1
        if is_sequence and 1 not in result.get(name, {}):
            key = (tensor.shape[1], name.startswith("decoder"))
            label = names.setdefault(key, "sequence" if not names else f"sequence_{len(names)}")
            result.setdefault(name, {})[1] = label
    return result
