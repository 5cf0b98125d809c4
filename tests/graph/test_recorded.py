"""What no proxy overrides is recorded all the same, while a trace lasts."""

import builtins
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_quant.calls.calls import flatten_call, forward_signature
from lightning_quant.export.prepare import prepare
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


class Numbers(nn.Module):
    """Makes Python numbers of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width = int(x.size(0)), int(x.shape[2] / 1.0), int(x.shape[3])
        assert {int: isinstance(height, int)}[type(batch)]
        y = F.avg_pool2d(self.first(x), 2).reshape(batch, 4, -1) * float(width) ** -0.5
        y = F.interpolate(y.view(batch, 4, height // 2, width // 2), size=(height, width))
        return self.last(y)


def test_numbers_made_of_sizes_are_part_of_the_graph() -> None:
    torch.manual_seed(0)
    model, x = Numbers().eval(), torch.randn(2, 3, 8, 12)
    prepared = prepare(model, (x,))
    assert list(prepared.islands) == [""]
    assert prepared.plan.coverage == 1.0
    other = torch.randn(5, 3, 10, 6)
    with torch.no_grad(), prepared.attached("observe"):
        assert model(other).shape == Numbers()(other).shape


def test_a_number_made_of_values_is_none_of_a_graph() -> None:
    class Counted(Numbers):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * int(x.max() > 0)

    assert "" not in prepare(Counted().eval(), (torch.randn(2, 3, 8, 12),)).islands
