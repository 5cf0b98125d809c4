"""Operators of other libraries become what they compute."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import load, quantize
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.surgery.foreign_operators import ForeignOperatorsInlined

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@torch.library.custom_op("tests_of_foreign_operators::doubled_relu", mutates_args=())
def doubled_relu(x: Tensor, factor: float) -> Tensor:
    return torch.relu(x) * factor


@doubled_relu.register_fake
def _(x: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.ops.tests_of_foreign_operators.doubled_relu(self.first(x), 2.0)
        return doubled_relu(self.second(y), 0.5)


@pytest.mark.parametrize(
    ("recipe", "runtime"), [("int8", "torch"), ("int8", "onnxruntime"), ("int8_weight_only", "torch")]
)
def test_operators_of_other_libraries_are_written_as_what_they_compute(
    recipe: str, runtime: str, tmp_path: Path
) -> None:
    model, x = Foreign().eval(), torch.randn(4, 6, 16)
    quantize(model, recipe, runtime, calibration_data=[x], output_dir=tmp_path)
    assert signal_to_noise(model(x), load(tmp_path)(x)) > 25


def test_what_is_written_in_python_is_seen_by_an_exporter() -> None:
    x = torch.randn(3, 4)
    with ForeignOperatorsInlined():
        graph = torch.fx.symbolic_trace(lambda y: doubled_relu(y, 2.0))
        inlined = doubled_relu(x, 2.0)
    assert torch.equal(inlined, torch.relu(x) * 2)
    assert "tests_of_foreign_operators" not in str(graph.graph)


def test_products_of_groups_become_the_operator_of_this_package() -> None:
    x, weight, ends = torch.randn(5, 16), torch.randn(2, 16, 8), torch.tensor([2, 5], dtype=torch.int32)
    with ForeignOperatorsInlined():
        result = torch.ops.aten._grouped_mm(x, weight, ends)
    torch.testing.assert_close(result, torch.cat([x[:2] @ weight[0], x[2:] @ weight[1]]))
