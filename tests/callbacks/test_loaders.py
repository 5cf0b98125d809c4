"""Loaders of other kinds than PyTorch's: read before training, and left as they were."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from lightning_quant.callbacks.training_data import _undisturbed
from lightning_quant.errors import CaptureError


class _Cutting:
    """Cuts a tensor into batches, and is its own iterator."""

    def __init__(self) -> None:
        self.values, self.position = torch.arange(6.0), 0

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[Tensor]:
        self.position = 0
        return self

    def __next__(self) -> Tensor:
        if self.position >= 6:
            raise StopIteration
        self.position += 2
        return self.values[self.position - 2 : self.position]


class _Reading(_Cutting):
    """Reads from a stream that no copy has for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = iter(range(6))


def test_a_loader_that_counts_for_itself_is_read_from_a_copy() -> None:
    loader = _Cutting()
    next(iter(loader))
    with ExitStack() as stack:
        copied = _undisturbed(loader, stack)
        assert [batch.tolist() for batch in copied] == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    assert loader.position == 2
    assert next(loader).tolist() == [2.0, 3.0]


@pytest.mark.parametrize("loader", [_Reading(), iter(_Cutting().values), (batch for batch in range(3))])
def test_what_can_be_read_once_is_refused(loader: Iterator[Tensor]) -> None:
    with ExitStack() as stack, pytest.raises(CaptureError, match="that can be read more than once"):
        _undisturbed(loader, stack)
