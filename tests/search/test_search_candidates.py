import pytest
import torch
from lightning_models import ConvNet

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.graph.table import Selection
from lightning_quant.recipe.recipe import RECIPES, Recipe
from lightning_quant.search import candidates
from lightning_quant.search.candidates import Candidates, recipe_of
from lightning_quant.search.choice import FLOAT, STORED, Choice


@pytest.fixture
def made() -> Candidates:
    calls = [Call((torch.randn(8, 1, 8, 8),)) for _ in range(3)]
    whole = prepare(ConvNet(), calls[0].args, observer="mse", trains=False)
    calibrate(whole, steps_of(whole, calls))
    return Candidates(whole, calls, Selection())


def test_ranges_and_corrections_are_those_of_the_whole(made: Candidates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "calibrate", lambda *_: pytest.fail("calibrated anew"))
    model = made.make(Choice((("conv2", FLOAT), ("head", STORED))))
    assert {o.name for o in model.operators.values()} == {"conv1"}
    for identity in model.ranges.edges:
        for mine, known in zip(model.ranges.parameters(identity), made.whole.ranges.parameters(identity), strict=True):
            assert torch.equal(mine, known)
    assert torch.equal(model.bias_corrections[":conv1"], made.whole.bias_corrections[":conv1"])
    assert made.make(Choice()) is made.whole


def test_changed_layers_are_calibrated_anew(made: Candidates) -> None:
    with torch.no_grad():
        recalibrated = made.make(Choice(accurate=True))
    assert recalibrated.recipe.accuracy_steps
    assert recalibrated.accuracy_steps
    assert not made.whole.accuracy_steps


def test_nothing_in_integers_is_a_candidate_where_everything_is_named(made: Candidates) -> None:
    assert not made.make(Choice(tuple((name, FLOAT) for name in made.operators()))).operators
    with pytest.raises(QuantizationError):
        made.make(Choice((("*", FLOAT),)))


def test_the_users_own_overrides_count_first() -> None:
    recipe = Recipe(name="own", overrides={"head": "int4_weights"})
    assert recipe_of(recipe, Choice((("head", FLOAT), ("conv", FLOAT)))).overrides == {
        "head": "int4_weights",
        "conv": FLOAT,
    }


def test_more_is_done_for_accuracy_where_nothing_was(made: Candidates) -> None:
    assert made.accurate() == Choice(accurate=True)
    assert Candidates(made.whole, made.calls, Selection(), trained=True).accurate() is None
    assert Candidates(made.whole, made.calls[:1], Selection()).accurate() is None
    made.whole.recipe = RECIPES["int8_accurate"]  # type: ignore[assignment]
    assert made.accurate() is None
