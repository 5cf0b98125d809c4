"""What stands in a module's place while its validation is scored."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lightning_models import NUM_CLASSES, Classifier, equal_tensors, seeded, tensors_of
from scored_runs import BOTH, DELTA, TWIN, make, trained, without_scores
from torch import nn

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.base import QuantizationCallback
from lightning_quant.recipe.recipe import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


def test_before_training_learns_ranges_they_come_from_a_sample(tmp_path: Path) -> None:
    late = {"observe": 1, "fake_quantize": 2, "freeze_observers": 2, "unit": "epochs"}
    found = trained(seeded(), make(QuantizationAwareTraining, tmp_path, schedule=late), max_epochs=3)
    assert all(one[DELTA] != 0 and abs(one[DELTA]) < 0.05 for one in found)


@pytest.mark.parametrize(("until", "observe"), [(3, 0), (None, 1.5)])
def test_steps_of_the_twin_are_none_of_the_run_that_has_none_yet(
    until: int | None, observe: float, tmp_path: Path
) -> None:
    points = {"observe": observe, "fake_quantize": 2, "anneal_bits_until": until, "freeze_observers": 3}
    options: Any = {"recipe": "int4_weights", "schedule": {**points, "unit": "epochs"}}
    runs = []
    for every in (None, 1):
        module = seeded()
        metrics = trained(module, make(QuantizationAwareTraining, tmp_path, score_every=every, **options), max_epochs=3)
        runs.append((metrics, tensors_of(module)))
    assert equal_tensors(runs[0][1], runs[1][1])
    assert without_scores(runs[1][0]) == runs[0][0]
    # The grids of the run are wider until the fourth epoch, those of a file never.
    assert (runs[1][0][2][TWIN] == runs[1][0][2]["val_loss"]) == (until is None)


@pytest.mark.parametrize("recipe", ["int8_dynamic", pytest.param("int4_weight_only", marks=pytest.mark.slow)])
def test_layers_are_stored_anew_for_each_score(recipe: str, tmp_path: Path) -> None:
    callback = PostTrainingQuantization(recipe, "torch", output_dir=tmp_path, score_every=1)
    found = trained(seeded(), callback, max_epochs=2)
    assert found[0][TWIN] != found[1][TWIN]
    assert all(0 < abs(one[DELTA]) < 0.2 for one in found)


@pytest.mark.slow
def test_channels_are_aligned_as_in_the_artifact(tmp_path: Path) -> None:
    # One channel's values lie far from zero, where no activation bounds them.
    net = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, NUM_CLASSES))
    net[0].bias.data[0] = 9
    recipes = [replace(RECIPES["int8"], align_channels=aligns) for aligns in (True, False)]
    aligned, plain = (
        trained(Classifier(net, lr=0.0), make(PostTrainingQuantization, tmp_path, recipe=recipe))[0][TWIN]
        for recipe in recipes
    )
    assert aligned != plain == pytest.approx(aligned, abs=0.1)


@pytest.mark.slow
@BOTH
def test_files_are_scored_by_their_own_kernels(kind: type[QuantizationCallback], tmp_path: Path) -> None:
    one = trained(seeded(), make(kind, tmp_path, score_with="runtime"))[0]
    assert one[TWIN] == pytest.approx(trained(seeded(), make(kind, tmp_path))[0][TWIN], abs=1e-6)
    assert list(tmp_path.iterdir()) == []
