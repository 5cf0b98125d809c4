"""What stages ask of a model whatever its recipe needs."""

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.simulate.prepared import Prepared

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 32)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        return self.layer(x) * factor


def planned(recipe: str) -> PlannedModel:
    torch.manual_seed(0)
    model = Scaled().eval()
    if recipe == "int8":
        return prepare(model, (X,), {"factor": 2.0})
    return quantize_layers(model, (X,), {"factor": 2.0}, recipe=recipe)


@pytest.mark.parametrize("recipe", ["int8", "int8_weight_only"])
def test_samples_are_those_of_the_captured_call_and_calls_bind_them(recipe: str) -> None:
    model = planned(recipe)
    (two,) = model.samples(2)

    assert (model.num_samples, model.smallest) == (6, 1)
    assert torch.equal(two, X[:2])
    args, kwargs = model.call([two])
    assert torch.equal(args[0], X[:2])
    assert kwargs["factor"] == 2.0
    assert model.plan.runtime == model.runtime.NAME
    assert (model.least_stored_share is None) == (recipe == "int8")


@pytest.mark.parametrize("recipe", ["int8", "int8_weight_only"])
def test_sizes_that_differ_from_the_captured_ones_are_remembered_and_shared(recipe: str) -> None:
    model, other = planned(recipe), planned(recipe)
    model.note_sizes((X,), {"factor": 2.0})
    assert model.varying == set()
    model.note_sizes((X[:3],), {"factor": 2.0})
    assert model.varying == {("x", 0)}

    model.exported, model.refused = {"x": {0: "batch"}}, (({}, "why"),)
    model.share_sizes(other)
    assert other.varying == {("x", 0)}
    assert (other.exported, other.refused) == (model.exported, model.refused)
    assert other.varies_in_file


def test_only_recipes_of_layers_do_without_a_program() -> None:
    with pytest.raises(ExportError, match="no exporter"):
        planned("int8").give_up_program("no exporter")
    with pytest.raises(QuantizationError, match="one with a graph, but got 'int8_weight_only'"):
        Prepared.of(planned("int8_weight_only"))
    prepared = planned("int8")
    assert Prepared.of(prepared) is prepared
