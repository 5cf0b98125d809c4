"""Several recipes and runtimes at once: settings of each of them, with a name and a folder of its own."""

import itertools
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning_quant.artifact.folder import output_folder
from lightning_quant.doors.settings import Settings
from lightning_quant.errors import QuantizationError
from lightning_quant.recipe import recipe as recipes

Kind = TypeVar("Kind", bound=Settings)
_SEVERAL = (list, tuple)


def is_several(recipe: Any, runtime: Any) -> bool:
    """Tell whether an argument is a list, so that there is an artifact for each of its items."""
    return isinstance(recipe, _SEVERAL) or isinstance(runtime, _SEVERAL)


def several(kind: type[Kind], arguments: Mapping[str, Any]) -> dict[str, Kind]:
    """Return the settings of every recipe on every runtime, by the name of its folder below `output_dir`.

    Args:
        kind: of the settings.
        arguments: of a door; `recipe`, `runtime` or both are lists.

    Raises:
        QuantizationError: a list is empty, or an argument is wrong.
    """
    chosen = [_items(name, arguments[name]) for name in ("recipe", "runtime")]
    by_name: dict[str, Kind] = {}
    for recipe, runtime in itertools.product(*chosen):
        known = recipes.get(recipe)
        name = _free(f"{_plain(known.name)}-{_plain(str(runtime))}", by_name)
        where = None if arguments["output_dir"] is None else output_folder(arguments["output_dir"]) / name
        by_name[name] = kind.of({**arguments, "recipe": known, "runtime": runtime, "output_dir": where})
    return by_name


def _items(name: str, given: Any) -> list[Any]:
    items: list[Any] = []
    for item in given if isinstance(given, _SEVERAL) else [given]:
        if item not in items:
            items.append(item)
    if not items:
        raise QuantizationError(f"Expected `{name}` to be one or a list of several, but got an empty list.")
    return items


def _plain(name: str) -> str:
    """Return a name as folders and loggers' keys can have it."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name).strip(".") or "recipe"


def _free(name: str, taken: Mapping[str, Any]) -> str:
    others = (f"{name}-{number}" for number in itertools.count(2))
    return next(candidate for candidate in itertools.chain([name], others) if candidate not in taken)
