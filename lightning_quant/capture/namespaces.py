"""The two names of Lightning, `lightning.pytorch` and `pytorch_lightning`, whose classes know nothing of each other."""

import importlib
from typing import Any

_NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


def is_overridden(name: str, instance: Any) -> bool:
    """Tell whether the class of a LightningModule or LightningDataModule has a hook of its own.

    Lightning's own function of that name raises for classes of the other namespace. A hook set on the instance counts.
    """
    if name in getattr(instance, "__dict__", {}):
        return True
    owner = next((base for base in type(instance).__mro__ if name in vars(base)), None)
    return owner is not None and _namespace(owner) is None


def trainer_class(model: Any) -> Any:
    """Return the Trainer of the namespace that a LightningModule comes from: those of the other refuse it."""
    names = [_namespace(base) for base in type(model).__mro__]
    return importlib.import_module(next((name for name in names if name), _NAMESPACES[0])).Trainer


def _namespace(kind: type) -> str | None:
    return next((name for name in _NAMESPACES if f"{kind.__module__}.".startswith(f"{name}.")), None)
