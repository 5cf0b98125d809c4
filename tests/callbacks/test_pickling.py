"""Projects pickle and copy their Trainer's callbacks, and the module under training, with whatever hangs on them."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from features import feature
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_models import BATCH, Classifier, fit, images, seeded, tensors_of
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


class Saver(Callback):
    """Pickles all callbacks and the net in the middle of training, under fake quantization where there is some."""

    def __init__(self) -> None:
        self.callbacks: list[Callback] = []
        self.net: Any = None
        self.output: Any = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == 7:
            others = [callback for callback in trainer.callbacks if callback is not self]
            self.callbacks = pickle.loads(pickle.dumps(others))
            copy.deepcopy(others)
            buffer = io.BytesIO()
            torch.save(pl_module.net, buffer)
            buffer.seek(0)
            self.net = torch.load(buffer, weights_only=False)
            with torch.no_grad():
                x = images(BATCH, seed=1).tensors[0]
                self.output = pl_module.net.eval()(x), self.net.eval()(x)
            pl_module.net.train()


@feature("Checkpoints", "callbacks and the module pickled by the project, before, during and after fit")
def test_pickles_before_during_and_after_fit(kind: Any, tmp_path: Path) -> None:
    callback, saver = kind(output_dir=tmp_path / "artifact", evaluate=False), Saver()
    before = pickle.loads(pickle.dumps(callback))
    fit(seeded(), callback, saver, max_epochs=4)
    after = pickle.loads(pickle.dumps(callback))

    ours, theirs = saver.output
    assert torch.equal(ours, theirs)
    assert after.artifact.path == callback.artifact.path
    # The weights are the project's to save, once.
    assert len(pickle.dumps(callback)) < sum(tensor.nbytes for tensor in tensors_of(Classifier().net).values()) + 40_000
    for number, copied in enumerate((before, after, *[c for c in saver.callbacks if isinstance(c, kind)])):
        copied.output_dir = tmp_path / str(number)
        fit(seeded(), copied, max_epochs=4)
        assert copied.artifact.model_path.read_bytes() == callback.artifact.model_path.read_bytes()


class _Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(64, 4)
        self.kept: list[Any] = []
        self.state: dict[str, Any] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch.fx does not follow a size as a number, so that parts get graphs of their own.
        for number in range(int(x.shape[-1]) // 4 % 3):
            x = self.blocks[number](x)
        return self.head(x)


class _KeepsHistory(Classifier):
    """Keeps what has a history on itself, inside containers and objects, as metrics and attention maps do."""

    def __init__(self) -> None:
        super().__init__(_Untraceable())

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        output = self.net(batch[0])
        loss = torch.nn.functional.cross_entropy(output, batch[1])
        self.last_loss, self.net.kept, self.net.state = loss, [output, (output,)], {"maps": Box(output)}
        return loss


class Box:
    """An object of the user's that holds a tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


@feature("Modules", "tensors with a history kept on the module, in containers and objects, beside untraceable parts")
def test_history_kept_on_the_module(kind: Any, tmp_path: Path) -> None:
    callback = kind(output_dir=tmp_path, module="net")
    fit(seeded(_KeepsHistory), callback, max_epochs=4)

    assert callback.artifact.report["metrics"]
