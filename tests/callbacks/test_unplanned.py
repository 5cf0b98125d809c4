"""Hooks and layers that come after the plan was made are refused before the first batch, or said when fit has ended."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, fit, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks.unplanned import Planned, stale
from lightning_quant.errors import CaptureError
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.prepared import Prepared

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


class Net(nn.Module):
    """Two layers and a number of Python's between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last, self.scale = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)) * self.scale)


@pytest.fixture
def model() -> Prepared:
    torch.manual_seed(0)
    return prepare(Net().eval(), (torch.randn(5, 6),))


def doubles(*given: Any) -> Any:
    return given[-1] * 2


def doubles_input(*given: Any) -> Any:
    return (given[-1][0] * 2,)


CHANGES: dict[str, Any] = {
    "hook": lambda net: net.first.register_forward_hook(doubles),
    "hook before": lambda net: net.last.register_forward_pre_hook(doubles_input),
    "layer": lambda net: setattr(net, "act", nn.GELU()),
}
HARMLESS: dict[str, Any] = {
    "nothing": lambda net: None,
    "looks on": lambda net: net.first.register_forward_hook(lambda *_: None),
    "weight norm": lambda net: parametrizations.weight_norm(net.first),
    "masks": lambda net: prune.l1_unstructured(net.first, "weight", 0.5),
    "another child": lambda net: net.add_module("metric", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_answers_is_refused_and_said(change: Any, model: Prepared) -> None:
    planned = Planned(model.root)
    planned.check_once(model, model.root)
    change(model.root)

    planned.check_once(model, model.root)
    assert "parity FAILED: '" in planned.failure(model)
    other = Planned(Net())
    with pytest.raises(CaptureError, match="got other hooks or layers since fit began"):
        other.check_once(model, model.root)


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_none_is_taken(change: Any, model: Prepared) -> None:
    planned = Planned(model.root)
    change(model.root)

    planned.check_once(model, model.root)
    assert planned.failure(model) == ""


def test_a_number_that_training_changed_is_not_that_of_its_graphs(model: Prepared) -> None:
    assert not stale(model)
    model.root.scale = 2.0
    assert stale(model)


class Hooked(Classifier):
    """Doubles what its first convolution makes, from the start of training on."""

    def on_train_start(self) -> None:
        self.net.conv1.register_forward_hook(doubles)


@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_a_fit_refuses_them_before_its_first_batch(kind: Any, tmp_path: Path) -> None:
    module = seeded(Hooked)
    before = module.net.head.weight.clone()
    with pytest.raises(MisconfigurationException, match="'conv1' got other hooks or layers since fit began"):
        fit(module, kind(output_dir=tmp_path, evaluate=False), max_epochs=1)

    assert torch.equal(module.net.head.weight, before)
    assert not list(tmp_path.iterdir())


class Anneals(Classifier):
    """Its net reads a number that every epoch changes."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), Sized()))

    def on_train_epoch_start(self) -> None:
        self.net[1].scale = 1.0 + self.current_epoch


class Sized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 4)


def test_training_through_rounding_says_that_a_number_changed(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path, threads=1)
    fit(seeded(Anneals), callback, max_epochs=2)

    assert "has to be a buffer" in callback.artifact.report["failures"][0]  # type: ignore[union-attr]
