"""What a module is called with is recorded while a block runs."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calls import recorded_calls as module
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.errors import NoEffectWarning


class Net(nn.Module):
    def forward(self, x: Tensor, *, factor: float = 1.0) -> Tensor:
        return factor * x


def test_calls_are_copies_without_history_and_the_hook_goes_even_after_an_error() -> None:
    net, x = Net(), torch.ones(2, requires_grad=True)
    with pytest.raises(KeyError), recorded_calls(net) as calls:  # noqa: PT012
        net(x, factor=2.0)
        with torch.no_grad():
            x.fill_(5)
        raise KeyError
    net(x)
    (call,) = calls

    assert call.kwargs == {"factor": 2.0}
    assert not call.args[0].requires_grad
    assert not net._forward_pre_hooks


def test_no_more_than_were_asked_for() -> None:
    net = Net()
    with recorded_calls(net, limit=2) as calls:
        for _ in range(3):
            net(torch.ones(2))
    assert len(calls) == 2


def test_beyond_what_memory_is_for_the_first_two_are_kept_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    monkeypatch.setattr(module, "RECORDED_BYTES", 4)
    with pytest.warns(NoEffectWarning, match="see the first 2 of 5 calls"), recorded_calls(net) as calls:  # noqa: PT031
        for _ in range(5):
            net(torch.ones(2))
    assert len(calls) == 2
