"""Every spelling of a layer becomes a kernel of PyTorch's."""

from pathlib import Path

import pytest
import torch
from residual_nets import IMAGE
from static_programs import ready
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.calls.calls import flatten_call
from lightning_quant.errors import ExportError
from lightning_quant.export.export import export
from lightning_quant.simulate.parity import check_parity

runtime = runtimes.get("torch")


ENGINES = runtime.engines()


class Spellings(nn.Module):
    """What the lowering has patterns for, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(3, 8, 4, padding="same")
        self.valid = nn.Conv2d(8, 8, 3, padding="valid", dilation=2)
        self.padded = nn.Conv2d(8, 8, 3, stride=2)
        self.leaky = nn.LeakyReLU(0.1)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.even(image))
        x = self.leaky(self.valid(x))
        x = self.padded(nn.functional.pad(x, (0, 1, 1, 0)))
        x = torch.cat([x, x * x], 1)[:, :8]
        y = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head((y[:, :1] + y).view(x.shape[0], -1))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_every_spelling_becomes_a_kernel(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    prepared = ready(Spellings().eval())
    artifact = export(prepared, tmp_path / "artifact", engine=ENGINES[0])
    operators = prepared.plan.graphs[0].operators
    counts = runtime.count_operators(artifact.model_path)

    kinds = {operator.kind for operator in operators}
    assert kinds == {"conv2d", "linear", "leaky_relu", "cat", "mul", "add"}
    assert runtime.still_float(operators, counts) == {}
    # The slice, which keeps its own range, is all that goes through float.
    assert counts["aten.dequantize.self"] <= 3
    _, tensors = flatten_call(prepared.signature, (IMAGE,), {})
    parity = check_parity(prepared, load(artifact.path), runtime, artifact.model_path, tensors)
    assert parity.failures == []
    assert "resized" not in capfd.readouterr().err


def test_both_operands_of_a_sum_may_be_broadcast(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).reshape(-1, 1, 4, 6) + self.second(x).reshape(-1, 4, 1, 6))

    torch.manual_seed(0)
    prepared = ready(Pairs().eval(), torch.randn(3, 4, 8))
    artifact = export(prepared, tmp_path / "artifact")
    assert prepared.parity(load(artifact.path), artifact.model_path).failures == []
    assert "resized" not in capfd.readouterr().err


# As operators in other languages are: nothing tells what it computes.
_LIBRARY = torch.library.Library("lightning_quant_tests", "FRAGMENT")
_LIBRARY.define("double(Tensor x) -> Tensor")
_LIBRARY.impl("double", lambda x: 2 * x, "CPU")
torch.library.register_fake("lightning_quant_tests::double", torch.empty_like, lib=_LIBRARY)


def test_operators_of_others_are_refused_at_export(tmp_path: Path) -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.lightning_quant_tests.double(self.net(x))

    with pytest.raises(ExportError, match=r"own operators that only compute, but it calls .*double"):
        export(ready(Decodes().eval(), torch.randn(3, 6)), tmp_path / "artifact")
