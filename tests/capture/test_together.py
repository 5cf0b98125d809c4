"""Independent modules answer their own captured calls as one."""

import torch
from torch import Tensor, nn

from lightning_quant.capture.together import PartCalls, join_parts, part, parts_of, signature_of_parts


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.inner = nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return -x


def test_parts_answer_by_name_and_the_modules_own_forward_every_other_call() -> None:
    model, x = Pair(), torch.randn(5, 3)
    calls = PartCalls({"one": ((x,), {}), "inner.0": ((), {"input": x})})
    join_parts(model)
    join_parts(model)
    answers = model(calls)

    assert torch.equal(answers["one"], model.one(x))
    assert torch.equal(answers["inner.0"], model.inner(x))
    assert torch.equal(model(x), -x)
    part(model)
    assert "forward" not in vars(model)
    part(model)


def test_a_call_of_parts_is_told_from_others() -> None:
    calls = PartCalls({"one": ((), {}), "two": ((), {})})
    assert parts_of((calls,)) == ("one", "two")
    assert parts_of(({"one": 1},)) == parts_of((calls, 1)) == ()
    assert signature_of_parts().bind(calls).args == (calls,)
