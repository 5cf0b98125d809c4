"""Text generation from int8 weights: shapes of Flan-T5-small and Pythia-410m, random weights, beside optimum-quanto.

`python examples/benchmarks/generation.py` needs `pip install transformers` and `pip install --no-deps
optimum-quanto==0.2.7`. Each tool runs in a fresh process. Peak memory is the highest resident memory while it quantizes
and writes, in multiples of the float weights; what was resident beside them, after one call in float, does not count.
"""

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dynamic_peers import decibels, quiet
from results import publish
from timing import table
from torch import Tensor, nn

import lightning_quant as lq

RECIPE = "int8_weight_only"
OURS, QUANTO, FLOAT = f"lightning_quant {RECIPE}", "optimum-quanto qint8", "float32"
TOOLS = (FLOAT, QUANTO, OURS)


class Result(NamedTuple):
    """What one tool makes of one model."""

    disk_bytes: int
    memory_bytes: int
    closeness_db: float
    same_tokens: str
    peak: float


class Saved(NamedTuple):
    """A quantized model on disk, and how to have it in memory: as it was saved, and loaded again."""

    disk_bytes: int
    in_memory: Callable[[], nn.Module]
    reload: Callable[[], nn.Module]


def flan_t5_small() -> nn.Module:
    """Build the shape of T5 v1.1 small: 77 M parameters, output layer not tied."""
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"d_model": 512, "d_ff": 1024, "d_kv": 64, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 6}
    kind = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return T5ForConditionalGeneration(T5Config(**shape, **kind, decoder_start_token_id=0))


def pythia_410m() -> nn.Module:
    """Build the shape of Pythia-410m, a GPT-NeoX: 405 M parameters."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50304, **shape))


MODELS: dict[str, Callable[[], nn.Module]] = {"Flan-T5-small": flan_t5_small, "Pythia-410m": pythia_410m}


def build(name: str) -> nn.Module:
    """Build a model in eval mode, always with the same random weights."""
    torch.manual_seed(0)
    return MODELS[name]().eval()


def call_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the arguments of one call."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 32000, (1, 24), generator=generator)
    call = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return call | ({"decoder_input_ids": tokens[:, :8]} if model.config.is_encoder_decoder else {})


def generate(model: nn.Module, new_tokens: int) -> Tensor:
    """Generate greedily, with the model's own cache of keys and values."""
    call = {name: tensor for name, tensor in call_of(model).items() if name != "decoder_input_ids"}
    with torch.no_grad():
        return model.generate(**call, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)


def tensor_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones counted once."""
    leaves: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        # optimum-quanto's tensors are made of others, which PyTorch names.
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        for part in [tensor] if parts is None else [getattr(tensor, part) for part in parts]:
            leaves[part.untyped_storage().data_ptr()] = part.nbytes
    return sum(leaves.values())


def _status(field: str) -> int:
    """Return a field of this process's status in bytes: "VmRSS" is resident memory, "VmHWM" its highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _float(model: nn.Module, name: str, folder: Path) -> Saved:
    path = folder / "model.pt"
    torch.save(model.state_dict(), path)

    def reload() -> nn.Module:
        duplicate = build(name)
        duplicate.load_state_dict(torch.load(path, weights_only=True))
        return duplicate

    return Saved(path.stat().st_size, lambda: model, reload)


def _quanto(model: nn.Module, name: str, folder: Path) -> Saved:
    from optimum.quanto import freeze, qint8, quantization_map, quantize, requantize

    quantize(model, weights=qint8)
    freeze(model)
    path, layers = folder / "model.pt", quantization_map(model)
    torch.save(model.state_dict(), path)

    def reload() -> nn.Module:
        duplicate = build(name)
        requantize(duplicate, torch.load(path, weights_only=True), layers, torch.device("cpu"))
        return duplicate

    return Saved(path.stat().st_size, lambda: model, reload)


def _ours(model: nn.Module, name: str, folder: Path) -> Saved:
    from lightning_quant.planned.layerwise import quantize_layers

    call = call_of(model)
    with quiet():
        artifact = lq.quantize(model, RECIPE, "torch", calibration_data=[call], output_dir=folder, threads=1)

    def in_memory() -> nn.Module:
        return quantize_layers(model, kwargs=call, recipe=RECIPE).quantized()

    return Saved(artifact.size_bytes, in_memory, lambda: lq.load(folder, into=build(name)))


QUANTIZE = {FLOAT: _float, QUANTO: _quanto, OURS: _ours}


def _examine(name: str, tool: str, new_tokens: int, sender: Any) -> None:
    """Quantize, reload and compare, and send the result."""
    torch.set_num_threads(1)
    import_everything()
    model = build(name)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        logits = model(**call_of(model)).logits
        float_bytes, before = tensor_bytes(model), _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        saved = QUANTIZE[tool](model, name, Path(folder))
        peak = 1 + (_status("VmHWM") - before) / float_bytes
        in_memory = saved.in_memory()
        del model
        expected = generate(in_memory, new_tokens)
        del in_memory
        reloaded = saved.reload()
        got = generate(reloaded, new_tokens)
        same = f"{(expected == got).sum().item()} of {expected.numel()}"
        close = decibels(logits, reloaded(**call_of(reloaded)).logits)
        sender.send(Result(saved.disk_bytes, tensor_bytes(reloaded), close, same, peak))


def import_everything() -> None:
    """Load what quantizing and exporting load, so that their own memory does not count."""
    import optimum.quanto  # noqa: F401
    import transformers  # noqa: F401

    tiny = nn.Sequential(nn.Linear(8, 8))
    with quiet(), tempfile.TemporaryDirectory() as folder:
        lq.quantize(tiny, RECIPE, "torch", calibration_data=[torch.randn(2, 8)], output_dir=folder)


def examine(name: str, tool: str, new_tokens: int) -> Result:
    """Run `_examine` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(name, tool, new_tokens, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    """Print one table for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    for name in arguments.models:
        results = {tool: examine(name, tool, arguments.new_tokens) for tool in TOOLS}
        base = results[FLOAT]
        rows = [
            (
                tool,
                f"{result.disk_bytes / 1e6:.1f}",
                f"{result.disk_bytes / base.disk_bytes:.3f}",
                f"{result.memory_bytes / 1e6:.1f}",
                f"{result.memory_bytes / base.memory_bytes:.3f}",
                f"{result.closeness_db:.1f}",
                result.same_tokens,
                f"{result.peak:.2f}",
            )
            for tool, result in results.items()
        ]
        sizes = ("MB on disk", "ratio", "MB in memory", "ratio")
        header = (*sizes, "logits, dB", "tokens of the reloaded model as in memory", "peak memory / float")
        packages = ("transformers", "optimum-quanto")
        publish(f"generation-{name}", table(rows, (name, *header)), packages=packages)


if __name__ == "__main__":
    main()
