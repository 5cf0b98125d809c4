"""Does an artifact compute here what it computed where it was written?

The integer kernels of two processors differ: x86 kernels without VNNI add two products in 16 bits and saturate, for
instance. The golden batch tells.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.artifact import golden
from lightning_quant.artifact.artifact import Artifact, open_model, private_copy
from lightning_quant.artifact.signing import Key
from lightning_quant.calls.loaded import LoadedModule
from lightning_quant.calls.signature import Signature, tensor_leaves
from lightning_quant.errors import ArtifactError
from lightning_quant.machine.machine import cpu_name
from lightning_quant.numerics.noise import alike, equal_argmax, signal_to_noise
from lightning_quant.planned.inside import Answers

# Agreement that is enough whatever quantization cost; correct kernels differ in the last bits of float sums only.
_ENOUGH_DB = 60.0
# Decibels by which recorded and here must otherwise be closer to each other than float and recorded.
_MARGIN_DB = 10.0


@dataclass(frozen=True)
class Verification:
    """How far an artifact's outputs here agree with those recorded when it was written, on its golden batch.

    Attributes:
        identical: whether every output value is the same.
        equal_integers: share of equal values of the outputs that are no floats, in [0, 1]; 1 when there are none.
        largest_difference: largest absolute difference of an output value.
        agreement_db: signal-to-noise of recorded against here, in decibels; infinite when equal.
        quantization_db: signal-to-noise of float against recorded, in decibels: what quantization cost.
        here_db: signal-to-noise of float against here.
        nan_share: share of NaN among the float outputs here, in [0, 1].
        new_nan_share: share of those that are NaN here and were none in the float model.
        equal_argmax: share of equal predictions where the result is class scores `(batch, classes)`, else None.
        written_on: processor that wrote the artifact.
        cpu: this processor.
    """

    identical: bool
    equal_integers: float
    largest_difference: float
    agreement_db: float
    quantization_db: float
    here_db: float
    nan_share: float
    new_nan_share: float
    equal_argmax: float | None
    written_on: str
    cpu: str

    @property
    def failures(self) -> list[str]:
        """What is wrong, in plain words; empty when the artifact does here what it did there."""
        lines = []
        needed = min(self.quantization_db + _MARGIN_DB, _ENOUGH_DB)
        if not self.agreement_db >= needed:
            lines.append(
                f"outputs are {self.agreement_db:.1f} dB from those recorded on {self.written_on}, where at least "
                f"{needed:.1f} dB are expected: kernels of this processor ({self.cpu}) compute something else. If it "
                'has no VNNI, quantize with recipe "int8_reduce_range"'
            )
        if self.equal_integers < 1:
            lines.append(f"only {self.equal_integers:.1%} of the integer outputs are those recorded")
        if self.new_nan_share:
            lines.append(f"{self.new_nan_share:.2%} of the outputs are NaN where the float model has a number")
        elif self.nan_share == 1:
            lines.append("every output is NaN, as the float model's was: weights or recorded inputs are to blame")
        return lines

    def __str__(self) -> str:
        if self.failures:
            return f"Verification FAILED: {'; '.join(self.failures)}."
        how = "identical to" if self.identical else f"{self.agreement_db:.1f} dB from"
        nan = f" {self.nan_share:.2%} of them are NaN, as the float model's were." if self.nan_share else ""
        return f"Verification ok: outputs are {how} those recorded on {self.written_on}.{nan}"


def verify(path: str | os.PathLike[str] | Artifact, *, key: Key | None = None, **runtime_options: Any) -> Verification:
    """Run an artifact's golden batch on this machine and compare with what was recorded when it was written.

    Args:
        path: the artifact's folder, or an artifact, which must still be the one in its folder.
        key: file of a public key: what was not signed with its private key (see `sign`) is refused, unread.
        **runtime_options: as for `load`; one without a program needs `into`.

    Raises:
        ArtifactError: the folder is no artifact, is damaged, cannot be called as recorded, or its model answers in
            another form than recorded.
        MissingRuntimeError: its runtime is not installed; the message carries the pip command.
    """
    with private_copy(path, key) as artifact:
        signature = artifact.signature
        batch = golden.load(artifact.golden_path, signature)
        model = open_model(artifact, **runtime_options)
        with torch.no_grad():
            here = _answered(model, signature, list(batch.inputs))
    recorded, floating = list(batch.artifact_outputs), list(batch.float_outputs)
    golden.check_alike(recorded, here, signature)
    golden.check_alike(recorded, floating, signature, sizes=False)
    return Verification(
        identical=all(bool(_same(a, b).all()) for a, b in zip(recorded, here, strict=True)),
        equal_integers=_equal_integers(recorded, here),
        largest_difference=_largest_difference(recorded, here),
        agreement_db=_decibels(recorded, here),
        quantization_db=_decibels(floating, recorded),
        here_db=_decibels(floating, here),
        nan_share=_share([a.isnan() for a in here], here),
        new_nan_share=_share([a.isnan() & ~b.isnan() for a, b in zip(here, floating, strict=True)], here),
        equal_argmax=equal_argmax(recorded, here),
        written_on=artifact.manifest["cpu"],
        cpu=cpu_name(),
    )


def _answered(model: nn.Module, signature: Signature, inputs: list[Tensor]) -> list[Tensor]:
    if isinstance(model, LoadedModule):
        return model.run(inputs)
    arguments = signature.arguments(inputs)
    if arguments is None:
        raise ArtifactError(
            "Expected a call of tensors to verify the artifact by, but the recorded one is of structures that only "
            "your own code can build. Validate the module that `load(path, into=model)` returns."
        )
    return tensor_leaves(Answers(model)(**arguments))


def _same(first: Tensor, second: Tensor) -> Tensor:
    return (first == second) | ((first != first) & (second != second))


def _equal_integers(recorded: list[Tensor], here: list[Tensor]) -> float:
    same = [_same(a, b).flatten() for a, b in zip(recorded, here, strict=True) if not a.is_floating_point()]
    return torch.cat(same).double().mean().item() if any(map(len, same)) else 1.0


def _share(marked: list[Tensor], outputs: list[Tensor]) -> float:
    """Return the share of the marked values among those of float outputs."""
    values = [mark.flatten() for mark, output in zip(marked, outputs, strict=True) if output.is_floating_point()]
    return torch.cat(values).double().mean().item() if any(map(len, values)) else 0.0


def _largest_difference(recorded: list[Tensor], here: list[Tensor]) -> float:
    pairs = [(a.double(), b.double(), _same(a, b)) for a, b in zip(recorded, here, strict=True) if a.numel()]
    return max((((a - b).abs().masked_fill(same, 0.0)).max().item() for a, b, same in pairs), default=0.0)


def _decibels(reference: list[Tensor], other: list[Tensor]) -> float:
    value = signal_to_noise(*alike(reference, other))
    return -math.inf if math.isnan(value) else value
