"""Does the artifact compute what was simulated? Operator by operator on equal inputs, and from end to end."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.named_edges import numbered
from lightning_quant.noise import signal_to_noise
from lightning_quant.prepared import Prepared
from lightning_quant.routing import evaluation_mode
from lightning_quant.signature import tensor_leaves

# Share of an operator's values that must lie within one step of the simulation, given equal inputs.
MINIMUM_SHARE = 0.999
# Decibels by which simulation and artifact must be closer to each other than simulation and float.
MARGIN_DB = 10.0
# Decibels by which an artifact may be farther from its simulation than that is from itself with its ties tipped.
_TIES_MARGIN_DB = 3.0


@dataclass(frozen=True)
class Parity:
    """How far an artifact agrees with its simulation.

    Attributes:
        worst_operator: the edge whose producer agrees least; empty when there was none to compare.
        worst_share: its share of values within one quantization step, given equal inputs, in [0, 1]; None when the
            runtime cannot run single operators.
        quantization_db: signal-to-noise of float against simulated, in decibels: what quantization costs.
        artifact_db: signal-to-noise of simulated against artifact, in decibels.
        ties_db: of the simulation against itself, after every value was moved by a few bits of float32 before it was
            rounded. Kernels multiply in orders of their own, and in a deep network each tie that this tips spreads.
        equal_argmax: share of equal predictions where the result is class scores `(batch, classes)`, else None.
    """

    worst_operator: str
    worst_share: float | None
    quantization_db: float
    artifact_db: float
    equal_argmax: float | None
    ties_db: float = math.inf

    @property
    def failures(self) -> list[str]:
        """What is wrong, in plain words; empty when the artifact is what was simulated."""
        found = []
        if self.worst_share is not None and not self.worst_share >= MINIMUM_SHARE:
            found.append(
                f"at {self.worst_operator} only {self.worst_share:.2%} of the values are within one step of the "
                "simulation"
            )
        needed = self.quantization_db + MARGIN_DB
        if self.ties_db - _TIES_MARGIN_DB < needed:
            needed = self.ties_db - _TIES_MARGIN_DB
        if not self.artifact_db >= needed:
            found.append(
                f"the artifact is {self.artifact_db:.1f} dB from its simulation, which is {self.quantization_db:.1f} "
                f"dB from float and {self.ties_db:.1f} dB from itself with its rounding ties tipped: at least "
                f"{needed:.1f} dB are needed"
            )
        return found

    def __str__(self) -> str:
        text = (
            f"Parity {'FAILED' if self.failures else 'ok'}: {_operator_share(self.worst_share)}simulated against "
            f"artifact {self.artifact_db:.1f} dB, float against simulated {self.quantization_db:.1f} dB"
        )
        if self.artifact_db < self.quantization_db + MARGIN_DB:
            text += f", simulated against itself with its rounding ties tipped {self.ties_db:.1f} dB"
        if self.equal_argmax is not None:
            text += f"; {self.equal_argmax:.1%} equal predictions"
        return f"{text}."


def _operator_share(share: float | None) -> str:
    if share is None:
        return ""
    return f"every operator has at least {share:.2%} of its values within one step of the simulation; "


def check_parity(
    prepared: Prepared, artifact: nn.Module, runtime: ModuleType, model_path: Path, tensors: list[Tensor]
) -> Parity:
    """Run float, simulated and exported model on the captured call and compare.

    Args:
        prepared: the trained or calibrated model, detached.
        artifact: the loaded artifact.
        runtime: its runtime's module.
        model_path: its model file.
        tensors: the tensors of the call, as many samples as wanted.
    """
    args, kwargs = prepared.call(tensors)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        float_output = prepared.root(*args, **kwargs)
        with prepared.attached("frozen"), prepared.simulation.recording() as edges:
            simulated = prepared.root(*args, **kwargs)
        with prepared.attached("frozen"), prepared.simulation.jittering():
            tipped = prepared.root(*args, **kwargs)
        exported = artifact(*args, **kwargs)
    inputs = dict(zip(prepared.spec.names, tensors, strict=True))
    name, share = _worst_operator(runtime, model_path, inputs, edges)
    simulated_leaves, exported_leaves = tensor_leaves(simulated), tensor_leaves(exported)
    return Parity(
        worst_operator=name,
        worst_share=share,
        quantization_db=signal_to_noise(tensor_leaves(float_output), simulated_leaves),
        artifact_db=signal_to_noise(simulated_leaves, exported_leaves),
        equal_argmax=equal_argmax(simulated_leaves, exported_leaves),
        ties_db=signal_to_noise(simulated_leaves, tensor_leaves(tipped)),
    )


def _worst_operator(
    runtime: ModuleType, model_path: Path, inputs: dict[str, Tensor], edges: list[tuple[str, Tensor]]
) -> tuple[str, float | None]:
    if not hasattr(runtime, "run_forced"):
        return "", None
    names = numbered(identity for identity, _ in edges)
    expected = {name: integers.cpu().numpy() for name, (_, integers) in zip(names, edges, strict=True)}
    worst = ("", 1.0)
    for name, theirs in runtime.run_forced(model_path, inputs, expected).items():
        ours = expected[name]
        share = float((np.abs(ours.astype(np.int16) - theirs.astype(np.int16)) <= 1).mean()) if ours.size else 1.0
        if share < worst[1] or not worst[0]:
            worst = (name, share)
    return worst


def equal_argmax(simulated: list[Any], exported: list[Any]) -> float | None:
    """Return the share of equal predictions where the result is class scores `(batch, classes)`, else None."""
    if (
        len(simulated) != 1
        or simulated[0].dim() != 2
        or simulated[0].shape[1] < 2
        or not simulated[0].is_floating_point()
    ):
        return None
    return (simulated[0].argmax(1) == exported[0].argmax(1)).float().mean().item()
