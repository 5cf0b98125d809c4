"""What products read in few bits, and others in eight, is rounded twice, each time to a grid of its own."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import get
from lightning_quant.simulate.prepared import Prepared

# What tiny nets are compared by says that they are not smaller or faster.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Stream(nn.Module):
    """Two sums on a stream, which convolutions, one with a padding of its own and one functional, read in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.third, self.last = nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(F.pad(x, (1, 1, 1, 1))) + x
        x = F.conv2d(x, self.third.weight, self.third.bias) + x
        return self.last(x.mean((2, 3)))


class Gated(nn.Module):
    """A gate that a pool and a convolution make of what it is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.mix, self.last = (nn.Conv2d(n, 8, 1) for n in (3, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x * F.hardsigmoid(self.gate(F.adaptive_avg_pool2d(x, 1))) + self.mix(x)
        return self.last(x.relu()).mean((2, 3))


class Pooled(nn.Module):
    """A convolution that reads a sum's term by way of a pool, which shares its grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = self.second(F.max_pool2d(x, 3, 1, 1)) + x
        return self.last(x.mean((2, 3)))


def rereads(prepared: Prepared) -> dict[str, tuple[int, int]]:
    """Return the edges that are rounded twice, with the numbers of integers of both grids."""
    known = {i.lstrip(":"): prepared.ranges.grid_of(i).num_levels for i in prepared.ranges.edges}
    return {
        name.removesuffix("/read"): (known[name.removesuffix("/read")], n) for name, n in known.items() if "/" in name
    }


NETS = pytest.mark.parametrize(("net", "twice"), [(Stream, {"relu", "add"}), (Gated, {"relu"}), (Pooled, set())])


@pytest.mark.feature("activations of few bits: sums keep eight, and products round what they read of their terms anew")
@NETS
def test_products_round_what_sums_read_in_eight_bits(net: type[nn.Module], twice: set[str]) -> None:
    torch.manual_seed(0)
    model, x = net().eval(), torch.randn(4, 3, 8, 8)
    prepared = prepare(model, (x,), recipe="int4")
    assert rereads(prepared) == dict.fromkeys(twice, (256, 16))
    calibrate(prepared, steps_of(prepared, [x, x.flip(0)]))
    for own in (identity for identity in prepared.ranges.edges if identity.endswith("/read")):
        assert prepared.ranges.parameters(own) != prepared.ranges.parameters(own.removesuffix("/read"))
    check_agreement(prepared, convert(prepared), (x,), {})
    for other in ("int4_weights", {"name": "int4", "wide_ends": False}):
        assert not rereads(prepare(model, (x,), recipe=get(other)))


@pytest.mark.slow
@NETS
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_files_round_as_often(net: type[nn.Module], twice: set[str], runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, calls = net().eval(), list(torch.randn(16, 3, 8, 8).split(4))
    artifact = lq.quantize(model, "int4", runtime, calibration_data=calls, output_dir=tmp_path / "artifact", threads=1)
    assert artifact.report["parity"]["worst_share"] == 1.0
    edges = [edge["key"] for graph in artifact.manifest["plan"]["graphs"] for edge in graph["edges"]]
    assert {edge.removesuffix("/read") for edge in edges if "/" in edge} == twice
