"""Training through rounding only where quantization without it misses a limit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from features import feature
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_models import Classifier, Recorder, equal_tensors, fit, images, seeded, tensors_of
from scored_runs import trained
from torch import nn
from torch.utils.data import DataLoader

from lightning_quant import QuantizationAwareTraining
from lightning_quant.callbacks import only_if_needed, qat

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class Linears(Classifier):
    """Two linear layers, and validation in enough batches for intervals."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(images(32, seed=1), 8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(images(48, seed=2), 8)


class Phases(Callback):
    """Notes the phase of every batch."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback, self.seen = callback, list[str]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.callback.require_prepared().phase)


def training(folder: Path, allowed: float, **arguments: Any) -> tuple[QuantizationAwareTraining, Phases]:
    schedule = {"fake_quantize": 2, "freeze_observers": 9, "unit": "epochs"}
    limits = {"val_loss": allowed}
    callback = QuantizationAwareTraining(output_dir=folder, schedule=schedule, only_if_needed=limits, **arguments)
    return callback, Phases(callback)


@feature("Schedule", "`only_if_needed={...}`: rounding begins where quantization without it misses a limit", only="QAT")
def test_where_it_is_not_needed_training_is_that_of_float(tmp_path: Path) -> None:
    callback, phases = training(tmp_path, 10.0)
    model, plain = seeded(Linears), seeded(Linears)
    torch.manual_seed(1)
    fit(model, callback, phases, max_epochs=4)
    torch.manual_seed(1)
    fit(plain, max_epochs=4)
    assert equal_tensors(tensors_of(model), tensors_of(plain))
    assert set(phases.seen) == {"observe"}
    report = callback.artifact.report  # type: ignore[union-attr]
    assert any("nothing was trained through rounding, since it is not needed" in note for note in report["notes"])
    assert report["failures"] == []
    # Of the last weights, with ranges of calibration.
    row = next(row for row in report["metrics"] if row["name"] == "val_loss")
    assert row["before"] is None
    assert row["artifact"] == pytest.approx(row["simulated"], abs=1e-3)


def test_weights_of_the_trial_are_exported_where_the_last_miss_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback, _ = training(tmp_path, 10.0)
    measure, kept = only_if_needed._measure, []

    def spoiled(*arguments: Any) -> Any:
        tried = measure(*arguments)
        kept.append({n: t.clone() for n, t in tried.deployment.model.root.state_dict().items()})
        if len(kept) == 1:
            return tried
        verdict = only_if_needed.dataclasses.replace(tried.verdicts[0], kept=False)
        return only_if_needed.dataclasses.replace(tried, verdicts=(verdict,))

    monkeypatch.setattr(only_if_needed, "_measure", spoiled)
    finished: list[Any] = []
    end = qat.finish
    monkeypatch.setattr(qat, "finish", lambda *a: finished.append(a[2]) or end(*a))
    fit(seeded(Linears), callback, max_epochs=4)
    assert equal_tensors(dict(finished[0].model.root.state_dict()), kept[0])
    assert not equal_tensors(kept[0], kept[1])
    assert any("weights are those of an earlier step" in note for note in finished[0].notes)


@pytest.mark.parametrize("weights", ["last", pytest.param("best", marks=pytest.mark.slow)])
def test_where_it_is_needed_rounding_begins_and_both_weights_are_scored(weights: str, tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", monitor="val_loss", mode="min", save_top_k=1)
    # Whichever the user asked for, both are scored.
    callback, phases = training(tmp_path / "out", 1e-12, weights=weights)
    fit(seeded(Linears), callback, phases, checkpoints, max_epochs=6, enable_checkpointing=True)
    assert phases.seen == ["observe"] * 8 + ["fake_quantize"] * len(phases.seen[8:])
    assert callback.need is not None
    assert callback.need.needed
    assert callback.need.gaps
    rows = callback.artifact.report["scored_weights"]  # type: ignore[union-attr]
    assert [row["is_artifact"] for row in rows] == [True, False, False]
    names = {"weights are the last", "weights are the best", only_if_needed.WITHOUT_TRAINING}
    assert {row["weights"].split(" ones")[0] for row in rows} == names
    for row in rows:
        assert "val_loss gets worse by" in row["limits"]
        assert row["size_bytes"] > 0
    metrics = {row["name"]: row["artifact"] for row in callback.artifact.report["metrics"]}  # type: ignore[union-attr]
    assert rows[0]["metrics"]["val_loss"] == metrics["val_loss"]
    # The other files were others, and worse by the limit.
    assert all(row["metrics"]["val_loss"] >= rows[0]["metrics"]["val_loss"] for row in rows[1:])
    assert json.loads((tmp_path / "out" / "search.json").read_text())["scored_weights"] == rows


def test_weights_of_before_rounding_are_the_artifact_where_training_made_them_worse(tmp_path: Path) -> None:
    """The learning rate rises a thousandfold with the first batch that is rounded."""

    class Spoiling(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if callback.require_prepared().quantizes:
                trainer.optimizers[0].param_groups[0]["lr"] = 100.0

    callback, _ = training(tmp_path, 1e-12)
    fit(seeded(Linears), callback, Spoiling(), max_epochs=4)
    assert callback.artifact is not None
    rows = callback.artifact.report["scored_weights"]
    assert rows[0]["weights"] == only_if_needed.WITHOUT_TRAINING
    assert rows[1]["weights"].startswith("weights are the last ones")
    assert rows[1]["metrics"]["val_loss"] > 2 * rows[0]["metrics"]["val_loss"]
    metrics = {row["name"]: row["artifact"] for row in callback.artifact.report["metrics"]}
    assert rows[0]["metrics"]["val_loss"] == metrics["val_loss"]
    assert not callback.trains_rounded


def test_training_through_rounding_ends_once_the_file_keeps_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(only_if_needed.Need, "_try", lambda self, *_: vars(self).update(needed=True))
    callback, phases = training(tmp_path, 10.0)
    trainer = fit(seeded(Linears), callback, phases, max_epochs=20)
    # Compared with metrics of the trial, of which there are none here, nothing is kept.
    assert trainer.current_epoch == 20
    monkeypatch.setattr(
        only_if_needed.Need,
        "_try",
        lambda self, *_: vars(self).update(needed=True, before=only_if_needed.Metrics({"val_loss": 1.0})),
    )
    callback, phases = training(tmp_path, 10.0)
    trainer = fit(seeded(Linears), callback, phases, max_epochs=20)
    assert trainer.current_epoch == 3
    assert phases.seen[-1] == "fake_quantize"


def test_a_trial_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(only_if_needed, "calibrated", failing)
    callback, phases = training(tmp_path, 10.0)
    fit(seeded(Linears), callback, phases, max_epochs=3)
    assert phases.seen[-1] == "fake_quantize"
    assert callback.artifact is not None


class PastTheNetwork(Linears):
    """Validates layers of the network, and not the network."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = self.net[3](self.net[1](batch[0].flatten(1)).relu())
        self.log("val_loss", torch.nn.functional.cross_entropy(output, batch[1]))


def test_validation_past_the_network_costs_metrics_and_no_artifact(tmp_path: Path) -> None:
    callback, _ = training(tmp_path, 10.0)
    with pytest.warns(Warning, match="the file of the last weights could not be tried"):
        fit(seeded(PastTheNetwork), callback, max_epochs=3)
    assert callback.artifact.report["plan"]["coverage"] == 1.0


def test_a_resumed_run_knows_what_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, _ = training(tmp_path / "1", 10.0)
    trainer = fit(seeded(Linears), callback, max_epochs=3)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    tried: list[Any] = []
    monkeypatch.setattr(only_if_needed, "tried_after_training", lambda *a: tried.append(a))
    callback, phases = training(tmp_path / "2", 10.0)
    again = Trainer(
        max_epochs=4, accelerator="cpu", callbacks=[callback, phases], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    again.fit(seeded(Linears), ckpt_path=tmp_path / "three.ckpt")
    assert not tried
    assert set(phases.seen) == {"observe"}


@pytest.mark.parametrize(
    ("limits", "message"), [({"val_los": 0.1}, "'val_loss' was probably meant"), ({"val_accuracy": 0.1}, "allow")]
)
def test_limits_that_validation_does_not_tell_of_are_refused(limits: Any, message: str, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(MisconfigurationException, match=message):
        fit(Linears(), recorder, QuantizationAwareTraining(output_dir=tmp_path, only_if_needed=limits))
    assert recorder.num_batches == 0


class Tries(Callback):
    """Makes what would be exported at the end of each validation, as a look at the file does."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback, self.bits = callback, list[tuple[int, int]]()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        own = self.callback.require_prepared()
        tried: Any = only_if_needed.tried_with_ranges(self.callback, trainer, pl_module, None)  # type: ignore[arg-type]
        self.bits.append((own.ranges.more_bits, tried.model.ranges.more_bits))
        assert own.learned_steps is not None
        assert own.learned_steps.logarithms
        assert tried.model.learned_steps is not own.learned_steps


def test_files_that_are_looked_at_have_the_recipes_bits_and_move_nothing_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(only_if_needed, "_measure", lambda callback, trainer, deployment, need: deployment)
    points = {"fake_quantize": 0, "anneal_bits_until": 1, "freeze_observers": 2, "unit": "epochs"}
    weights = []
    for looks in (False, True):
        callback = QuantizationAwareTraining("int4", output_dir=tmp_path, schedule=points)  # type: ignore[arg-type]
        module, tries = seeded(Linears), Tries(callback)
        trained(module, callback, *[tries] * looks, max_epochs=2)
        weights.append(tensors_of(module))
    assert tries.bits == [(1, 0), (0, 0)]
    assert equal_tensors(*weights)
