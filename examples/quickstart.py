"""Train a digit classifier in float, with quantization-aware training, and quantize it after training.

`python examples/quickstart.py` takes about a minute on two cores and needs no download.
"""

import logging
import time
import warnings
from pathlib import Path

import torch
from digits import DigitClassifier, Digits
from lightning.pytorch import Trainer, seed_everything

import lightning_quant as lq

EPOCHS = 12
OUTPUT = Path("quickstart_output")


def train(*callbacks: object) -> Trainer:
    """Train the same model on the same batches, with other callbacks."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(DigitClassifier(), Digits())
    return trainer


def wrong_of(accuracy: float) -> int:
    return round((1 - accuracy) * 400)


def main() -> None:
    """Train three times and print both reports and what the quantized models lose."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the fastest for batches this small
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")

    print("Training in float ...", flush=True)
    float_accuracy = train().callback_metrics["accuracy"].item()
    after = lq.PostTrainingQuantization(output_dir=OUTPUT / "ptq", threads=1)
    print("Training in float, quantizing after fit: one line more in the Trainer ...", flush=True)
    train(after)
    during = lq.QuantizationAwareTraining(output_dir=OUTPUT / "qat", threads=1)
    print("Training through rounding: another line ...", flush=True)
    train(during)

    print(f"\n{during.artifact.report_path.read_text()}")
    print("Wrong out of 400 validation images:")
    print(f"  float                                  {wrong_of(float_accuracy)}")
    for name, callback in (("post-training quantization, int8 file", after), ("quantization-aware, int8 file", during)):
        scalars = callback.artifact.report["scalars"]
        print(f"  {name:38} {wrong_of(scalars['quant/artifact/accuracy'])}")
    model = lq.load(OUTPUT / "qat", threads=1)
    print(f"\nload({str(OUTPUT / 'qat')!r}) is an nn.Module that answers {tuple(model(_some_digits()).shape)}.")
    print(f"All of it took {time.perf_counter() - started:.0f} s. The report as a page:")
    print(f"lightning-quant report {OUTPUT / 'qat'} --open")


def _some_digits() -> object:
    data = Digits()
    data.setup("validate")
    return next(iter(data.val_dataloader()))[0][:3]


if __name__ == "__main__":
    main()
