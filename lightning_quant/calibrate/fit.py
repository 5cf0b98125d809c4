"""What a step for accuracy is fitted to, and the state that it changes: taken, put back, judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_quant.calibrate.edge_samples import Sample, sampling
from lightning_quant.calibrate.groups import scaling_groups, worth_scaling
from lightning_quant.calibrate.output_correction import correct_outputs
from lightning_quant.calibrate.recalibrate import recalibrate
from lightning_quant.calls.calls import Call
from lightning_quant.numerics.noise import alike, sample_ratios
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode

# What equal outputs count as, in decibels, and as much below zero what is all noise.
_EQUAL_DB = 200.0
# Outputs of the float module that are kept from one judgement to the next, at most.
_MOST_BYTES = 2**28


@dataclass
class Fit:
    """What a step may look at.

    Attributes:
        calls: calls of the module to fit to.
        corrects_outputs: whether biases are corrected by the outputs of the quantized model; a step that changes
            anything has to do that again.
        samples: of what the tensors hold in the float model, by which factors of channels are chosen; None until a
            run of all calls has shown them.
    """

    calls: list[Call]
    corrects_outputs: bool = False
    samples: dict[str, Sample] | None = None

    def refresh(self, prepared: Prepared) -> None:
        """Learn ranges and bias corrections again, after layers or channel scales have changed."""
        self.recalibrate(prepared)
        self.correct(prepared)

    def recalibrate(self, prepared: Prepared, beside: Sequence[Prepared] = ()) -> None:
        """Learn ranges again, and those of other bindings; where factors of channels are chosen, sample meanwhile."""
        if self.samples is not None or "scale_channels" not in prepared.recipe.accuracy_steps:
            recalibrate(prepared, self.calls, beside)
            return
        with sampling(prepared, worth_scaling(prepared, scaling_groups(prepared)), len(self.calls)) as self.samples:
            recalibrate(prepared, self.calls, beside)

    def correct(self, prepared: Prepared) -> None:
        """Correct biases again, if they are by outputs, after integers or ranges have changed."""
        if self.corrects_outputs:
            correct_outputs(prepared, self.calls)


def snapshot(prepared: Prepared) -> tuple[Any, ...]:
    """Return what `restore` needs to undo steps; layers and ranges are replaced by steps, never written into."""
    adjusted = (dict(values) for values in (prepared.layers, prepared.channels, prepared.bias_corrections))
    return (*adjusted, prepared.ranges, dict(prepared.ranges.chosen))


def restore(prepared: Prepared, saved: tuple[Any, ...]) -> None:
    """Undo everything since a snapshot, which can be restored again."""
    prepared.layers, prepared.channels, prepared.bias_corrections = (dict(values) for values in saved[:3])
    prepared.ranges, prepared.ranges.chosen = saved[3], dict(saved[4])
    prepared.ranges.forget_parameters()


@torch.no_grad()
def output_snrs(prepared: Prepared, calls: list[Call], known: list[Any] | None = None) -> list[float]:
    """Return signal over noise of the quantized module's output on each sample, in decibels of at most 200.

    A call whose outputs have no samples in common counts as one. Samples and not calls: in the power over a call the
    few samples with the largest errors would decide, and in few calls chance.

    Args:
        prepared: detached and calibrated.
        calls: of the module.
        known: gets what the float module answers to each, no more than 256 MiB of it, and is read where it has it.
    """
    ratios, known = [], [] if known is None else known
    with evaluation_mode(prepared.root), prepared.simulation.keeping_weights():
        for number, (args, kwargs) in enumerate(calls):
            exact = known[number] if number < len(known) else prepared.root(*args, **kwargs)
            if number == len(known) and _num_bytes([*known, exact]) <= _MOST_BYTES:
                # A module may answer with a buffer that its next call writes anew.
                known.append(pytree.tree_map_only(Tensor, torch.clone, exact))
            with prepared.attached("frozen"):
                quantized = prepared.root(*args, **kwargs)
            ratios += sample_ratios(*alike(exact, quantized))
    return [max(-_EQUAL_DB, min(ratio, _EQUAL_DB)) for ratio in ratios]


def _num_bytes(values: Any) -> int:
    leaves = pytree.tree_leaves(values)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def output_snr(prepared: Prepared, calls: list[Call], known: list[Any] | None = None) -> float:
    """Return the mean over samples of the signal-to-noise ratio of the quantized module's output, in decibels."""
    ratios = output_snrs(prepared, calls, known)
    return sum(ratios) / len(ratios)
