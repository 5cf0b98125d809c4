"""A module with the weights of a Lightning checkpoint, without a Trainer."""

import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quant.capture.namespaces import is_overridden
from lightning_quant.errors import QuantizationError
from lightning_quant.surgery.routing import resolve

# What `trainer.test(ckpt_path=...)` takes, and only the Trainer of the run can look up.
_ALIASES = ("best", "last", "hpc", "registry")
# What loading a file raises that is no checkpoint, whole or at all.
_DAMAGE = (
    *(OSError, RuntimeError, EOFError, ImportError, AttributeError, ValueError, LookupError, TypeError, AssertionError),
    *(pickle.UnpicklingError, struct.error),
)
# Ends of names of models that were exported from a module.
_EXPORTED = (".onnx", ".xml", ".pt2", ".pte", ".tflite", ".mlpackage", ".engine")


def read_checkpoint(ckpt_path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """Return what a Lightning checkpoint holds, on the CPU.

    Args:
        ckpt_path: file that a Trainer saved.
        trust: whether to load more than tensors and plain values, such as hyperparameters of any class. That runs
            code which whoever wrote the file has chosen.

    Raises:
        QuantizationError: there is no such file, it is something else, or it needs trust.
    """
    if not isinstance(ckpt_path, str | os.PathLike):
        raise QuantizationError(
            f"Expected `ckpt_path` to be the path of a Lightning checkpoint, but got a {type(ckpt_path).__name__}."
        )
    name = os.fspath(ckpt_path)
    if not Path(ckpt_path).is_file():
        hint = ": only the Trainer that wrote it knows its name" if name in _ALIASES else ""
        raise QuantizationError(
            f"Expected `ckpt_path` to be the file of a Lightning checkpoint, but {name!r} is no file{hint}."
        )
    try:
        with warnings.catch_warnings():
            # Of the version of pickle in files that no Trainer wrote.
            warnings.simplefilter("ignore")
            saved = torch.load(ckpt_path, map_location="cpu", weights_only=not trust)
    except _DAMAGE as error:
        if isinstance(error, pickle.UnpicklingError) and not trust and _is_pickled(ckpt_path):
            raise QuantizationError(
                f"Expected {name} to hold tensors and plain values alone, but it cannot be read as such"
                f"{_strange_classes(name)}. Loading more runs code of whoever wrote the file: say "
                "`trust_checkpoint=True` (`--trust` on the command line) if that was you or somebody you trust."
            ) from error
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and not _is_pickled(ckpt_path):
            said = "`torch.save` has not written it."
        if isinstance(error, ModuleNotFoundError) and error.name:
            said += f". Install the project that the checkpoint is of: it has objects of {error.name.split('.')[0]!r}."
        raise QuantizationError(
            f"Expected {name} to be a Lightning checkpoint, but it cannot be read: {said}"
        ) from error
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise QuantizationError(
            f"Expected {name} to be a Lightning checkpoint with a `state_dict`, but it holds "
            f"{sorted(map(str, saved))[:3] if isinstance(saved, dict) else type(saved).__name__}. "
            f"`trainer.save_checkpoint` writes one.{_of_state_dict(saved)}"
        )
    return saved


def check_model_and_data(model: Any, datamodule: Any, train_dataloaders: Any) -> None:
    """Make sure that a LightningModule and a LightningDataModule are what they are called, and that there is data.

    Raises:
        QuantizationError: one is something else; the message has the way out.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise QuantizationError(f"Expected `model` to be a LightningModule, with whatever weights, but got {got}.")
    if datamodule is not None and not hasattr(datamodule, "train_dataloader"):
        raise QuantizationError(
            f"Expected `datamodule` to be a LightningDataModule, but got a {type(datamodule).__name__}: loaders are "
            "`train_dataloaders=` and `val_dataloaders=`."
        )
    if datamodule is None and train_dataloaders is None and not is_overridden("train_dataloader", model):
        raise QuantizationError(
            f"Expected training data, which shows how {type(model).__name__} is called and its ranges, but got none: "
            "give a LightningDataModule (`--data` on the command line), or `train_dataloaders=`."
        )


def needs_trust(ckpt_path: str | os.PathLike[str]) -> bool:
    """Tell whether a checkpoint names classes or functions that are loaded with trust alone."""
    return bool(_strange_classes(os.fspath(ckpt_path)))


def load_weights(model: nn.Module, ckpt_path: str | os.PathLike[str], *, trust: bool = False) -> None:
    """Give a LightningModule the weights of a checkpoint; `trust` as for `read_checkpoint`.

    Raises:
        QuantizationError: there is no such file, or the weights are those of another module.
    """
    saved = read_checkpoint(ckpt_path, trust=trust)
    with weights_fit(model, os.fspath(ckpt_path)):
        model.load_state_dict(saved["state_dict"])


@contextmanager
def weights_fit(model: nn.Module, checkpoint: str) -> Iterator[None]:
    """Refuse weights that a block loads into a module and that are those of another one; `checkpoint` in words."""
    try:
        yield
    except RuntimeError as error:
        raise QuantizationError(
            f"Expected {checkpoint} to be a checkpoint of {type(model).__name__} with the same hyperparameters, but "
            f"{error}"
        ) from error


def load_module(
    ckpt_path: str | os.PathLike[str],
    lightning_module: nn.Module | type[nn.Module] | None,
    module: str | None = None,
    *,
    trust: bool = False,
) -> nn.Module:
    """Return the LightningModule of a checkpoint, or a module inside it.

    Args:
        ckpt_path: any checkpoint of it.
        lightning_module: its class, which is built from the hyperparameters that the checkpoint has saved; or an
            instance, which gets the weights.
        module: qualified name of a module inside it.
        trust: as for `read_checkpoint`.

    Raises:
        QuantizationError: there is no such file, class or module, or the weights are those of another one.
    """
    if lightning_module is None and str(ckpt_path).lower().endswith(_EXPORTED):
        raise QuantizationError(
            f"Expected the path of a Lightning checkpoint, but {os.fspath(ckpt_path)} is a model that was exported: "
            "give the module that it was made from."
        )
    kind = lightning_module if isinstance(lightning_module, type) else type(lightning_module)
    if (
        lightning_module is None
        or not issubclass(kind, nn.Module)
        or (kind is lightning_module and not hasattr(kind, "load_from_checkpoint"))
    ):
        raise QuantizationError(
            "Expected `lightning_module` to be the LightningModule of the checkpoint, its class or an instance, but "
            f"got {lightning_module!r:.60}: `quantize({os.fspath(ckpt_path)!r}, lightning_module=MyModule, ...)`."
        )
    try:
        if isinstance(lightning_module, type):
            read_checkpoint(ckpt_path, trust=trust)
            build: Any = lightning_module
            loaded = build.load_from_checkpoint(ckpt_path, map_location="cpu", weights_only=not trust)
        else:
            loaded = lightning_module
            load_weights(loaded, ckpt_path, trust=trust)
        return resolve(loaded, module or "").eval()
    except QuantizationError:
        raise
    except _DAMAGE as error:
        raise QuantizationError(
            f"Expected {os.fspath(ckpt_path)} to be a checkpoint of {lightning_module!r:.80}"
            f"{f' with a module {module!r}' if module else ''}, but {error}."
        ) from error


def _of_state_dict(saved: Any) -> str:
    """Return what to do with a state dict that was saved alone; empty where it is something else."""
    if not isinstance(saved, dict) or not saved or not all(isinstance(value, torch.Tensor) for value in saved.values()):
        return ""
    return " Of a state dict: `module.load_state_dict(torch.load(...))`, and give the module in place of the path."


def _is_pickled(ckpt_path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is what `torch.save` writes, now or in early versions; trust makes nothing else one."""
    with open(ckpt_path, "rb") as file:
        return zipfile.is_zipfile(ckpt_path) or file.read(1) == pickle.PROTO


def _strange_classes(name: str) -> str:
    """Return in words which classes and functions a checkpoint names, without loading it."""
    try:
        classes = torch.serialization.get_unsafe_globals_in_checkpoint(name)
    except _DAMAGE:  # No archive, as the Trainer writes.
        return ""
    return f": it names {', '.join(sorted(classes)[:3])}" if classes else ""
