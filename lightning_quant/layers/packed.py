"""Packed sequences while a module is exported: kept padded, with their lengths, since exporters cannot pack them."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_quant.layers.recurrent import is_padded, run


class _Padding:
    """What `torch.nn.utils.rnn` calls to pack and to pad: `data` stays `(batch, time, ...)`.

    In the place of `batch_sizes` is `(time, batch)`: one where a sequence goes on, zero behind its end. The last step
    has what is missing, too, so that the sum is the length also where it is a wrong one.
    """

    @staticmethod
    def _pack_padded_sequence(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        x = x if batch_first else x.transpose(0, 1)
        step = torch.arange(x.shape[1]).unsqueeze(1)
        left = (lengths.unsqueeze(0) - step).clamp(min=0)
        return x, torch.where(step < x.shape[1] - 1, left.clamp(max=1), left)

    @staticmethod
    def _pad_packed_sequence(x: Tensor, inside: Tensor, batch_first: bool, value: float, _: Any) -> tuple[Any, Tensor]:
        lengths = inside.sum(0)
        mask = inside.t().reshape(inside.shape[1], inside.shape[0], *[1] * (x.dim() - 2)) > 0
        x = torch.where(mask, x, value)
        total = sys._getframe(1).f_locals["total_length"]
        if total is None:
            longest = lengths.max().item()
            torch._check(longest >= 1)
            torch._check(longest <= x.shape[1])
            x = x[:, :longest]
        else:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, total - x.shape[1]])
        return x if batch_first else x.transpose(0, 1), lengths


@contextmanager
def kept_padded() -> Iterator[None]:
    """Let sequences be packed in name only, and float recurrences take them so."""
    with mock.patch.object(torch.nn.utils.rnn, "_VF", _Padding), _run_by_operator(_is_packed_in_name):
        yield


def recurrences_whole() -> AbstractContextManager[None]:
    """Let float recurrences over sequences run by one operator, as those whose weights are stored do.

    PyTorch's exporters write out the steps of an LSTM, GRU or RNN one by one, for the captured length and no other, and
    the one to ONNX drops projections.
    """
    return _run_by_operator(lambda input: isinstance(input, Tensor) and input.dim() == 3)


def _is_packed_in_name(input: Any) -> bool:
    return isinstance(input, PackedSequence) and is_padded(input)


@contextmanager
def _run_by_operator(takes: Callable[[Any], bool]) -> Iterator[None]:
    with ExitStack() as stack:
        for kind in (nn.LSTM, nn.GRU, nn.RNN):
            stack.enter_context(mock.patch.object(kind, "forward", _forward(kind.forward, takes)))
        yield


def _forward(original: Callable[..., Any], takes: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(layer: nn.RNNBase, input: Any, hx: Any = None) -> Any:
        if takes(input):
            return run(layer, [getattr(layer, name) for name in layer._flat_weights_names], input, hx)
        return original(layer, input, hx)

    return forward
