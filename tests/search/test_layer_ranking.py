import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from coarse_nets import Coarse
from features import feature
from lightning_models import Classifier, fit
from torch import Tensor, nn

from lightning_quant import PostTrainingQuantization, quantize
from lightning_quant.calls.calls import Call
from lightning_quant.graph.table import Selection
from lightning_quant.planned.layerwise import Layerwise, quantize_layers
from lightning_quant.search.candidates import candidates
from lightning_quant.search.choice import FLOAT, HALF, STORED, Choice
from lightning_quant.search.layer_ranking import bytes_of, rank_layers
from lightning_quant.search.places import places_of

# Takes four bits wherever there is a form.
FOUR_BITS = {"name": "int4_weight_only", "floor_db": -50.0}


def layerwise(model: nn.Module, recipe: Any = FOUR_BITS) -> Layerwise:
    return quantize_layers(model, (torch.randn(16, 32),), recipe=recipe)


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_the_layer_that_four_bits_do_not_hold_gets_eight_first(bad: int) -> None:
    torch.manual_seed(0)
    found = rank_layers(layerwise(Coarse(32, bad)), [Call((torch.randn(16, 32),))])
    assert found.steps()[0].kept == ((f"layers.{bad}", STORED),)
    (part,) = (part for part in found.parts if part.users == {f"layers.{bad}"})
    assert part.remaining({f"layers.{bad}": STORED}) < 0.02 * part.error


def test_prices_are_bytes_of_files_and_float16_stands_for_float() -> None:
    whole = layerwise(Coarse(32))
    found = rank_layers(whole, [Call((torch.randn(4, 32),))])
    # A row of 32 values is one group: as many scales in four bits as in eight.
    assert found.prices["layers.0", STORED] == 32 * 32 / 2
    assert found.prices["layers.0", FLOAT] == 2 * 32 * 32 - (32 * 32 / 2 + 4 * 32)
    assert found.halves == set(found.operators) == {f"layers.{i}" for i in range(4)}
    assert HALF in dict(found.steps()[-1].kept).values()
    made = candidates(whole, [], Selection()).make(Choice((("layers.0", STORED),)))
    assert bytes_of(made.layers) - bytes_of(whole.layers) == found.prices["layers.0", STORED]  # type: ignore[attr-defined]


def test_time_is_what_leaves_the_integers() -> None:
    call = [Call((torch.randn(4, 32),))]
    assert (
        rank_layers(layerwise(Coarse(32), "int8_dynamic"), call, by_time=True).prices["layers.0", FLOAT] == 16 * 32 * 32
    )
    weights = rank_layers(layerwise(Coarse(32), "int8_weight_only"), call, by_time=True)
    assert set(weights.prices.values()) == {0.0}
    # Eight bits are no safer than eight bits.
    assert {scheme for _, scheme in weights.prices} == {FLOAT}


def test_layers_that_share_a_weight_are_one_and_what_the_user_says_is_no_matter_of_a_search() -> None:
    model = Coarse(32)
    model.layers[1].weight = model.layers[0].weight
    whole = layerwise(model, {**FOUR_BITS, "overrides": {"layers.3": "int8_weight_only"}})
    assert places_of(whole.root, whole.layers, whole.plan, whole.recipe.overrides) == {
        "layers.0": ["layers.0", "layers.1"],
        "layers.2": ["layers.2"],
    }
    found = rank_layers(whole, [Call((torch.randn(4, 32),))])
    # Not all of them would follow into float16.
    assert found.halves == {"layers.2"}
    makes = candidates(whole, [], Selection())
    assert makes.accurate() is makes.all_float() is None
    for scheme, action in ((STORED, "int8 weights"), (FLOAT, "float")):
        rows = {row.name: row.action for row in makes.make(Choice((("layers.0", scheme),))).plan.rows}
        assert rows == {"layers.0": action, "layers.1": action, "layers.2": "int4 weights", "layers.3": "int8 weights"}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest, self.head = nn.Linear(64, 32), Coarse(32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(F.relu(self.first(x.flatten(1)))))


class Spoiled(Classifier):
    """Trains, is spoiled at the end, and is validated on how far it then is from itself."""

    def on_train_end(self) -> None:
        self.net.rest.spoil(2)  # type: ignore[union-attr,operator]
        # In a list, so that it is no part of the module.
        self.exact = [copy.deepcopy(self.net)]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "exact"):
            self.log("val_error", 0.0)
            return
        exact = self.exact[0](batch[0])
        self.log("val_error", (self.net(batch[0]) - exact).norm() / exact.norm())


@pytest.mark.slow
@feature("Trainer", "limits that are searched: schemes of layers by layer", only="PTQ")
@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("door", ["callback", "function"])
def test_a_search_over_four_bits_of_layers_keeps_the_limit_in_fewer_bytes_than_eight(door: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if door == "callback":
        callback = PostTrainingQuantization(FOUR_BITS, "torch", output_dir=tmp_path, limits={"val_error": 0.005})
        fit(Spoiled(Images()), callback)
        artifact: Any = callback.artifact
        bad, of_all = "rest.layers.2", 6
    else:
        model, inputs = Coarse(32), torch.randn(256, 32)
        exact = model(inputs)

        def close(module: nn.Module) -> Any:
            return {"close": ((module(inputs) - exact).norm(dim=1) < 0.3 * exact.norm(dim=1)).float()}

        how: dict[str, Any] = {"evaluate": close, "limits": {"close": -0.1}, "output_dir": tmp_path}
        artifact = quantize(model, FOUR_BITS, "torch", calibration_data=inputs.split(64), **how)
        bad, of_all = "layers.2", 4
    search = artifact.report["search"]
    assert [verdict["kept"] for verdict in search["verdicts"]] == [True]
    assert search["trials"][0]["keeps_all"] is False
    assert search["chosen"]["kept"][bad] == STORED
    assert len(search["chosen"]["kept"]) < of_all
    assert not artifact.report["failures"]
