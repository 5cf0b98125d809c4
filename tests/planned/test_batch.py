"""Where samples lie is found by running the module on parts of a call, not by sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.capture.capture import isolated_rng
from lightning_quant.planned.batch import Batch, checked_states, find_batch


class Recurrent(nn.Module):
    """Takes a state `(layers, batch, hidden)` beside its sequences."""

    def __init__(self, *, batch_first: bool = True, layers: int = 1, last: bool = False) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8, layers, batch_first=batch_first)
        self.last = last

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        y, state = self.rnn(x, hidden)
        return state[-1] if self.last else y


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def found(module: Callable[..., Any], **tensors: Tensor) -> Batch | None:
    if isinstance(module, nn.Module):
        module.eval()

    def run(given: list[Tensor]) -> list[Tensor]:
        with torch.no_grad(), isolated_rng(0):
            result = module(*given)
        return list(result) if isinstance(result, list | tuple) else [result]

    return find_batch(run, tuple(tensors), list(tensors.values()))


@pytest.mark.parametrize(
    ("module", "tensors", "inputs", "outputs"),
    [
        pytest.param(nn.Linear(8, 3), {"x": (16, 8)}, {"x": 0}, ((0, 1),), id="first"),
        pytest.param(nn.Linear(8, 3), {"x": (1, 8)}, {"x": 0}, ((0, 1),), id="one-sample"),
        pytest.param(Recurrent(), {"x": (4, 6, 8), "hidden": (1, 4, 8)}, {"x": 0, "hidden": 1}, ((0, 1),), id="state"),
        pytest.param(
            Recurrent(layers=4), {"x": (4, 6, 8), "hidden": (4, 4, 8)}, {"x": 0, "hidden": 1}, ((0, 1),),
            id="as-many-layers-as-samples",
        ),
        pytest.param(
            Recurrent(), {"x": (1, 6, 8), "hidden": (1, 1, 8)}, {"x": 0, "hidden": 1}, ((0, 1),), id="state-of-one"
        ),
        pytest.param(Recurrent(batch_first=False), {"x": (6, 4, 8)}, {"x": 1}, ((1, 1),), id="time-first"),
        pytest.param(Recurrent(batch_first=False), {"x": (4, 4, 8)}, {"x": 1}, ((1, 1),), id="as-long-as-wide"),
        pytest.param(
            Recurrent(batch_first=False, last=True), {"x": (6, 4, 8), "hidden": (1, 4, 8)},
            {"x": 1, "hidden": 1}, ((0, 1),), id="last-state",
        ),
        pytest.param(Attention(batch_first=False), {"x": (6, 4, 8)}, {"x": 1}, ((1, 1),), id="attention-time-first"),
        pytest.param(lambda x, table: x @ table, {"x": (8, 8), "table": (8, 8)}, {"x": 0}, ((0, 1),), id="constant"),
        pytest.param(lambda x: x.flatten(0, 1), {"x": (4, 3, 5)}, {"x": 0}, ((0, 3),), id="places-of-a-sample"),
        pytest.param(lambda x: (x.sum(1), x.argmax(1)), {"x": (4, 5)}, {"x": 0}, ((0, 1), (0, 1)), id="two-outputs"),
    ],
)  # fmt: skip
def test_samples_are_found(
    module: Any, tensors: dict[str, tuple[int, ...]], inputs: dict[str, int], outputs: tuple[Any, ...]
) -> None:
    torch.manual_seed(0)
    batch = found(module, **{name: torch.randn(shape) for name, shape in tensors.items()})

    assert batch is not None
    assert (dict(batch.inputs), batch.outputs, batch.independent) == (inputs, outputs, True)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(lambda x: x.view(1, -1) @ torch.ones(32, 3), (1, 4, 8), id="one-sample-alone"),
        pytest.param(lambda x: x.view(16, 2, 4).sum(2), (16, 8), id="one-size-alone"),
        pytest.param(nn.Conv2d(3, 4, 3), (3, 9, 9), id="image-without-batch"),
    ],
)
def test_modules_of_one_size_have_no_batch(module: Any, shape: tuple[int, ...]) -> None:
    assert found(module, x=torch.randn(shape)) is None


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda x: x + torch.randn_like(x), id="random"),
        pytest.param(lambda x: (x - x.mean(0)).cumsum(1).flip(1).cumsum(1), id="mixing"),
        pytest.param(lambda x: x @ x.T, id="pairs"),
    ],
)
def test_samples_that_depend_on_others_are_told(module: Any) -> None:
    batch = found(module, x=torch.randn(4, 8))

    assert batch is not None
    assert (dict(batch.inputs), batch.independent) == ({"x": 0}, False)


def test_forwards_that_squeeze_take_two_samples_at_least() -> None:
    batch = found(lambda x: (x @ torch.ones(8, 1)).squeeze(), x=torch.randn(6, 8))

    assert batch is not None
    assert batch.smallest == 2


def test_the_module_is_run_on_few_samples() -> None:
    sizes = []

    def module(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    found(module, x=torch.randn(500, 3))
    assert max(sizes) <= 4


def test_states_that_do_not_fit_a_packed_sequence_are_refused() -> None:
    """PyTorch reads beyond them, which ends the process."""
    layer = checked_states(nn.LSTM(4, 8, 2))
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    state = torch.randn(2, 2, 8)
    layer(packed, (state, state))
    with pytest.raises(ValueError, match="Expected states of shapes"):
        layer(packed, hx=(state, state[:1]))
