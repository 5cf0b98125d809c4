"""Both names of Lightning, and what importing and running a callback loads."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from features import feature
from lightning_models import BATCH, Classifier, ConvNet, decibels, images, validate_by_hand
from torch import Tensor

from lightning_quant import load

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
    pytest.mark.usefixtures("unmeasured"),
]


def module_of(namespace: Any) -> Any:
    class Plain(namespace.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = ConvNet()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)

        train_dataloader = Classifier.train_dataloader
        val_dataloader = Classifier.val_dataloader

    return Plain()


def datamodule_of(namespace: Any) -> Any:
    class Data(namespace.LightningDataModule):  # type: ignore[misc]
        train_dataloader = Classifier.train_dataloader
        val_dataloader = Classifier.val_dataloader

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 0.5, batch[1]]

    return Data()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lightning.pytorch", marks=feature("Namespaces", "lightning.pytorch")),
        pytest.param("pytorch_lightning", marks=feature("Namespaces", "pytorch_lightning")),
    ],
)
def test_trainers_of_both_names(kind: Any, name: str, tmp_path: Path) -> None:
    namespace = pytest.importorskip(name)
    module, callback = module_of(namespace), kind(output_dir=tmp_path / "artifact")
    saving = namespace.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    trainer = namespace.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    x = images(BATCH, seed=1).tensors[0]
    (row,) = callback.artifact.report["metrics"]
    by_hand = validate_by_hand(load(tmp_path / "artifact"), module.val_dataloader())

    assert type(trainer).__module__.startswith(name)
    assert row["artifact"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    with torch.no_grad():
        assert decibels(module.net.eval()(x), load(tmp_path / "artifact")(x)) > 15
    again = kind(output_dir=tmp_path / "again", evaluate=False)
    again.quantize_checkpoint(saving.last_model_path, module_of(namespace), accelerator="cpu")
    assert again.artifact.model_path.read_bytes() == callback.artifact.model_path.read_bytes()


@pytest.mark.parametrize("path", [None, "net"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("lightning.pytorch", marks=feature("Namespaces", "a LightningDataModule of lightning.pytorch")),
        pytest.param("pytorch_lightning", marks=feature("Namespaces", "a LightningDataModule of pytorch_lightning")),
    ],
)
def test_datamodules_of_both_names(kind: Any, name: str, path: str | None, tmp_path: Path) -> None:
    """The datamodule's own transfer hook halves what validation sees: one that is missed shows in the metric."""
    namespace = pytest.importorskip(name)
    module, data, callback = module_of(namespace), datamodule_of(namespace), kind(module=path, output_dir=tmp_path)
    del type(module).train_dataloader, type(module).val_dataloader
    trainer = namespace.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    halved = [(x * 0.5, y) for x, y in data.val_dataloader()]
    (row,) = callback.artifact.report["metrics"]

    assert row["artifact"] == pytest.approx(validate_by_hand(load(tmp_path), halved)["val_loss"], abs=1e-6)


def test_importing_and_making_callbacks_loads_no_runtime() -> None:
    names = ("onnx", "onnxscript", "onnxruntime", "torchao", "openvino", "executorch", "torch._dynamo", "matplotlib")
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
        "import json, warnings; import lightning.pytorch, torch.utils.data\n"
        f"before = [name for name in {names!r} if name in sys.modules]\n"
        "warnings.simplefilter('error')\n"
        "import lightning_quant as lq\n"
        "callbacks = [lq.QuantizationAwareTraining(), lq.PostTrainingQuantization()]\n"
        f"print(json.dumps([before, [name for name in {names!r} if name in sys.modules]]))"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)

    assert result.stderr == ""
    before, after = json.loads(result.stdout)
    assert after == before
    assert importlib.util.find_spec("onnxruntime") is not None
