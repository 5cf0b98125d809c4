"""Checkpoints are plain float checkpoints, and a run that was interrupted ends like one that was not."""

import inspect
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import (
    BATCH,
    NUM_BATCHES,
    NUM_TRAIN,
    Classifier,
    EnoughError,
    StopAfterTraining,
    equal_tensors,
    fit,
    images,
    make_trainer,
    seeded,
    tensors_of,
)

from lightning_quant import PostTrainingQuantization, QuantizationAwareTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]

EPOCHS = 3
# In training batches, of which there are 12; every phase begins inside an epoch.
SCHEDULE = {"observe": 1, "fake_quantize": 3, "freeze_observers": 9, "freeze_batch_norm": 11, "unit": "steps"}


class StatefulLoader:
    """Knows where it stands: what it takes to resume inside an epoch."""

    def __init__(self) -> None:
        self.data = images(NUM_TRAIN, seed=1)
        self.position, self.resumed = 0, False

    def __len__(self) -> int:
        return NUM_BATCHES

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.position = 0
        self.resumed = False
        while self.position < NUM_BATCHES:
            self.position += 1
            yield self.data[(self.position - 1) * BATCH : self.position * BATCH]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position, self.resumed = state["position"], True


class WithStatefulLoader(Classifier):
    def train_dataloader(self) -> Any:
        return StatefulLoader()


class KeepState(Callback):
    """Keeps the state that checkpoints get, as training ended with it."""

    def __init__(self, callback: QuantizationAwareTraining) -> None:
        self.callback = callback

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = self.callback.state_dict()


class Run:
    """One run, resumed from a checkpoint when one is given."""

    def __init__(
        self, folder: Path, make: type[LightningModule], kind: Any, every: int, checkpoint: Path | None = None
    ) -> None:
        saving = ModelCheckpoint(folder / "ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=every)
        callbacks: list[Any] = [saving]
        if kind is not None:
            # The same name for interrupted and uninterrupted runs: it is part of the state's key.
            callback = kind(output_dir="artifact", evaluate=False, **arguments_of(kind))
            callback.folder = lambda _: folder / "artifact"
            keep = KeepState(callback)
            callbacks = [callback, keep, saving]
        # Resumed runs begin with other weights: all must come from the checkpoint.
        self.module = seeded(make, seed=0 if checkpoint is None else 1)
        self.trainer = make_trainer(*callbacks, max_epochs=EPOCHS, enable_checkpointing=True)
        self.trainer.fit(self.module, ckpt_path=checkpoint)
        self.tensors = tensors_of(self.module)
        self.state = None if kind is None else keep.state
        self.file = None if kind is None else callback.artifact.model_path.read_bytes()


def arguments_of(kind: Any) -> dict[str, Any]:
    return {"schedule": SCHEDULE} if kind is QuantizationAwareTraining else {}


def equal_states(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal_states(first[key], second[key]) for key in first)
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(
    ("make", "every", "step"),
    [
        pytest.param(Classifier, NUM_BATCHES, 4, marks=feature("Checkpoints", "resume at an epoch's end")),
        pytest.param(
            WithStatefulLoader,
            1,
            6,
            marks=feature("Checkpoints", "resume inside an epoch", note="with a stateful loader"),
        ),
    ],
)
def test_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    kind: Any, make: type[LightningModule], every: int, step: int, tmp_path: Path
) -> None:
    for callback in (None, kind):
        folder = tmp_path / str(callback)
        whole = Run(folder / "whole", make, callback, every)
        resumed = Run(folder / "resumed", make, callback, every, folder / "whole" / "ckpt" / f"step={step}.ckpt")

        assert equal_tensors(whole.tensors, resumed.tensors)
        assert equal_states(whole.state, resumed.state)
        assert whole.file == resumed.file
        assert resumed.trainer.global_step == whole.trainer.global_step == EPOCHS * NUM_BATCHES


def test_reading_a_batch_ahead_would_spoil_a_stateful_loader() -> None:
    loader = StatefulLoader()
    loader.load_state_dict({"position": 2})
    next(iter(loader))

    assert loader.state_dict() != {"position": 2}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
@feature("Checkpoints", "resume a quantization-aware run without the callback", only="QAT")
def test_resumed_without_the_callback_it_goes_on_in_float(tmp_path: Path) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path / "artifact", schedule=SCHEDULE, evaluate=False)
    saving = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1)
    with pytest.raises(EnoughError):
        fit(seeded(), callback, saving, StopAfterTraining(), max_epochs=2, enable_checkpointing=True)
    plain = torch.load(tmp_path / "ckpt" / "epoch=1.ckpt", weights_only=True)
    del plain["callbacks"][callback.state_key]
    torch.save(plain, tmp_path / "plain.ckpt")
    results = []
    for checkpoint in (tmp_path / "ckpt" / "epoch=1.ckpt", tmp_path / "plain.ckpt"):
        module = seeded(seed=1)
        make_trainer(max_epochs=EPOCHS).fit(module, ckpt_path=checkpoint)
        results.append(tensors_of(module))

    assert equal_tensors(*results)
    assert not equal_tensors(results[0], plain["state_dict"])


@feature("Checkpoints", "start from a checkpoint of a float run", only="QAT")
def test_started_from_a_float_checkpoint_it_observes_anew_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(seeded(), max_epochs=1).save_checkpoint(tmp_path / "float.ckpt")
    callback = QuantizationAwareTraining(
        output_dir=tmp_path / "artifact",
        schedule={"observe": 5, "fake_quantize": 6, "freeze_observers": 8, "unit": "steps"},
    )
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO), pytest.raises(EnoughError):
        make_trainer(callback, StopAfterTraining(), max_epochs=2).fit(seeded(seed=1), ckpt_path=tmp_path / "float.ckpt")

    assert any("no quantizer state, so observing begins anew" in message for message in caplog.messages)
    assert all(state["num_updates"] == 3 for state in callback.state_dict()["observers"].values())


# --- one finished run that many tests look at


class Finished:
    def __init__(self, kind: Any, folder: Path) -> None:
        self.folder = folder
        self.callback = kind(output_dir=folder / "artifact", evaluate=False)
        self.saving = ModelCheckpoint(folder / "ckpt", monitor="score", mode="max", save_last=True)
        self.module = seeded(best_epoch=1)
        self.trainer = make_trainer(self.callback, self.saving, max_epochs=2, enable_checkpointing=True)
        (self.before,) = self.trainer.validate(self.module, verbose=False)
        self.trainer.fit(self.module)
        self.after = tensors_of(self.module)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Finished]:
    made: dict[Any, Finished] = {}

    def of(kind: Any) -> Finished:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = Finished(kind, tmp_path_factory.mktemp(kind.__name__))
        return made[kind]

    return of


@feature("Checkpoints", "validate before fit, and after it")
def test_validate_around_fit(kind: Any, finished: Callable[[Any], Finished]) -> None:
    run = finished(kind)
    (after,) = run.trainer.validate(run.module, verbose=False)
    plain = seeded(best_epoch=1)
    (by_hand,) = make_trainer().validate(plain, verbose=False)

    assert run.before["val_loss"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    assert after["val_loss"] != pytest.approx(run.before["val_loss"], abs=1e-3)
    assert equal_tensors(tensors_of(run.module), run.after)


@feature("Checkpoints", 'test(ckpt_path="best") and validate(ckpt_path="last")')
def test_best_and_last_checkpoints_are_found_after_fit(kind: Any, finished: Callable[[Any], Finished]) -> None:
    run = finished(kind)
    kept = tensors_of(run.module)
    (best,) = run.trainer.validate(run.module, ckpt_path="best", verbose=False)
    (last,) = run.trainer.validate(run.module, ckpt_path="last", verbose=False)
    (tested,) = run.trainer.test(_Tested(run.module), ckpt_path="best", verbose=False)

    assert best["val_loss"] == pytest.approx(tested["test_loss"], abs=1e-6)
    assert last["val_loss"] > 0
    assert equal_tensors(tensors_of(run.module), kept)


class _Tested(Classifier):
    def __init__(self, module: Classifier) -> None:
        super().__init__(module.net)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", torch.nn.functional.cross_entropy(self.net(x), y))

    test_dataloader = Classifier.val_dataloader


@feature("Checkpoints", "load_from_checkpoint with weights_only=True and strict=True")
def test_checkpoints_hold_tensors_and_plain_values_alone(kind: Any, finished: Callable[[Any], Finished]) -> None:
    run = finished(kind)
    restored = Classifier.load_from_checkpoint(run.saving.last_model_path, weights_only=True, strict=True)

    assert equal_tensors(tensors_of(restored), run.after)
    assert list(restored.state_dict()) == list(Classifier().state_dict())


@feature("Checkpoints", "load a checkpoint where this package is not installed", only="both")
def test_checkpoints_load_without_the_package(finished: Callable[[Any], Finished]) -> None:
    paths = [finished(kind).saving.last_model_path for kind in (QuantizationAwareTraining, PostTrainingQuantization)]
    code = (
        "import sys; sys.modules['lightning_quant'] = None\n"
        f"sys.path.insert(0, {str(Path(inspect.getfile(Classifier)).parent)!r})\n"
        "from lightning_models import Classifier\n"
        f"for path in {paths!r}:\n"
        "    Classifier.load_from_checkpoint(path, weights_only=True, strict=True)\n"
        "    print('loaded')"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)

    assert result.stdout.split() == ["loaded", "loaded"], result.stderr


@feature("Checkpoints", "fit twice with one Trainer and one callback")
def test_second_fit_with_the_same_trainer_and_callback(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path, evaluate=False)
    module = seeded()
    trainer = fit(module, callback, max_epochs=1)
    first, size = callback.artifact.model_path.read_bytes(), callback.artifact.size_bytes
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module)

    assert trainer.current_epoch == 2
    assert callback.artifact.model_path.read_bytes() != first
    assert callback.artifact.size_bytes == pytest.approx(size, rel=0.05)
    assert not any("forward" in child.__dict__ for child in module.modules())
