"""Samples whose prediction changed, and the operator that did it, planted."""

import functools

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import Call
from lightning_quant.errors import NoEffectWarning
from lightning_quant.export.prepare import prepare
from lightning_quant.measure.changed_predictions import (
    NUM_KEPT,
    ChangedPredictions,
    Predictions,
    alone,
    changed_predictions,
)
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared

PLAIN = Recipe(bias_correction=False, calibration_observer="min_max")


class Spoiled(nn.Module):
    """Three layers, the second with an output that nobody reads and that takes the whole grid for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.second.bias[3] += 400
            self.third.weight[:, 3] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))


def spoiled() -> tuple[Prepared, Tensor]:
    torch.manual_seed(0)
    model, x = Spoiled().eval(), torch.randn(64, 6)
    with torch.no_grad():
        # No class is the largest everywhere.
        model.third.bias -= model(x).mean(0)
    prepared = prepare(model, (x,), recipe=PLAIN, observer="min_max")
    calibrate(prepared, steps_of(prepared, [(x,)]))
    return prepared, x


class Simulated:
    """Stands in for the file: computes what it computes."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad(), self.prepared.attached("frozen"):
            return self.prepared.root(x)


def compared(prepared: Prepared, *calls: Tensor) -> Predictions:
    predictions = Predictions(functools.partial(alone, prepared))
    for x in calls:
        predictions.note_float(Call((x,)), prepared.root(x))
    for x in calls:
        predictions.note_artifact(Call((x,)), Simulated(prepared)(x))
    return predictions


def found_in(prepared: Prepared, *calls: Tensor, worst: tuple[str, ...]) -> ChangedPredictions:
    found = changed_predictions(prepared, Simulated(prepared), compared(prepared, *calls), "validation", worst=worst)
    assert found is not None
    return found


def test_the_operator_that_did_it_is_found_by_patching() -> None:
    prepared, x = spoiled()
    float_classes, classes = prepared.root(x).argmax(1), Simulated(prepared)(x).argmax(1)
    found = found_in(prepared, x[:32], x[32:], worst=("first", "second", "third"))

    assert found.num_samples == 64
    assert found.num_changed == int((float_classes != classes).sum()) > NUM_KEPT
    assert len(found.samples) == NUM_KEPT
    changed = (float_classes != classes).nonzero().flatten()[:NUM_KEPT]
    assert [sample.before for sample in found.samples] == float_classes[changed].tolist()
    assert [sample.after for sample in found.samples] == classes[changed].tolist()
    assert all(sample.margin > 0 and sample.reversed_margin >= 0 for sample in found.samples)
    assert next(iter(found.operators)) == "second"
    assert found.operators["second"] >= NUM_KEPT - 1
    # A layer that is innocent brings back none of those that the other does.
    assert found.operators.get("first", 0) < found.operators["second"]


@pytest.mark.parametrize("shown", [True, False])
def test_samples_are_shown_unless_a_reader_is_not_to_see_them(shown: bool) -> None:
    class OfImages(Spoiled):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)[:, :6])

    torch.manual_seed(0)
    model, x = OfImages().eval(), torch.randn(64, 1, 4, 4)
    with torch.no_grad():
        model.third.bias -= model(x).mean(0)
    prepared = prepare(model, (x,), recipe=PLAIN, observer="min_max")
    calibrate(prepared, steps_of(prepared, [(x,)]))
    predictions = compared(prepared, x)
    predictions.shown = shown
    changed = changed_predictions(prepared, Simulated(prepared), predictions, "validation")
    assert changed is not None
    assert changed.samples
    assert all(bool(sample.image) == shown for sample in changed.samples)


def test_nothing_is_patched_where_nothing_changed_or_the_net_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, x = spoiled()
    monkeypatch.setattr("lightning_quant.measure.changed_predictions._MULTIPLY_ADDS", 1)
    found = found_in(prepared, x, worst=("second",))
    assert found.samples
    assert (found.num_tried, found.operators) == (0, {})

    predictions = Predictions(functools.partial(alone, prepared))
    for note in (predictions.note_float, predictions.note_artifact):
        note(Call((x,)), prepared.root(x))
    same = changed_predictions(prepared, prepared.root, predictions, "validation", worst=("second",))
    assert same is not None
    assert (same.num_changed, same.samples, same.num_tried) == (0, (), 0)


@pytest.mark.parametrize("output", [torch.randn(8), torch.randn(8, 1), torch.ones(8, 3).cumsum(1), {"a": "text"}])
def test_outputs_that_are_no_predictions(output: object) -> None:
    prepared, x = spoiled()
    predictions = Predictions(functools.partial(alone, prepared))
    predictions.note_float(Call((x[:8],)), output)
    predictions.note_artifact(Call((x[:8],)), output)

    assert changed_predictions(prepared, prepared.root, predictions, "validation") is None


def test_calls_in_another_order_are_not_taken_for_changes() -> None:
    prepared, x = spoiled()
    predictions = Predictions(functools.partial(alone, prepared))
    for call in (x[:8], x[8:16], x[16:24]):
        predictions.note_float(Call((call,)), prepared.root(call))
    for call in (x[8:16], x[:8], x[16:24]):
        predictions.note_artifact(Call((call,)), prepared.root(call))

    assert (predictions.num_samples, predictions.num_changed, predictions.kept) == (8, 0, [])


@pytest.mark.parametrize(
    "odd",
    [torch.eye(4).to_sparse(), torch.empty(4, 4, device="meta"), torch.eye(4).to(torch.float8_e4m3fn)],
    ids=["sparse", "meta", "float8"],
)
def test_what_cannot_be_compared_costs_no_validation(odd: Tensor) -> None:
    model = nn.Identity()
    predictions = Predictions(lambda *_: None)

    def validate() -> None:
        with predictions.of_float(model):
            for x in (torch.eye(4), odd, torch.eye(4)):
                model(x)

    with pytest.warns(NoEffectWarning, match="not compared any further"):
        validate()
    with predictions.of_artifact(model):
        model(torch.eye(4))
        model(torch.eye(4))

    assert predictions.num_samples == 4
