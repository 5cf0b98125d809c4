"""An audio spectrogram transformer, trained on tones, quantized after fit from its Lightning checkpoint.

`python examples/audio_classifier.py` needs `pip install transformers` and takes two minutes on one core.
"""

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy
from transformers import ASTConfig, ASTForAudioClassification

import lightning_quant as lq
from lightning_quant.machine.latency import measure
from lightning_quant.terminal.tables import text_table

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
EPOCHS, CLASSES, FRAMES, BANDS = 4, 8, 128, 64
OUTPUT = Path("audio_output")
QUANTIZED = (
    ("int8_dynamic", "torch"),
    ("int8_dynamic", "onnxruntime"),
    ("int8_weight_only", "onnxruntime"),
    ("int8", "onnxruntime"),
)


class AudioClassifier(LightningModule):
    """A transformers model in a LightningModule, as users write it."""

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.save_hyperparameters()
        size = {"max_length": FRAMES, "num_mel_bins": BANDS, "num_labels": CLASSES}
        self.model = ASTForAudioClassification(ASTConfig(**size, **shape))
        self.accuracy = Accuracy("multiclass", num_classes=CLASSES)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return F.cross_entropy(self.model(batch[0]).logits, batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log accuracy."""
        self.accuracy(self.model(batch[0]).logits, batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with AdamW."""
        return torch.optim.AdamW(self.parameters(), 3e-4)


def tones(num: int, seed: int) -> TensorDataset:
    """Make log spectrograms `(num, frames, bands)` of sweeps in noise; the class is the speed of the sweep."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (num,), generator=generator)
    start = BANDS * torch.rand(num, 1, 1, generator=generator)
    band = (start + (labels.view(-1, 1, 1) - CLASSES / 2) / 8 * torch.arange(FRAMES).view(1, -1, 1)) % BANDS
    energy = torch.exp(-0.5 * (torch.arange(BANDS) - band) ** 2)
    noise = 0.3 * torch.rand(num, FRAMES, BANDS, generator=generator)
    return TensorDataset((torch.log(energy + noise + 1e-3) + 2) / 2, labels)


def quantized(model: nn.Module, calls: list[dict[str, Tensor]]) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield name, module and bytes on disk of what PyTorch's own function and each recipe make of a model."""
    dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    torch.save(dynamic.state_dict(), OUTPUT / "dynamic.pt")
    yield "torch.ao quantize_dynamic", dynamic, (OUTPUT / "dynamic.pt").stat().st_size
    for recipe, runtime in QUANTIZED:
        artifact = lq.quantize(
            model, recipe, runtime, calibration_data=calls, output_dir=OUTPUT / f"{recipe}_{runtime}"
        )
        yield f"{recipe}, {runtime}", lq.load(artifact.path, threads=1), artifact.size_bytes


def main(num_train: int = 768, num_validation: int = 512) -> None:
    """Train, quantize the checkpoint and print the original and what became of it side by side."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", module="torch.ao")
    warnings.filterwarnings("ignore", message="torch.ao.quantization is deprecated")
    seed_everything(0, verbose=False)
    OUTPUT.mkdir(exist_ok=True)
    train, validation = (DataLoader(tones(n, s), 32, shuffle=s == 0) for n, s in ((num_train, 0), (num_validation, 1)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = ModelCheckpoint(folder)
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=EPOCHS, callbacks=[checkpoint], **settings)
        trainer.fit(AudioClassifier(SHAPE), train, validation)
        classifier = AudioClassifier.load_from_checkpoint(checkpoint.best_model_path).eval()
    calls = [{"input_values": spectrograms} for spectrograms, _ in train][:8]
    size = sum(parameter.nbytes for parameter in classifier.model.parameters())
    contestants = [("original", classifier.model, size), *quantized(classifier.model, calls)]

    example = {"input_values": calls[0]["input_values"][:1]}
    with torch.no_grad():
        times = measure({name: functools.partial(model, **example) for name, model, _ in contestants})
    rows = []
    for name, model, num_bytes in contestants:
        classifier.model = model
        accuracy = trainer.validate(classifier, validation, verbose=False)[0]["accuracy"]
        rows.append(
            (name, f"{num_bytes:,}", f"{num_bytes / size:.3f}", f"{accuracy:.4f}", f"{times[name].median_ms:.2f}")
        )
    print(text_table(("audio spectrogram transformer", "bytes", "ratio", "accuracy", "ms for 1"), rows))


if __name__ == "__main__":
    main()
