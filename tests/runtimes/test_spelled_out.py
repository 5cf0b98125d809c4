"""What ONNX has no operator for is exported, and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.errors import ExportError
from lightning_quant.runtimes._spelled_out import BagsSpelledOut, SpelledOut


@pytest.mark.parametrize("function", [torch.slogdet, torch.linalg.slogdet, torch.logdet, torch.det, Tensor.det])
def test_determinants(function: Any) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    matrices[0, 0, 0, 0] = 0
    matrices[0, 1, :, 3] = 0
    expected = function(matrices)
    with SpelledOut():
        actual = function(matrices)
    if isinstance(expected, tuple):
        assert torch.equal(actual.logabsdet, actual[1])
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 13])
def test_products_so_far(length: int) -> None:
    x = torch.randn(2, length, 3, dtype=torch.float64)
    whole = (3 * x).to(torch.int32)
    with SpelledOut():
        of_tensor, of_function, integers = x.cumprod(1), torch.cumprod(x, dim=-2), whole.cumprod(1)
        wider = torch.cumprod(x.float(), 1, dtype=torch.float64)
    torch.testing.assert_close(of_tensor, x.cumprod(1))
    torch.testing.assert_close(of_function, x.cumprod(1))
    torch.testing.assert_close(integers, whole.cumprod(1))
    torch.testing.assert_close(wider, x.float().cumprod(1, dtype=torch.float64))


@pytest.mark.parametrize("options", [{}, {"padding_idx": -3}, {"include_last_offset": True}, {"mode": "max"}])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_flat_indices(mode: str, options: dict[str, Any]) -> None:
    table, indices, offsets = torch.randn(20, 6).double(), torch.randint(0, 20, (15,)), torch.tensor([0, 3, 3, 9, 15])
    how = {"mode": mode, **options}
    with BagsSpelledOut():
        actual = F.embedding_bag(indices, table, offsets, **how)
    torch.testing.assert_close(actual, F.embedding_bag(indices, table, offsets, **how))


@pytest.mark.parametrize("recipe", ["int8_weight_only", pytest.param("int8", marks=pytest.mark.slow)])
def test_openvino_takes_bags_of_flat_indices(recipe: str, tmp_path: Path) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(100, 16, mode="sum", padding_idx=0), nn.Linear(16, 8)

        def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
            return self.head(self.bag(indices, offsets))

    model, call = Bags().eval(), (torch.randint(0, 100, (12,)), torch.arange(0, 12, 3))
    kwargs: dict[str, Any] = {"calibration_data": [call], "output_dir": tmp_path / "artifact"}
    artifact = lq.quantize(model, recipe, "openvino", **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(lq.load(artifact.path)(*call), model(*call), atol=0.05, rtol=0.05)


class Flow(nn.Module):
    """An affine coupling behind a matrix, with the logarithm of the determinant, and transmittances of a ray."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.net = nn.Parameter(torch.linalg.qr(torch.randn(8, 8))[0]), nn.Linear(8, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.matrix
        density = torch.cumprod(1 - torch.sigmoid(self.net(y)), -1)
        return density, y.sum(-1) + torch.slogdet(self.matrix)[1]


@pytest.mark.parametrize("recipe", [pytest.param("int8", marks=pytest.mark.slow), "int8_weight_only"])
def test_a_flow_is_exported(recipe: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Flow().eval(), torch.randn(4, 8)
    artifact = lq.quantize(model, recipe, calibration_data=[x], output_dir=tmp_path / "artifact")
    with torch.no_grad():
        for actual, expected in zip(lq.load(artifact.path)(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.05)


def test_an_operator_without_a_form_is_refused_with_its_place(tmp_path: Path) -> None:
    class Decomposing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigh(self.net(x)).eigenvalues

    x = torch.randn(2, 4, 4)
    with pytest.raises(ExportError, match=r"eigh.*test_spelled_out.py:\d+ `return torch.linalg.eigh"):
        lq.quantize(Decomposing().eval(), "int8_weight_only", calibration_data=[x], output_dir=tmp_path)
