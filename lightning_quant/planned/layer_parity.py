"""Does an artifact of quantized layers keep what the layers in memory keep of the float model?"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_quant.calls.calls import Call
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.numerics.noise import alike, equal_argmax, signal_to_noise, unequal_integers

# Decibels that an artifact may lie farther from float than the layers in memory: kernels of runtimes round otherwise.
ALLOWED_LOSS_DB = 3.0
# Agreement with float that is enough, whatever the layers in memory reach.
_ENOUGH_DB = 60.0
# Share of integer outputs that may differ beside twice what the layers in memory change: 3 dB, as for floats.
_FEW = 0.05


@dataclass(frozen=True)
class LayerParity:
    """How far float model, quantized layers in memory, and artifact agree on the captured call.

    Attributes:
        quantization_db: signal-to-noise of float against the layers in memory, in decibels.
        artifact_db: of the layers in memory against the artifact.
        float_artifact_db: of float against the artifact: what the artifact costs.
        equal_argmax: share of equal predictions of float and artifact where the result is class scores `(batch,
            classes)`, else None.
        unequal: shares of the values of outputs that are no floats which differ, of float and the layers in memory, and
            of float and artifact; None where there are none.
    """

    # Layers are not compared one by one.
    worst_share: ClassVar[None] = None

    quantization_db: float
    artifact_db: float
    float_artifact_db: float
    equal_argmax: float | None
    unequal: tuple[float, float] | None = None

    @property
    def failures(self) -> list[str]:
        """What is wrong, in plain words; empty when the artifact is what was quantized."""
        lines = []
        if not self.float_artifact_db >= min(self.quantization_db - ALLOWED_LOSS_DB, _ENOUGH_DB):
            lines.append(
                f"the artifact is {self.float_artifact_db:.1f} dB from float where the same layers in memory are "
                f"{self.quantization_db:.1f} dB from it"
            )
        if self.unequal is not None and self.unequal[1] > 2 * self.unequal[0] + _FEW:
            in_memory, in_file = (1 - share for share in self.unequal)
            lines.append(
                f"only {in_file:.1%} of the artifact's integer outputs are those of float, where the same layers in "
                f"memory have {in_memory:.1%}"
            )
        return lines

    def __str__(self) -> str:
        text = (
            f"Parity {'FAILED' if self.failures else 'ok'}: on the captured call float against artifact "
            f"{self.float_artifact_db:.1f} dB, float against the quantized layers in memory {self.quantization_db:.1f} "
            f"dB, those against the artifact {self.artifact_db:.1f} dB"
        )
        if self.equal_argmax is not None:
            text += f"; {self.equal_argmax:.1%} equal predictions of float and artifact"
        if self.unequal is not None:
            text += f"; {1 - self.unequal[1]:.1%} equal integer outputs of float and artifact"
        return f"{text}."


@torch.no_grad()
def check_layer_parity(call: Call, outputs: tuple[Any, Any], artifact: nn.Module) -> LayerParity:
    """Run an artifact on the captured call and compare.

    Args:
        call: the captured call.
        outputs: what the float model and the quantized layers in memory made of it.
        artifact: the loaded artifact.
    """
    floating, simulated = (tensor_leaves(output) for output in outputs)
    exported = tensor_leaves(artifact(*call.args, **call.kwargs))
    unequal = unequal_integers(floating, simulated), unequal_integers(floating, exported)
    return LayerParity(
        quantization_db=signal_to_noise(*alike(floating, simulated)),
        artifact_db=signal_to_noise(*alike(simulated, exported)),
        float_artifact_db=signal_to_noise(*alike(floating, exported)),
        equal_argmax=equal_argmax(floating, exported),
        unequal=None if unequal[1] is None else (unequal[0] or 0.0, unequal[1]),
    )
