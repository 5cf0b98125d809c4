"""What no proxy overrides is recorded all the same, while a trace lasts."""

import builtins
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calls.calls import flatten_call, forward_signature
from lightning_quant.graph.trace import trace


def scaled(x: Tensor, factor: float) -> Tensor:
    return x / torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float) * factor)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(scaled)


class Sized(nn.Module):
    """Takes noise and numbers out of sizes, also in a scripted function, and asks for lengths and types."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y + torch.zeros(x.shape[0], 1) + max(x.shape[0] - 5, 0)
        if isinstance(y, Tensor) and torch.is_tensor(y) and type(y) is Tensor and not callable(y):
            y = y * len(y)
        return scripted(y, 2.0) + torch.tensor(x.shape[0], dtype=torch.float)


@pytest.mark.parametrize("number", [2, 7])
def test_sizes_are_read_anew_at_each_call(number: int) -> None:
    module = Sized().eval()
    spec, tensors = flatten_call(forward_signature(module.forward), (torch.randn(3, 4),), {})
    traced = trace(module, spec, tensors)
    x = torch.randn(number, 4)

    (result,) = torch.fx.Interpreter(module, graph=traced.graph).run(x)
    torch.testing.assert_close(result, module(x))


def test_all_is_given_back_even_when_a_trace_fails() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("never")

    before = (builtins.len, builtins.max, builtins.isinstance, torch.zeros, torch.is_tensor, nn.Module.__setattr__)
    spec, tensors = flatten_call(forward_signature(Failing().forward), (torch.randn(3, 4),), {})
    with pytest.raises(ValueError, match="never"):
        trace(Failing(), spec, tensors)
    after = (builtins.len, builtins.max, builtins.isinstance, torch.zeros, torch.is_tensor, nn.Module.__setattr__)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert "type" not in globals()
