"""The golden batch of an artifact: a few real inputs, and what the float model and the artifact made of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quant.artifact.manifest import content_digest
from lightning_quant.calls.signature import Signature, TensorInfo
from lightning_quant.errors import ArtifactError

FILE = "golden.safetensors"
# The key, in the file's metadata, of the digest of what the manifest says of the model.
_CONTENT = "content"
# Samples that a golden batch holds at most, and bytes of input above which it holds fewer, down to one.
NUM_SAMPLES = 4
_MAX_INPUT_BYTES = 4 * 2**20
# Bytes of output above which it holds one sample of that length, where the length may vary.
MAX_OUTPUT_BYTES = 4 * 2**20
SHORT = 4
# What a file of tensors that is none, or a forged one, makes its reader raise besides.
_DAMAGE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class GoldenBatch:
    """Tensors in the order of the signature.

    Attributes:
        inputs: a few samples of the captured call, as the model was given them.
        float_outputs: of the float model.
        artifact_outputs: of the artifact, on the machine that wrote it.
    """

    inputs: tuple[Tensor, ...]
    float_outputs: tuple[Tensor, ...]
    artifact_outputs: tuple[Tensor, ...]


def num_samples(tensors: list[Tensor], captured: int) -> int:
    """Return how many of the captured samples a golden batch holds."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    affordable = int(_MAX_INPUT_BYTES * captured / total) if total else NUM_SAMPLES
    return max(1, min(NUM_SAMPLES, captured, affordable))


def save(path: Path, batch: GoldenBatch, content: dict[str, Any]) -> None:
    """Write a batch as a safetensors file that belongs to one manifest.

    Args:
        path: file to write.
        batch: in the order of the signature.
        content: what the manifest will say of the model; the file carries its digest.
    """
    from safetensors.torch import save_file

    signature = Signature.from_dict(json.loads(json.dumps(content["signature"])))
    tensors = {}
    for prefix, values, infos in _parts(batch, signature):
        for info, value in zip(infos, values, strict=True):
            # A copy, since safetensors refuses tensors that share memory.
            tensors[f"{prefix}.{info.name}"] = value.detach().cpu().contiguous().clone()
    save_file(tensors, path, metadata={_CONTENT: content_digest(content)})


def check_belongs(path: Path, manifest: dict[str, Any]) -> None:
    """Make sure that a batch was written with a manifest.

    Raises:
        ArtifactError: the file is no golden batch, or one of another manifest.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, *_DAMAGE) as error:
        raise ArtifactError(f"Expected {path} to hold a golden batch, but {error}.") from error
    if metadata.get(_CONTENT) != content_digest(manifest):
        raise ArtifactError(
            f"Expected {path} to be the golden batch of this manifest, but they were not written together."
        )


def load(path: Path, signature: Signature) -> GoldenBatch:
    """Read a batch.

    Raises:
        ArtifactError: the file is none, or its tensors are not those of the signature.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, *_DAMAGE) as error:
        raise ArtifactError(f"Expected {path} to hold a golden batch, but {error}.") from error

    def take(prefix: str, infos: tuple[TensorInfo, ...]) -> tuple[Tensor, ...]:
        return tuple(_take(tensors, f"{prefix}.{info.name}", info, path) for info in infos)

    batch = GoldenBatch(
        take("input", signature.inputs), take("float", signature.outputs), take("artifact", signature.outputs)
    )
    if tensors:
        raise ArtifactError(f"Expected {path} to hold a golden batch, but it holds {sorted(tensors)[:3]} besides.")
    return batch


def check_alike(recorded: list[Tensor], other: list[Tensor], signature: Signature, *, sizes: bool = True) -> None:
    """Make sure that outputs have the form of the recorded ones; without `sizes` their number of dimensions is enough.

    Raises:
        ArtifactError: another number, shape or type.
    """
    forms = [
        [(tuple(tensor.shape) if sizes else tensor.dim(), tensor.dtype) for tensor in tensors]
        for tensors in (recorded, other)
    ]
    if forms[0] != forms[1]:
        names = [info.name for info in signature.outputs]
        raise ArtifactError(f"Expected outputs {names} of the form {forms[0]} as recorded, but got {forms[1]}.")


def _parts(batch: GoldenBatch, signature: Signature) -> list[tuple[str, tuple[Tensor, ...], tuple[TensorInfo, ...]]]:
    return [
        ("input", batch.inputs, signature.inputs),
        ("float", batch.float_outputs, signature.outputs),
        ("artifact", batch.artifact_outputs, signature.outputs),
    ]


def _take(tensors: dict[str, Tensor], key: str, info: TensorInfo, path: Path) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise ArtifactError(f"Expected {path} to hold {key!r}, but it does not.")
    if tensor.dim() != len(info.shape):
        raise ArtifactError(f"Expected {key!r} of {path} to have {len(info.shape)} dimensions, but got {tensor.dim()}.")
    return tensor
