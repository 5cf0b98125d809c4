"""What works where no graph and no program can be made: layers alone, inside the user's own module."""

from collections.abc import Iterator
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
def way_inside(recipe: AnyRecipe, runtime: str) -> Iterator[None]:
    """Add to what refuses to trace or export a module, or its calls, that its layers can be quantized nevertheless."""
    try:
        yield
    except (ExportError, FixedSizesError, UntraceableError) as error:
        if fills_modules(recipe, runtime):
            raise
        raise type(error)(f"{error} {_INSIDE}") from error
