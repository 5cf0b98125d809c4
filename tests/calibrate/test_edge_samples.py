"""What a run that learns ranges shows of tensors is what a float run shows, whatever channels are scaled by."""

from dataclasses import replace

import torch
from torch import nn
from uneven_chains import prepared_chain

from lightning_quant.calibrate.edge_samples import Sample, sample_edges
from lightning_quant.calibrate.fit import Fit
from lightning_quant.calibrate.groups import scaling_groups, worth_scaling
from lightning_quant.calibrate.smoothing import smooth
from lightning_quant.calibrate.steps import STEPS
from lightning_quant.calls.calls import Call


def test_a_run_that_learns_ranges_shows_what_scaling_of_channels_needs() -> None:
    model, prepared, calls = prepared_chain(nn.ReLU6)
    prepared.recipe = replace(prepared.recipe, accuracy_steps=("scale_channels",))
    groups = scaling_groups(prepared)
    seen: list[int] = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    smooth(prepared, groups, calls)
    fit = Fit([Call(*call) for call in calls])
    fit.recalibrate(prepared)
    assert len(seen) == len(calls)
    STEPS["scale_channels"].run(prepared, fit)
    # Ranges once more, and none for a sample.
    handle.remove()
    assert len(seen) == 2 * len(calls)
    own = sample_edges(prepared, worth_scaling(prepared, groups), calls)
    assert fit.samples is not None
    assert own.keys() == fit.samples.keys()
    for edge, sample in own.items():
        for one, other in zip(fields(sample), fields(fit.samples[edge]), strict=True):
            assert torch.equal(one, other)


def test_a_sample_goes_on_the_grid_as_the_tensor_does() -> None:
    _, prepared, calls = prepared_chain(nn.ReLU6)
    groups = scaling_groups(prepared)
    smooth(prepared, groups, calls)
    for edge, sample in sample_edges(prepared, groups, calls).items():
        on_grid, channels = sample.on_grid(prepared, edge), prepared.channels[edge]
        expected = ((sample.rows - channels.shift) / channels.factor).clamp(max=channels.clip)
        torch.testing.assert_close(on_grid.rows, expected, rtol=0, atol=0)
        assert bool((on_grid.low <= on_grid.rows).all())
        assert bool((on_grid.high >= on_grid.rows).all())


def fields(sample: Sample) -> tuple[torch.Tensor, ...]:
    return sample.rows, sample.low, sample.high
