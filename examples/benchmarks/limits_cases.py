"""Three trained nets with the limit that each is to keep: a vision net, a transformer of texts and one of sounds."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from datasets import (
    VALIDATION_IMAGES,
    calibration_indices,
    fashion_mnist,
    mobilenet_inputs,
    mobilenet_probe,
)
from minilm_spam import f1, held_out
from text_datasets import minilm_folder, sms_spam
from torch import Tensor, nn
from torchmetrics.classification import BinaryF1Score

Inputs = dict[str, Tensor]
Batches = Iterator[tuple[Inputs, Tensor]]
NUM_KEPT_TEXTS = 512


class Case(NamedTuple):
    """A float net with its data.

    Attributes:
        net: takes its inputs by name, and gives logits.
        calls: to calibrate with.
        batches: from "validation" or "test" to inputs and labels.
        evaluate: what the search asks, a function of a module.
        score: predictions, labels and weights `(resamples, samples)` to the metric in percent.
        metric: its name.
        limits: of the search.
        objective: likewise.
        nncf: settings of its own, and how many of the first sizes vary in its file.
    """

    net: nn.Module
    calls: list[Inputs]
    batches: Callable[[str], Batches]
    evaluate: Callable[[nn.Module], Any]
    score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    metric: str
    limits: dict[str, float]
    objective: str
    nncf: dict[str, Any]


def answers(model: Callable[..., Tensor], batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield predicted classes and labels, batch by batch."""
    with torch.no_grad():
        for inputs, labels in batches:
            yield model(**inputs).argmax(1), labels


def percent_right(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return accuracy in percent for weights of samples `(resamples, samples)`: `(resamples,)`."""
    return 100 * (weights @ (predicted == labels)) / weights.sum(1)


def _accuracy(batches: Callable[[str], Batches]) -> Callable[[nn.Module], Iterator[dict[str, Tensor]]]:
    def evaluate(model: nn.Module) -> Iterator[dict[str, Tensor]]:
        for predicted, labels in answers(model, batches("validation")):
            yield {"accuracy": (predicted == labels).float()}

    return evaluate


def mobilenet(num_validation: int, num_test: int) -> Case:
    """Make the case of the MobileNetV2 probe, validated on training images that nothing was fitted or calibrated on."""
    images, labels = fashion_mnist("train")
    # Not in the order of the files, since the search stops reading where a part decides.
    order = torch.randperm(VALIDATION_IMAGES.stop - VALIDATION_IMAGES.start, generator=torch.Generator().manual_seed(7))
    held = VALIDATION_IMAGES.start + order[:num_validation]

    def batches(split: str) -> Batches:
        own, classes = (images[held], labels[held]) if split == "validation" else fashion_mnist("test")
        number = len(own) if split == "validation" else num_test
        for part, expected in zip(own[:number].split(50), classes[:number].split(50), strict=True):
            yield {"images": mobilenet_inputs(part)}, expected

    calls = [{"images": mobilenet_inputs(part)} for part in images[calibration_indices(128, 0)].split(32)]
    limits, measured = {"accuracy": -0.002}, (_accuracy(batches), percent_right, "accuracy")
    return Case(mobilenet_probe(), calls, batches, *measured, limits, "size", {})


class SpamFilter(nn.Module):
    """MiniLM with a logistic regression on the mean of its token vectors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(384, 2)

    def embed(self, attention_mask: Tensor, **tokens: Tensor) -> Tensor:
        """Return the mean of a text's token vectors, of unit length: `(texts, 384)`."""
        states = self.encoder(attention_mask=attention_mask, **tokens).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return logits `(texts, 2)` of tokens `(texts, length)`."""
        return self.head(self.embed(attention_mask, input_ids=input_ids, token_type_ids=token_type_ids))


def minilm(num_validation: int, num_test: int) -> Case:
    """Make the case of MiniLM: the head is fitted on messages that are neither validated nor tested on."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    net = SpamFilter(AutoModel.from_pretrained(minilm_folder())).eval()
    texts, spam = sms_spam()
    test = held_out(len(texts), 0, NUM_KEPT_TEXTS)
    rest = (~test).nonzero().flatten()[NUM_KEPT_TEXTS:]
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(7))]
    fitted = torch.cat([torch.arange(NUM_KEPT_TEXTS), rest[num_validation:]])
    parts = {"validation": rest[:num_validation], "test": test.nonzero().flatten()[:num_test]}

    def tokenize(indices: Tensor) -> Inputs:
        own = [texts[i] for i in indices.tolist()]
        return dict(tokenizer(own, padding=True, truncation=True, max_length=128, return_tensors="pt"))

    def batches(split: str) -> Batches:
        for part in parts[split].split(20):
            yield tokenize(part), spam[part].long()

    with torch.no_grad():
        vectors = torch.cat([net.embed(**tokenize(part)) for part in fitted.split(32)]).double().numpy()
    found = LogisticRegression(max_iter=1000).fit(vectors, spam[fitted].numpy())
    weight, bias = torch.from_numpy(found.coef_).float(), torch.from_numpy(found.intercept_).float()
    net.head.load_state_dict({"weight": torch.cat([-weight, weight]) / 2, "bias": torch.cat([-bias, bias]) / 2})

    def evaluate(model: nn.Module) -> Iterator[dict[str, BinaryF1Score]]:
        metric = BinaryF1Score()
        for predicted, labels in answers(model, batches("validation")):
            metric.update(predicted, labels)
            yield {"f1": metric}

    def score(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return f1(predicted.astype(bool), labels.astype(bool), weights)

    by_length = sorted(range(256), key=lambda i: len(texts[i]))
    calls = [tokenize(torch.tensor(by_length[start : start + 16])) for start in range(0, 256, 16)]
    # The call that latencies are of is one of messages of middle length.
    calls.insert(0, calls.pop(8))
    kind = {"model_type": "transformer", "varying": 2}
    return Case(net, calls, batches, evaluate, score, "f1", {"f1": -0.003}, "latency", kind)


class Logits(nn.Module):
    """An audio classifier that gives its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor) -> Tensor:
        """Classify spectrograms `(N, frames, bands)`: logits `(N, classes)`."""
        return self.model(input_values).logits


def audio(num_validation: int, num_test: int) -> Case:
    """Train the transformer of `examples/audio_classifier.py`, whose data come from seeds of their own."""
    sys.path.append(str(Path(__file__).parents[1]))
    from audio_classifier import EPOCHS, SHAPE, AudioClassifier, tones
    from lightning.pytorch import Trainer, seed_everything
    from torch.utils.data import DataLoader

    seed_everything(0, verbose=False)
    classifier, cache = AudioClassifier(SHAPE), Path(tempfile.gettempdir()) / "lightning-quant-benchmarks" / "audio.pt"
    if not cache.is_file():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(max_epochs=EPOCHS, enable_checkpointing=False, **quiet)
        trainer.fit(classifier, DataLoader(tones(768, 0), 32, shuffle=True))
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(classifier.state_dict(), cache)
    classifier.load_state_dict(torch.load(cache, weights_only=True))
    data = {"validation": tones(num_validation, 2), "test": tones(num_test, 3)}

    def batches(split: str) -> Batches:
        for spectrograms, labels in DataLoader(data[split], 25):
            yield {"input_values": spectrograms}, labels

    calls = [{"input_values": spectrograms} for spectrograms, _ in DataLoader(tones(256, 0), 32)]
    limits, measured = {"accuracy": -0.01, "size_ratio": 0.3}, (_accuracy(batches), percent_right, "accuracy")
    return Case(
        Logits(classifier.model).eval(), calls, batches, *measured, limits, "size", {"model_type": "transformer"}
    )


CASES = {"mobilenet": mobilenet, "minilm": minilm, "audio": audio}
