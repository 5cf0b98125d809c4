"""Cut short at any moment: the checkpoint loads, the folder holds one whole artifact, the module is itself again."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interrupted_runs
import pytest
import torch
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_models import (
    BATCH,
    Classifier,
    ConvNet,
    decibels,
    equal_tensors,
    images,
    make_trainer,
    seeded,
    tensors_of,
)

import lightning_quant
from lightning_quant import QuantizationAwareTraining, load

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]
X = images(BATCH, seed=9).tensors[0]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], Path]:
    """The artifact of an earlier run of each callback."""
    made: dict[Any, Path] = {}

    def of(kind: Any) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("earlier") / "artifact"
            make_trainer(kind(output_dir=made[kind], evaluate=False)).fit(seeded(seed=5))
        return made[kind]

    return of


class Interrupted:
    """A run with an artifact of an earlier one in its folder, which something ends."""

    def __init__(self, kind: Any, folder: Path, earlier: Path, ending: Callback, expected: Any) -> None:
        self.folder = Path(shutil.copytree(earlier, folder / "artifact"))
        self.old = load(self.folder)(X)
        schedule = {"schedule": {"fake_quantize": 2, "freeze_observers": 6, "unit": "steps"}}
        arguments = schedule if kind is QuantizationAwareTraining else {}
        self.callback = kind(output_dir=self.folder, **arguments)
        self.saving = ModelCheckpoint(folder / "ckpt", save_last=True, every_n_train_steps=1)
        self.module = seeded()
        self.trainer = make_trainer(self.callback, ending, self.saving, max_epochs=2, enable_checkpointing=True)
        with pytest.raises(expected) as caught:
            self.trainer.fit(self.module)
        self.error = caught.value

    def check(self, printed: str, *, result: str = "old") -> None:
        """Check all that must hold, and that the printed lines make the artifact."""
        assert not any("forward" in child.__dict__ for child in self.module.modules())
        with torch.no_grad():
            x = self.module.net.eval()(X)
            assert torch.equal(x, ConvNet.forward(self.module.net, X))
        assert torch.equal(load(self.folder)(X), self.old) == (result == "old")
        restored = Classifier.load_from_checkpoint(self.saving.last_model_path, weights_only=True, strict=True)
        lines = [line.strip() for line in printed.splitlines()]
        start = max(i for i, line in enumerate(lines) if line == "import lightning_quant as lq")
        namespace = {"lq": lightning_quant, "model": seeded(seed=9), "datamodule": None}
        for line in lines[start : start + 3]:
            exec(line.replace("datamodule)", "datamodule, accelerator='cpu')"), namespace)
        with torch.no_grad():
            assert decibels(restored.net.eval()(X), load(self.folder)(X)) > 10
        assert equal_tensors(tensors_of(namespace["model"]), tensors_of(restored))


class Raises(Callback):
    """Raises, or sends a signal, at the seventh batch."""

    def __init__(self, what: Any) -> None:
        self.what = what

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 6:
            if isinstance(self.what, signal.Signals):
                os.kill(os.getpid(), self.what)
            else:
                raise self.what


class UserError(Exception):
    pass


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        pytest.param(
            UserError("mine"), UserError, marks=feature("Interruptions", "exception in a user's hook"), id="error"
        ),
        pytest.param(KeyboardInterrupt(), SystemExit, marks=feature("Interruptions", "Ctrl-C"), id="ctrl-c"),
        pytest.param(signal.SIGTERM, BaseException, marks=feature("Interruptions", "SIGTERM"), id="sigterm"),
    ],
)
def test_interrupted_training(
    kind: Any, what: Any, expected: Any, earlier: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifact = earlier(kind)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            run = Interrupted(kind, tmp_path, artifact, Raises(what), expected)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

    assert "no artifact was made" in caplog.text
    run.check(caplog.messages[-1] if "import lightning_quant" in caplog.messages[-1] else caplog.text)


class FullDisk(Callback):
    """Lets no file grow beyond a few bytes from the end of training on."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_train_end(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [0, 5000])
@feature("Interruptions", "disk full")
def test_disk_full(kind: Any, size: int, earlier: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = earlier(kind)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with caplog.at_level("INFO", logger="lightning.pytorch"):
            run = Interrupted(kind, tmp_path, artifact, FullDisk(size), BaseException)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)

    run.check(caplog.text)


class Fails(Callback):
    """Lets a stage of the end fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.monkeypatch, self.name = monkeypatch, name

    def on_train_end(self, *_: Any) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise UserError(self.name)

        self.monkeypatch.setattr(f"lightning_quant.callbacks.finish.{self.name}", fail)


@pytest.mark.parametrize(("stage", "result"), [("export", "old"), ("_metrics", "new"), ("make_report", "new")])
@feature("Interruptions", "a stage of the export fails")
def test_failing_stage(
    kind: Any,
    stage: str,
    result: str,
    earlier: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    artifact = earlier(kind)
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="lightning.pytorch"):
        run = Interrupted(kind, tmp_path, artifact, Fails(patch, stage), UserError)

    assert ("was written" in caplog.text) == (result == "new")
    run.check(caplog.text, result=result)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "QAT",
            marks=[feature("Interruptions", "kill -9 at every stage of the export", only="QAT"), pytest.mark.slow],
        ),
        pytest.param(
            "PTQ",
            marks=[feature("Interruptions", "kill -9 at every stage of the export", only="PTQ"), pytest.mark.slow],
        ),
    ],
)
def test_killed_at_every_stage(name: str, tmp_path: Path) -> None:
    script = Path(interrupted_runs.__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), name, str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=800)
    assert ended.returncode == 0, ended.stderr[-3000:]
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    finished = outcomes.pop("finished")
    reached = [outcome for outcome in outcomes.values() if outcome["killed"]]
    results = [outcome["result"] for outcome in outcomes.values()]

    # Whatever was readable was one of the two, and once it was the new one it stayed that.
    assert len(reached) >= 9
    assert {"old", "new"} == set(results)
    assert results == sorted(results, key=["old", "new"].index)
    assert all(outcome["sum"] == finished["sum"] for outcome in outcomes.values() if outcome["result"] == "new")


def test_run_without_checkpoints_says_what_would_have_saved_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = QuantizationAwareTraining(output_dir=tmp_path)
    with caplog.at_level("INFO", logger="lightning.pytorch"), pytest.raises(UserError):
        make_trainer(callback, Raises(UserError()), max_epochs=2).fit(seeded())

    assert "ModelCheckpoint(save_last=True)" in caplog.text
    assert "import lightning_quant" not in caplog.text
