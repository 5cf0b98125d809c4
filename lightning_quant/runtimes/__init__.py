"""WHERE a quantized model runs: one file per runtime, and the file name is the runtime's name.

Each file has one object, `RUNTIME`, of a class derived from `Runtime` of `_runtime.py`, which says what a runtime must
offer and what it may.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_quant.arguments.arguments import check_threads
from lightning_quant.arguments.choice import check_choice, did_you_mean
from lightning_quant.errors import MissingRuntimeError, QuantizationError
from lightning_quant.recipe.recipe import AnyRecipe
from lightning_quant.runtimes._runtime import Runtime


def names() -> list[str]:
    """Return the names of all runtimes of this version."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def unrolls(name: str) -> bool:
    """Tell whether a runtime takes long for what has many operators or steps, whether it is installed or not."""
    return _named(name).UNROLLS


def that(capable: Callable[[Runtime], object]) -> str:
    """Return in words the runtimes that are capable of something, whether they are installed or not."""
    return in_words(name for name in names() if capable(_named(name)))


def in_words(some: Iterable[str]) -> str:
    """Return "'a', 'b' or 'c'"."""
    *others, last = [repr(name) for name in some] or [""]
    return f"{', '.join(others)} or {last}" if others else last


def check_name(name: str) -> None:
    """Make sure that `runtime=` names a runtime, or leaves the choice to "auto".

    Raises:
        QuantizationError: it does not.
    """
    check_choice("runtime", name, ["auto", *names()])


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Make sure that what `load` is given is for a runtime.

    Raises:
        QuantizationError: it knows no such option, or the number of threads is none.
    """
    known = get(name).OPTIONS
    # Where there is nothing to fill, the runtime itself says why.
    unknown = [option for option in options if option not in known and option != "into"]
    if unknown:
        raise QuantizationError(
            f"Expected options of `load` for runtime {name!r} to be out of {list(known)}, but got {unknown[0]!r}."
            f"{did_you_mean(unknown[0], known)}"
        )
    check_threads(options.get("threads"))


def check_recipe(name: str, recipe: AnyRecipe) -> None:
    """Make sure that a runtime runs the grid of a recipe's activations.

    Raises:
        QuantizationError: it does not; the message says which it runs, and who runs this one.
    """
    if not recipe.needs_calibration or recipe.activation_grid in get(name).TABLE.grids:
        return
    grid = recipe.activation_grid
    grids = get(name).TABLE.grids
    known = ", ".join(sorted(str(each) for each in grids if each.fills_type))
    known += " and fewer bits" if any(not each.fills_type for each in grids) else ""
    others = that(lambda runtime: grid in runtime.TABLE.grids)
    raise QuantizationError(
        f"Expected `recipe` {recipe.name!r} to have activations that runtime {name!r} runs ({known}), but got {grid}. "
        + (f"Use runtime {others}." if others else "No runtime runs them: use 8 or 16 bits.")
    )


def get(name: str, *, exporting: bool = False) -> Runtime:
    """Return a runtime.

    Args:
        name: of the runtime.
        exporting: whether what only exporting needs, such as a compiler, has to be there as well.

    Raises:
        QuantizationError: no runtime has that name.
        MissingRuntimeError: it is not installed here; the message carries the pip command.
    """
    check_choice("runtime", name, names())
    runtime = _named(name)
    missing = [package for package in runtime.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingRuntimeError(
            f"Expected `runtime` {name!r} to be installed, but {', '.join(missing)} is missing: "
            f"pip install {' '.join(runtime.REQUIRES)}"
        )
    if exporting:
        runtime.check_machine()
    return runtime


def _named(name: str) -> Runtime:
    runtime: Runtime = importlib.import_module(f"{__name__}.{name}").RUNTIME
    return runtime
