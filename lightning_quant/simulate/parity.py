"""Does the artifact compute what was simulated? Operator by operator on equal inputs, and from end to end."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.graph.named_edges import numbered
from lightning_quant.numerics.noise import alike, equal_argmax, signal_to_noise, unequal_integers
from lightning_quant.runtimes import Runtime
from lightning_quant.simulate.integer_outputs import IntegerOutputs
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.simulate.ties import farthest, off_ties, tipped_ties
from lightning_quant.surgery.routing import evaluation_mode

# Share of an operator's values that must lie within one step of the simulation, given equal inputs.
MINIMUM_SHARE = 0.999
# Samples that are looked at; every operator of the model is compared on them.
PARITY_SAMPLES = 16
# Decibels by which simulation and artifact must be closer to each other than simulation and float.
MARGIN_DB = 10.0
# What two engines' float kernels reach where nothing is rounded: sums in other orders leave 100 to 140.
FLOAT_DB = 90.0


@dataclass(frozen=True)
class Parity:
    """How far an artifact agrees with its simulation.

    Attributes:
        worst_operator: the edge whose producer agrees least; empty when there was none to compare.
        worst_share: its share of values within one quantization step, given equal inputs, in [0, 1]; None when the
            runtime cannot run single operators.
        quantization_db: signal-to-noise of float against simulated, in decibels: what quantization costs.
        artifact_db: signal-to-noise of simulated against artifact, in decibels.
        equal_argmax: share of equal predictions of simulation and artifact where the result is class scores `(batch,
            classes)`, else None.
        ties_db: of the simulation against itself, once for each draw, after every value was moved by a few bits of
            float32 before it was rounded: see `ties.py`. Empty where nothing depends on it.
        misfit: which output of the artifact has a size that rounding ties do not explain; empty for none.
        integers: how many values of outputs that are no floats differ; None where there are none.
    """

    worst_operator: str
    worst_share: float | None
    quantization_db: float
    artifact_db: float
    equal_argmax: float | None
    ties_db: tuple[float, ...] = ()
    misfit: str = ""
    integers: IntegerOutputs | None = None

    @property
    def needed_db(self) -> float:
        """Decibels that are needed between simulation and artifact: fewer where ties alone account for fewer."""
        needed = min(self.quantization_db + MARGIN_DB, farthest(self.ties_db))
        return FLOAT_DB if needed == math.inf and not self.worst_operator else needed

    @property
    def failures(self) -> list[str]:
        """What is wrong, in plain words; empty when the artifact is what was simulated."""
        lines = [line for line in (self.misfit, self.integers.failure if self.integers else "") if line]
        if self.worst_share is not None and not self.worst_share >= MINIMUM_SHARE:
            lines.append(
                f"at {self.worst_operator} only {self.worst_share:.2%} of the values are within one step of the "
                "simulation"
            )
        if not self.artifact_db >= self.needed_db:
            actual, needed = told_apart(self.artifact_db, self.needed_db)
            lines.append(
                f"the artifact is {actual} dB from its simulation, which is {self.quantization_db:.1f} dB from float"
                f"{self._ties()}: at least {needed} dB are needed"
            )
        return lines

    def _ties(self) -> str:
        if not self.ties_db:
            return ""
        low, high = f"{min(self.ties_db):.1f}", f"{max(self.ties_db):.1f}"
        return f" and {low}{f' to {high}' * (high != low)} dB from itself with its rounding ties tipped"

    def __str__(self) -> str:
        parts = []
        if self.integers is None or not self.integers.alone:
            decibels = (
                f"simulated against artifact {self.artifact_db:.1f} dB, float against simulated "
                f"{self.quantization_db:.1f} dB"
            )
            parts.append(decibels + self._ties().replace(" and ", ", simulated ", 1))
        if self.integers is not None:
            parts.append(str(self.integers))
        text = f"Parity {'FAILED' if self.failures else 'ok'}: {_operator_share(self.worst_share)}{'; '.join(parts)}"
        if self.equal_argmax is not None:
            text += f"; {self.equal_argmax:.1%} equal predictions of simulated and artifact"
        return f"{text}."


def _operator_share(share: float | None) -> str:
    if share is None:
        return ""
    return f"every operator has at least {share:.2%} of its values within one step of the simulation; "


def check_parity(
    prepared: Prepared, artifact: nn.Module, runtime: Runtime, model_path: Path, tensors: list[Tensor]
) -> Parity:
    """Run float, simulated and exported model on the captured call and compare; of the last the second answer.

    Args:
        prepared: the trained or calibrated model, detached.
        artifact: the loaded artifact.
        runtime: its runtime's module.
        model_path: its model file.
        tensors: the tensors of the call, as many samples as wanted.
    """
    tensors = off_ties(prepared, tensors)
    args, kwargs = prepared.call(tensors)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), evaluation_mode(prepared.root):
        float_output = prepared.root(*args, **kwargs)
        with prepared.attached("frozen"), prepared.simulation.recording() as edges:
            simulated = prepared.root(*args, **kwargs)
        # OpenVINO has been seen to write over its constants in the first call, others being wrong: 23 dB for 35.
        artifact(*args, **kwargs)
        exported = artifact(*args, **kwargs)
    inputs = dict(zip(prepared.spec.names, tensors, strict=True))
    name, share = _worst_operator(runtime, model_path, inputs, edges)
    simulated_leaves, exported_leaves = tensor_leaves(simulated), tensor_leaves(exported)
    integers = _integers(tensor_leaves(float_output), simulated_leaves, exported_leaves)
    parity = Parity(
        worst_operator=name,
        worst_share=share,
        quantization_db=signal_to_noise(*alike(tensor_leaves(float_output), simulated_leaves)),
        artifact_db=signal_to_noise(*alike(simulated_leaves, exported_leaves)),
        equal_argmax=equal_argmax(simulated_leaves, exported_leaves),
        misfit=_misfit(simulated_leaves, exported_leaves),
        integers=integers,
    )
    if parity.artifact_db >= parity.needed_db and not (integers and integers.failure):
        return parity
    decibels, shares = tipped_ties(prepared, args, kwargs, simulated)
    return replace(parity, ties_db=decibels, integers=integers and replace(integers, ties=shares))


def _integers(floating: list[Tensor], simulated: list[Tensor], exported: list[Tensor]) -> IntegerOutputs | None:
    differing = unequal_integers(simulated, exported)
    if differing is None:
        return None
    alone = not any(output.is_floating_point() for output in simulated)
    return IntegerOutputs(unequal_integers(floating, simulated) or 0.0, differing, alone=alone)


def _misfit(simulated: list[Tensor], exported: list[Tensor]) -> str:
    """Say which output has another size than simulated, but for a few rows that a mask takes or leaves on ties."""
    for index, (expected, actual) in enumerate(zip(simulated, exported, strict=True)):
        few = max(0.05 * expected.numel(), 2 * expected[:1].numel()) if expected.dim() else 0
        if expected.dim() != actual.dim() or abs(expected.numel() - actual.numel()) > few:
            return f"output {index} has the shape {tuple(actual.shape)}, simulated {tuple(expected.shape)}"
    return ""


def told_apart(first: float, second: float) -> tuple[str, str]:
    """Return two numbers with one digit, or with as many as it takes to tell them apart."""
    for digits in range(1, 6):
        texts = f"{first:.{digits}f}", f"{second:.{digits}f}"
        if texts[0] != texts[1]:
            break
    return texts


def _worst_operator(
    runtime: Runtime, model_path: Path, inputs: dict[str, Tensor], edges: list[tuple[str, Tensor]]
) -> tuple[str, float | None]:
    if not (runtime.KEEPS_EDGES and edges):
        return "", None
    names = numbered(identity for identity, _ in edges)
    expected = {name: integers.cpu().numpy() for name, (_, integers) in zip(names, edges, strict=True)}
    worst = ("", 1.0)
    for name, theirs in runtime.run_forced(model_path, inputs, expected).items():
        ours = expected[name]
        share = float((np.abs(ours.astype(np.int32) - theirs.astype(np.int32)) <= 1).mean()) if ours.size else 1.0
        if share < worst[1] or not worst[0]:
            worst = (name, share)
    return worst
