"""Whatever a user has at hand as calibration data is read as calls of the module, or refused with what to write."""

import re
import warnings
from collections import UserDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning_models import decibels
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quant import load, quantize
from lightning_quant.capture.calibration_data import NUM_BATCHES, CalibrationCalls
from lightning_quant.errors import CalibrationError, CaptureError, NoEffectWarning

X, Y = torch.randn(64, 8), torch.randint(0, 3, (64,))
Sample = namedtuple("Sample", "input label")


class Net(nn.Module):
    """A linear layer behind a forward of any signature."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.net(input)


class Bare(LightningModule):
    """Has no forward of its own: its steps call the net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()


class TakesTargets(Net):
    def forward(self, input: Tensor, targets: Tensor | None = None) -> Tensor:
        return self.net(input)


class TakesFlag(Net):
    def forward(self, input: Tensor, features: bool = False) -> Tensor:
        return self.net(input)


class TakesMask(Net):
    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.net(input if mask is None else input * mask)


class TakesTwo(Net):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a) + self.net(b)


class TakesAnything(Net):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.net(*args, **kwargs)


class TakesBatch(Net):
    def forward(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return self.net(batch["image"])
        image, _ = batch
        return self.net(image)


class Data(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.shift = 1.0

    def train_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + self.shift, batch[1]


def loader(*tensors: Tensor, batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*(tensors or (X, Y))), batch_size)


def dicts(**columns: Tensor) -> DataLoader:
    rows: Any = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return DataLoader(rows, 16)


def calls(module: nn.Module, data: Any) -> tuple[list[Any], list[str]]:
    """Return the calls, and what the warnings say of what was left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(CalibrationCalls(module, data))
    assert all(item.category is NoEffectWarning for item in caught)
    return found, [str(item.message) for item in caught]


# --- taken as it is


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(X, id="one tensor"),
        pytest.param(X.numpy().astype(np.float64), id="one array"),
        pytest.param([X], id="list"),
        pytest.param(([X],), id="list of lists"),
        pytest.param([(X.numpy(),)], id="arrays inside"),
        pytest.param({"input": X}, id="one call by name"),
        pytest.param([UserDict(input=X)], id="a mapping that is no dict"),
        pytest.param(iter([X]), id="iterator"),
        pytest.param(loader(X, batch_size=64), id="loader without labels"),
    ],
)
def test_what_holds_calls_is_read_without_a_word(data: Any) -> None:
    [(args, kwargs)], said = calls(Net(), data)
    (x,) = (*args, *kwargs.values())

    assert torch.equal(x, X)
    assert x.dtype == torch.float32
    assert said == []


def test_constants_beside_tensors_stay_what_they_are() -> None:
    [(args, _)], _ = calls(TakesFlag(), [(X, True)])
    assert args[1] is True


# --- cut to what the module takes


@pytest.mark.parametrize(
    ("module", "data", "expected", "left_out"),
    [
        (Net, loader, [X[:16]], r"left out a tensor of shape \(16,\): `forward\(input\)` takes the first item\.$"),
        (TakesTwo, lambda: loader(X, 2 * X, Y), [X[:16], 2 * X[:16]], r"shape \(16,\): .* takes the first 2 items\.$"),
        (Net, lambda: [[X, Y, "name"]], [X], r"left out a tensor of shape \(64,\), a str: "),
        (Net, lambda: dicts(input=X, label=Y), [X[:16]], r"left out 'label': no argument of `forward\(input\)`\.$"),
        (Net, lambda: [Sample(X, Y)], [X], r"left out 'label': "),
        # A switch takes no tensor, a mask of another shape does not run, and a wrapper tells nothing by its signature.
        (TakesFlag, loader, [X[:16]], r"shape \(16,\): .* takes the first item"),
        (TakesMask, loader, [X[:16]], r"shape \(16,\): .* takes the first item"),
        (TakesAnything, loader, [X[:16]], r"shape \(16,\): .* takes the first item"),
    ],
)
def test_batches_are_cut_to_what_the_module_takes(
    module: type[nn.Module], data: Callable[[], Any], expected: list[Tensor], left_out: str
) -> None:
    found, said = calls(module(), data())
    args, kwargs = found[0]

    assert [torch.equal(a, b) for a, b in zip((*args, *kwargs.values()), expected, strict=True)] == [True] * len(
        expected
    )
    assert len(said) == 1  # once, not at every batch
    assert re.search(left_out, said[0])


def test_forward_that_takes_the_batch_gets_all_of_it() -> None:
    for data in (loader(), dicts(image=X, label=Y)):
        found, said = calls(TakesBatch(), data)
        assert isinstance(found[0][0][0], list | dict)
        assert len(found[0][0][0]) == 2
        assert said == []


def test_data_module_is_set_up_and_its_hooks_run() -> None:
    found, said = calls(Net(), Data())
    assert torch.equal(found[0][0][0], X[:16] + 1)
    assert len(said) == 1


def test_loader_counts_with_as_many_batches_as_in_the_callbacks() -> None:
    for batch_size, number in ((1, NUM_BATCHES), (2, 32), (4, 16)):
        data = CalibrationCalls(Net(), loader(X, batch_size=batch_size))
        assert len(list(data)) == number
        assert any("first 32 batches" in note for note in data.notes) == (batch_size == 1)
    assert len(list(CalibrationCalls(Net(), iter(loader(X, batch_size=1))))) == 64


def test_module_of_another_precision_is_tried_as_it_will_be_quantized() -> None:
    found, _ = calls(Net().bfloat16(), loader())
    assert len(found) == 4


@pytest.mark.parametrize(("module", "given"), [(Net(), X.double()), (Net().bfloat16(), X)])
def test_data_of_another_precision_is_cast_where_the_module_needs_that(module: nn.Module, given: Tensor) -> None:
    own = next(module.parameters()).dtype
    data = CalibrationCalls(module, [given, given])
    assert [args[0].dtype for args, _ in data] == [own, own]
    assert data.notes == (f"floating-point numbers of `calibration_data` were cast to {own}, as the module is",)


class Casts(Net):
    """Takes any precision: nothing is to be taken away from it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input - 1e9).float())


def test_data_of_a_precision_that_the_module_takes_stays_as_it_is() -> None:
    data = CalibrationCalls(Casts(), [X.double()])
    assert next(iter(data))[0][0].dtype == torch.float64
    assert data.notes == ()


def test_loader_end_to_end_says_in_the_report_what_was_left_out(tmp_path: Path) -> None:
    module = Net()
    with pytest.warns(NoEffectWarning, match="left out a tensor"):
        artifact = quantize(module, calibration_data=loader(), output_dir=tmp_path, threads=1)
    assert artifact.report is not None
    assert any("left out a tensor of shape (16,)" in note for note in artifact.report["notes"])
    with torch.no_grad():
        assert decibels(module(X), load(tmp_path)(X)) > 25


# --- refused, with what to write


def test_a_later_call_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"but item 2, of \[\(4, 3\)\], fails: RuntimeError"):
        quantize(Net(), calibration_data=[X, X, torch.zeros(4, 3), X], output_dir=tmp_path)


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Net, None, "at least one call, but got None. Give a DataLoader"),
        (Net, 64, "at least one call, but got 64. Give a DataLoader, a LightningDataModule, or an iterable"),
        (Net, "train", "but got 'train'. Give a DataLoader"),
        (Net, DataLoader, "but got the class DataLoader"),
        (Net, Data, "but got the class Data"),
        (Bare, X, r"Quantize a part that has a forward: `model\.net`"),
        (Net, TensorDataset(X, Y), r"a dataset, .*: `calibration_data=DataLoader\(dataset, batch_size=32\)`"),
        (Net, [loader()], "a DataLoader is given alone, without a list"),
        (Net, {"a": loader()}, "a DataLoader is given alone, without a list"),
        (Net, [[0.5] * 8] * 4, r"a list of float\. Numbers become a tensor by `torch\.tensor\(\.\.\.\)`"),
        (Net, [[[0.5] * 8] * 4], r"a list of float\. Numbers become a tensor"),
        (Net, ["image.png"], "'image.png'"),
        (Net, [[]], "a list"),
        (
            Net,
            dicts(image=X, label=Y),
            r"must be Tensor, not dict.* `calibration_data=\(\(batch\['image'\],\) for batch",
        ),
        (
            TakesTwo,
            loader(),
            r"fails at the first: RuntimeError.* as in `calibration_data=\(\(x,\) for x, \*_ in loader",
        ),
        (TakesTargets, loader(), r"`forward\(input, targets=None\)` takes, but it runs with 1 as with 2 of the 2"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_to_write(module: type[nn.Module], data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(CalibrationCalls(module(), data))


def test_calls_that_lack_an_argument() -> None:
    for data in ([X], (X, X), {"a": X}):
        with pytest.raises(CaptureError, match=r"missing a required argument: 'b'\. Each item .* is one call"):
            list(CalibrationCalls(TakesTwo(), data))


def test_data_module_with_several_loaders() -> None:
    data = Data()
    data.train_dataloader = lambda: {"a": loader(), "b": loader()}  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="one training dataloader, but got a dict"):
        list(CalibrationCalls(Net(), data))
