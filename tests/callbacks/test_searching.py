import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import NUM_CLASSES, Classifier, ConvNet, fit, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining
from lightning_quant.callbacks import searching
from lightning_quant.callbacks.deployment import Deployment
from lightning_quant.measure.evaluate import evaluate

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class WithBadLayer(ConvNet):
    """A linear layer whose outputs have a few channels a million times too large, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.mid, self.head = nn.Linear(64, 32), nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.mid(self.features(x))))

    @torch.no_grad()
    def spoil(self) -> None:
        self.mid.bias[:4].fill_(1e6)
        self.head.weight[:, :4].zero_()


class Spoiled(Classifier):
    """Trains, and is spoiled at the end."""

    def __init__(self) -> None:
        super().__init__(WithBadLayer())

    def train_dataloader(self) -> Any:
        return DataLoader(images(64, seed=1), 8)

    def val_dataloader(self) -> Any:
        return DataLoader(images(64, seed=2), 2)

    def on_train_end(self) -> None:
        self.net.spoil()  # type: ignore[operator]


def run(callback: Any, model: LightningModule | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], **quiet, **options)
    trainer.fit(model or Spoiled())
    return trainer


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the trial with the steps of `int8_accurate`, which do not help here."""
    monkeypatch.setattr("lightning_quant.search.candidates.Candidates.accurate", lambda _: None)


def ptq(folder: Path, **arguments: Any) -> PostTrainingQuantization:
    return PostTrainingQuantization(output_dir=folder, calibration={"num_batches": 4}, **arguments)


@feature("Trainer", "limits that are searched: a validation ends where a part of its data decides", only="PTQ")
@pytest.mark.usefixtures("quick")
def test_the_layer_that_costs_accuracy_is_kept_float_and_proven_on_the_file(tmp_path: Path) -> None:
    callback = ptq(tmp_path, limits={"val_accuracy": -0.15})
    run(callback)
    report = callback.artifact.report  # type: ignore[union-attr]
    search = json.loads((tmp_path / "search.json").read_text())
    first = search["trials"][0]
    assert first["keeps_all"] is False
    # A part of the data was enough to know that, and what is exported was validated on all.
    assert first["validations"] == first["measured"]["share"] < 1
    assert report["scalars"]["quant/search_readings"] < len(search["trials"])
    # By the ranking nothing comes before it; the file may keep more, where that is smaller.
    assert "mid" in report["search"]["chosen"]["kept"]
    assert {"head": "int8_weight_only", "mid": "int8_weight_only"} in [trial["kept"] for trial in search["trials"]]
    assert report["failures"] == []
    row = next(row for row in report["metrics"] if row["name"] == "val_accuracy")
    (verdict,) = report["search"]["verdicts"]
    assert verdict["kept"]
    assert "interval" in verdict["basis"]
    assert row["float_value"] - row["artifact"] <= verdict["reached"] <= 0.15
    assert "Searched for the best size" in callback.artifact.report_path.read_text()  # type: ignore[union-attr]
    # What was tried is not tried again by a run of the same.
    tried: list[Any] = []
    with pytest.MonkeyPatch.context() as patched:
        evaluated = searching.evaluate_artifact
        patched.setattr(searching, "evaluate_artifact", lambda *a, **k: tried.append(a) or evaluated(*a, **k))
        run(ptq(tmp_path, limits={"val_accuracy": -0.15}))
    assert tried == []


@feature("Interruptions", "Ctrl-C while limits are searched: the best so far is written", only="PTQ")
@pytest.mark.usefixtures("quick")
def test_an_interrupted_search_writes_the_best_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated, number = searching.evaluate_artifact, 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        if number == 2:
            raise KeyboardInterrupt
        return evaluated(*arguments, **options)

    monkeypatch.setattr(searching, "evaluate_artifact", interrupted)
    callback = ptq(tmp_path, limits={"val_accuracy": -0.05})
    run(callback)
    report = callback.artifact.report  # type: ignore[union-attr]
    assert report["search"]["ended"] == "an interruption"
    assert any("limits FAILED: val_accuracy fell" in text for text in report["failures"])
    assert report["search"]["relaxations"][0][3] == "nothing that was tried comes nearer"


@pytest.mark.usefixtures("quick")
def test_a_missed_limit_costs_nothing_but_a_warning_and_says_what_would_keep_it(tmp_path: Path) -> None:
    callback = ptq(tmp_path, limits={"val_accuracy": -0.05, "speedup": 1000.0}, max_validations=1)
    run(callback)
    report = callback.artifact.report  # type: ignore[union-attr]
    assert report["search"]["ended"] == "its budget of validations spent, 1"
    assert [row[0] for row in report["search"]["relaxations"]] == ["val_accuracy", "speedup"]


@pytest.mark.parametrize("metric", ["val_accuracy", "jump"])
def test_a_validation_that_depends_on_its_order_is_not_cut_short(metric: str) -> None:
    class Remembering(Spoiled):
        """Logs what depends on the batch before."""

        before = 0.0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            now = float(batch[0].mean())
            self.log("jump", now - self.before, batch_size=len(batch[0]))
            self.before = now

    model = Remembering()
    trainer = fit(model, max_epochs=1)
    floating = evaluate(trainer, model, "net", contributions=True)
    settings = SimpleNamespace(limit_eval_batches=None)
    callback: Any = SimpleNamespace(group=SimpleNamespace(size=1), settings=settings, path="net")
    planned: Any = SimpleNamespace(root=model.net)
    order = searching._order(callback, trainer, Deployment(model, planned, None, ()), floating, [metric])
    assert bool(order) == (metric == "val_accuracy")


def test_training_through_rounding_is_searched_with_its_own_ranges(tmp_path: Path) -> None:
    # More than rounding can keep: all steps are looked at.
    callback = QuantizationAwareTraining(output_dir=tmp_path, limits={"val_loss": 1e-12})
    run(callback)
    search = callback.artifact.report["search"]  # type: ignore[union-attr]
    assert len(search["trials"]) > 1
    assert not any(trial.get("error") for trial in search["trials"])
    assert not any(trial["keeps_all"] for trial in search["trials"][:-1])
    # At last everything in float, which is what keeps it.
    assert set(search["trials"][-1]["kept"].values()) == {"float"}
    assert len(search["trials"][-1]["kept"]) == max(len(trial["kept"]) for trial in search["trials"])


class TakesLabels(nn.Module):
    """Computes its loss itself, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ConvNet()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class WrapsLabels(Spoiled):
    def __init__(self) -> None:
        super().__init__()
        self.net = TakesLabels()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0], labels=batch[1])["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0], labels=batch[1])["loss"])

    def on_train_end(self) -> None:
        """Stay as it is."""


def test_layers_are_ranked_on_several_calls_of_training_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noted(whole: Any, calls: Any, **_: Any) -> None:
        seen.extend(calls)
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_quant.search.candidates.rank_layers", noted)
    monkeypatch.setattr("lightning_quant.search.choice.Trial.keeps", lambda *_, **__: False)
    callback = ptq(tmp_path, recipe="int8_weight_only", limits={"val_loss": 0.1})
    run(callback, WrapsLabels(), limit_val_batches=2)
    assert [args[0].shape[0] for args, _ in seen] == [8, 8]
    assert not seen[0][0][0].equal(seen[1][0][0])
    assert not any(isinstance(value, Tensor) for _, kwargs in seen for value in kwargs.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": {"val_acuracy": -0.05}}, "'val_accuracy' was probably meant"),
        ({"limits": {"val_accuracy": 0.05}}, "allow val_accuracy to rise, but it is better when higher"),
        ({"limits": {"score": 0.0}}, "whether score is better when it is higher"),
        ({"limits": {"size_ratio": 0.01}}, "its smallest file has"),
        ({"limits": {"size_ratio": 2.0}, "objective": "val_los"}, "objective. is on val_los"),
        ({"limits": {"val_accuracy": -0.05}, "evaluate": False}, "evaluate=False"),
        ({"limits": {"val_accuracy": -0.05}, "max_validations": 0}, "max_validations"),
        ({"limits": {"val_accuracy": -0.05}, "time_budget_s": 0}, "time_budget_s"),
        ({"objective": "sise"}, "'size' was probably meant"),
    ],
)
@pytest.mark.parametrize("kind", [PostTrainingQuantization, QuantizationAwareTraining])
def test_limits_that_nothing_can_keep_are_refused_before_training(
    kind: Any, arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    began: list[Trainer] = []
    model = Spoiled()
    watching = Callback()
    watching.on_train_start = lambda trainer, _: began.append(trainer)  # type: ignore[method-assign]
    model.configure_callbacks = lambda: [watching]  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match=message):
        run(kind(output_dir=tmp_path, **arguments), model)
    assert not began
    assert not list(tmp_path.iterdir())
