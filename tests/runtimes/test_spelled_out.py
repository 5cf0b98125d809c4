"""What ONNX has no operator for is exported, and computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.runtimes._allowances import allowances
from lightning_quant.runtimes._spelled_out import BagsSpelledOut, BinsSpelledOut, SpelledOut


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


def test_inverses() -> None:
    matrices, vectors = torch.randn(2, 3, 7, 7, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    matrices[0, 0, 0, 0] = 0
    inverse = torch.linalg.inv(matrices)
    with SpelledOut():
        torch.testing.assert_close(matrices.inverse(), inverse)
        of_matrices = torch.linalg.solve(matrices, matrices[:1]), torch.linalg.solve(matrices, matrices, left=False)
        of_vectors = torch.linalg.solve(matrices, vectors), torch.linalg.solve(matrices[0, 1], vectors[0, 0])
    torch.testing.assert_close(of_matrices, (inverse @ matrices[:1], matrices @ inverse))
    torch.testing.assert_close(of_vectors[0], torch.linalg.solve(matrices, vectors))
    torch.testing.assert_close(of_vectors[1], torch.linalg.solve(matrices[0, 1], vectors[0, 0]))


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


def scattered(x: Tensor, reduce: str, **options: Any) -> Tensor:
    """Scatter rows to two of three places, in place, too."""
    index = torch.tensor([0, 2, 2, 0])[:, None].expand(4, 5)
    started = torch.full((3, 5), 7, dtype=x.dtype)
    if reduce in ("add", "multiply"):
        halves = started.scatter(0, index, 2, reduce=reduce)
        written = started.scatter(0, index, x[:1].repeat(4, 1))
        return halves + written + started.clone().scatter_(0, index, x, reduce=reduce)
    changed = started.clone()
    changed.scatter_reduce_(0, index, x, reduce=reduce, **options)
    return changed + torch.scatter_reduce(started, 0, index, x, reduce, **options)


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter:UserWarning")
@pytest.mark.parametrize("reduce", ["mean", "amax", "add", "multiply"])
@pytest.mark.parametrize("options", [{}, {"include_self": False}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_scattered_values_are_reduced(reduce: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    x = (10 * torch.randn(4, 5)).to(dtype)
    with SpelledOut():
        actual = scattered(x, reduce, **options)
    torch.testing.assert_close(actual, scattered(x, reduce, **options))


@pytest.mark.parametrize("p", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("number", [3, 40])
def test_distances(p: float, number: int) -> None:
    x, y = torch.randn(2, 4, 6).double(), torch.randn(2, number, 6).double()
    with SpelledOut():
        actual = torch.cdist(x, y, p=p)
    torch.testing.assert_close(actual, torch.cdist(x, y, p=p))


class Gathering(nn.Module):
    """Means over the edges of a graph, as graph networks write them, and distances to prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 128), nn.Linear(128, 8))
        self.prototypes = nn.Parameter(torch.randn(30, 8))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        y = self.net(x)
        means = y.new_zeros(4, 8).scatter_reduce(0, index[:, None].expand_as(y), y, "mean", include_self=False)
        return torch.cdist(means, self.prototypes)


def test_graph_networks_are_exported(tmp_path: Path) -> None:
    model, call = Gathering().eval(), (torch.randn(12, 6), torch.randint(0, 4, (12,)))
    kwargs: dict[str, Any] = {"calibration_data": [call], "output_dir": tmp_path / "artifact", "dynamic_shapes": {}}
    artifact = lq.quantize(model, "int8_weight_only", "onnxruntime", **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(lq.load(artifact.path)(*call), model(*call), atol=0.05, rtol=0.05)


MOST = {"mode": "max", "padding_idx": 3}


@pytest.mark.parametrize("options", [{}, {"padding_idx": -3}, {"include_last_offset": True}, {"mode": "max"}, MOST])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_of_flat_indices(mode: str, options: dict[str, Any]) -> None:
    table, indices, offsets = torch.randn(20, 6).double(), torch.randint(0, 20, (15,)), torch.tensor([0, 3, 3, 9, 15])
    how = {"mode": mode, **options}
    with BagsSpelledOut():
        actual = F.embedding_bag(indices, table, offsets, **how)
    torch.testing.assert_close(actual, F.embedding_bag(indices, table, offsets, **how))


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        ("int8_weight_only", "sum"),
        pytest.param("int8_weight_only", "max", marks=pytest.mark.slow),
        pytest.param("int8", "sum", marks=pytest.mark.slow),
    ],
)
def test_openvino_takes_bags_of_flat_indices(recipe: str, mode: str, tmp_path: Path) -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(100, 16, mode=mode, padding_idx=0), nn.Linear(16, 8)

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


class OfAnySize(nn.Module):
    """Pools images of any size into bins, and adds where each column lies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.rows, self.highest = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveMaxPool2d(4)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.conv(x) + torch.linspace(-1, 1, x.shape[-1])
        pooled = [
            F.adaptive_avg_pool2d(h, (7, 5)),
            self.rows(h),
            self.highest(h),
            F.interpolate(h, (6, 6), mode="area"),
        ]
        return [self.head(part) for part in (*pooled, F.avg_pool2d(h, 3, 2, ceil_mode=True), h)]


def test_bins_are_cut_as_pytorch_cuts_them() -> None:
    model, x = OfAnySize().eval(), torch.randn(2, 3, 29, 17)
    dynamic = ({2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    with torch.no_grad(), allowances(), BinsSpelledOut():
        program = torch.export.export(model, (torch.randn(2, 3, 16, 20),), dynamic_shapes=dynamic, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x))
    called = {str(node.target) for node in program.graph.nodes}
    assert not any("adaptive" in name or "linspace" in name for name in called)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_bins_of_pools_are_those_of_the_size_that_comes(runtime: str, tmp_path: Path) -> None:
    model = OfAnySize().eval()
    calls = [torch.randn(4, 3, 16, 20), torch.randn(6, 3, 24, 28)]
    loaded = lq.load(lq.quantize(model, "int8_weight_only", runtime, calibration_data=calls, output_dir=tmp_path))
    with torch.no_grad():
        for x in (calls[0], torch.randn(3, 3, 32, 44), torch.randn(2, 3, 29, 17)):
            for got, wanted in zip(loaded(x), model(x), strict=True):
                torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.usefixtures("unmeasured")
def test_inductor_takes_no_other_size_where_it_fixes_bins(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d((3, 2)), nn.Conv2d(8, 5, 1)).eval()
    calls = [torch.randn(4, 3, 16, 20), torch.randn(6, 3, 24, 28)]
    loaded = lq.load(lq.quantize(model, "int8", "inductor", calibration_data=calls, output_dir=tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded(calls[0]), model(calls[0]), atol=0.1, rtol=0.1)
    with pytest.raises(QuantizationError, match="to have shape"):
        loaded(calls[1])


def test_places_of_maxima_in_bins_and_numbers_of_bins_that_vary_are_refused() -> None:
    class Strange(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Any:
            return self.function(x)

    dynamic = ({2: torch.export.Dim.DYNAMIC},)
    for function in (
        lambda x: F.adaptive_max_pool1d(x, 3, return_indices=True),
        lambda x: F.adaptive_avg_pool1d(x, x.shape[-1] // 2),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="area"),
    ):
        with BinsSpelledOut(), pytest.raises(ValueError, match="size that may vary"):
            torch.export.export(Strange(function), (torch.randn(2, 3, 8),), dynamic_shapes=dynamic, strict=False)
