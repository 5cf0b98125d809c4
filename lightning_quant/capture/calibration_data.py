"""What a user has at hand to calibrate on, read as calls of one forward: loaders, data modules, arrays, calls."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from lightning_quant.calls.calls import Call, map_tensors
from lightning_quant.capture.batch_readings import ONE_CALL, Reading, choose_reading, way_out
from lightning_quant.errors import CalibrationError, NoEffectWarning
from lightning_quant.graph.analyze import own_signature
from lightning_quant.surgery.routing import device_of

NUM_BATCHES = 32
"""How many batches of a loader count, as in the callbacks; of an iterable of calls all do."""
_NO_CALLS = (str, bytes, bool, int, float, type(None), DataLoader)


class CalibrationCalls:
    """Calls of a module's forward, read one by one from what the user gave, on the module's device.

    Attributes:
        notes: what was left out, in words; complete once all calls are read.
    """

    def __init__(self, module: nn.Module, data: Any) -> None:
        self.module, self.signature = module, own_signature(module)
        self.notes: tuple[str, ...] = ()
        self._readings: dict[Any, Reading] = {}
        self._is_loader = isinstance(data, DataLoader) or _has_loader(data)
        self._items = _batches_of(data) if _has_loader(data) else _items_of(data)

    def __iter__(self) -> Iterator[Call]:
        items = iter(self._items)
        yield from map(self._read, itertools.islice(items, NUM_BATCHES) if self._is_loader else items)
        if self._is_loader and next(items, None) is not None:
            self.notes += (
                f"calibrated on the first {NUM_BATCHES} batches of the loader: more are those of "
                "`calibration_data=itertools.islice(loader, 100)`",
            )

    def _read(self, item: Any) -> Call:
        item = self._as_tensors(item)
        form = _form(item)
        if form not in self._readings:
            reading = choose_reading(self.module, self.signature, item, is_batch=self._is_loader)
            self._readings[form] = reading
            if reading.left_out:
                note = f"of each item of `calibration_data` left out {reading.left_out}"
                self.notes += (note,)
                warnings.warn(f"quantize: {note}.", NoEffectWarning, stacklevel=5)
            if reading.cast is not None:
                self.notes += (
                    f"floating-point numbers of `calibration_data` were cast to {reading.cast}, as the module is",
                )
        reading = self._readings[form]
        return reading.call(item) if reading.cast is None else _cast(reading.call(item), reading.cast)

    def _as_tensors(self, item: Any) -> Any:
        """Return an item with tensors in place of NumPy's arrays, which are float64 whether one wants it or not."""
        floating = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.get_default_dtype())

        def tensor(array: Any) -> Tensor:
            converted = torch.as_tensor(array)
            return converted.to(floating) if converted.dtype == torch.float64 else converted

        item = dict(item) if isinstance(item, Mapping) and not isinstance(item, dict) else item
        item = pytree.tree_map_only((np.ndarray, np.generic), tensor, item)
        _check_is_call(item)
        device = device_of(self.module)
        return map_tensors(lambda t: t.to(device), item)


def _cast(call: Call, dtype: torch.dtype) -> Call:
    return call.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _has_loader(data: Any) -> bool:
    """Tell whether data is a LightningDataModule, without an import of Lightning."""
    has_hooks = callable(getattr(data, "train_dataloader", None)) and callable(getattr(data, "setup", None))
    return has_hooks and not isinstance(data, type)


def _batches_of(datamodule: Any) -> Iterator[Any]:
    """Yield the training batches of a LightningDataModule, set up for it, through its transfer hooks."""
    datamodule.prepare_data()
    datamodule.setup("fit")
    loader = datamodule.train_dataloader()
    if not isinstance(loader, Iterable) or isinstance(loader, Mapping | list | tuple):
        raise CalibrationError(
            f"Expected `calibration_data` to have one training dataloader, but got a {type(loader).__name__}. Give the "
            "loader whose batches the module takes, or an iterable of calls."
        )
    for batch in loader:
        for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
            hook = getattr(datamodule, name, None)
            batch = batch if hook is None else hook(batch, 0)
        yield batch


def _items_of(data: Any) -> Iterable[Any]:
    """Return an iterable of calls or batches, whatever holds them."""
    if isinstance(data, type):
        raise CalibrationError(f"Expected `calibration_data` to be an object, but got the class {data.__name__}.")
    if isinstance(data, Tensor | np.ndarray | Mapping):
        return [data]
    if isinstance(data, Dataset):
        raise CalibrationError(
            "Expected `calibration_data` to yield batches, but got a dataset, which yields single samples: "
            "`calibration_data=DataLoader(dataset, batch_size=32)`."
        )
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise CalibrationError(
            f"Expected `calibration_data` to hold at least one call, but got {data!r:.60}. Give a DataLoader, a "
            f"LightningDataModule, or an iterable. {way_out()}"
        )
    return data


def _check_is_call(item: Any) -> None:
    values = pytree.tree_leaves(item)
    if values and not all(isinstance(value, _NO_CALLS) for value in values):
        return
    got = f"{item!r:.60}" if isinstance(item, str | bytes | int | float | None) else f"a {type(item).__name__}"
    inside = f" of {type(values[0]).__name__}" if values and values[0] is not item else ""
    raise CalibrationError(
        f"Expected each item of `calibration_data` to be {ONE_CALL}, but got {got}{inside}. Numbers become a tensor by "
        "`torch.tensor(...)`, and a DataLoader is given alone, without a list around it."
    )


def _form(item: Any) -> Any:
    """Return what items have in common that are read alike."""
    inside = tuple(item) if isinstance(item, Mapping) else len(item) if isinstance(item, tuple | list) else 0
    return type(item), inside
