"""What works where no graph and no program can be made: a part of the module, or layers alone inside it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_quant import runtimes
from lightning_quant.errors import ExportError, FixedSizesError, UntraceableError
from lightning_quant.recipe.recipe import AnyRecipe

_INSIDE = (
    "Or quantize layers alone, inside your own module, which needs neither graph nor program: recipe 'int8_dynamic' or "
    "'int8_weight_only' with `runtime=\"torch\"`."
)


def fills_modules(recipe: AnyRecipe, runtime: str) -> bool:
    """Tell whether an artifact may be layers and tensors alone, for a module of the user's to be filled with."""
    is_known = runtime in runtimes.names()
    return is_known and not recipe.needs_calibration and runtimes.get(runtime).FILLS_MODULES


@contextmanager
def way_inside(recipe: AnyRecipe, runtime: str, part: Callable[[], str]) -> Iterator[None]:
    """Add to what refuses to trace or export a module, or its calls, what can be quantized nevertheless.

    Args:
        recipe: that is asked for.
        runtime: likewise.
        part: says which part of the module works; nothing where none is known to.
    """
    try:
        yield
    except (ExportError, FixedSizesError, UntraceableError) as error:
        if fills_modules(recipe, runtime):
            raise
        # Sizes that are fixed may be so in the part, too, which one call does not tell.
        works = "" if isinstance(error, FixedSizesError) else _said_by(part)
        raise type(error)(" ".join(filter(None, (str(error), works, _INSIDE)))) from error


def _said_by(part: Callable[[], str]) -> str:
    try:
        return part()
    # What is told is why the whole is refused, whatever comes of a search for parts.
    except Exception:
        return ""
