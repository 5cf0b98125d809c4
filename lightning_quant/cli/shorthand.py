"""`--trainer.callbacks+=QuantizationAwareTraining`: LightningCLI finds classes by bare names only once they exist.

Ours exist from the import of LightningCLI on, and not from that of this package, which stays light for all others.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CLI = "lightning.pytorch.cli"
_CALLBACKS = "lightning_quant.callbacks"


def know_callbacks() -> None:
    """Define the callbacks now when LightningCLI is there already, else as soon as it is imported."""
    if _CLI in sys.modules:
        importlib.import_module(_CALLBACKS)
    else:
        sys.meta_path.insert(0, _AfterCLI())


class _AfterCLI(MetaPathFinder):
    """Finds nothing itself, but has the callbacks defined when the module of LightningCLI has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CLI:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_define(module: ModuleType) -> None:
                load(module)
                importlib.import_module(_CALLBACKS)

            spec.loader.exec_module = load_and_define  # type: ignore[method-assign]
        return spec
