"""Modules under the names that they had before they lay in rooms."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = "lightning_quant"


def find_moved() -> None:
    """Let imports by a former name find the module, with a DeprecationWarning that has its name."""
    sys.meta_path.append(_Moved())


def by_main_module(room: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a room that has the name of its main module, which once was all of it."""

    def __getattr__(name: str) -> Any:  # noqa: N807
        if not name.startswith("__") and importlib.util.find_spec(f"{room}.{name}") is None:
            main = importlib.import_module(f"{room}.{room.rpartition('.')[2]}")
            if hasattr(main, name):
                return getattr(main, name)
        raise AttributeError(f"module {room!r} has no attribute {name!r}")

    return __getattr__


class _Moved(MetaPathFinder, Loader):
    """Stands behind all other finders: what it is asked for is not where its name says."""

    def __init__(self) -> None:
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or not name.isidentifier():
            return None
        places = list(Path(__file__).parents[1].glob(f"*/{name}.py"))
        return (
            ModuleSpec(fullname, self, origin=f"{_PACKAGE}.{places[0].parent.name}.{name}")
            if len(places) == 1
            else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is {spec.origin} now.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(str(spec.origin))
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps its own description; the one by the former name has served.
        module.__spec__ = self._specs.pop(module.__spec__.name if module.__spec__ else "", module.__spec__)
