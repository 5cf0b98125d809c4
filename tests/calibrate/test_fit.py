"""State is taken and put back whole, and a mean of decibels is over samples."""

import pytest
import torch
from uneven_chains import climbed

from lightning_quant.calibrate import fit
from lightning_quant.calibrate.channel_choice import choose_channels
from lightning_quant.calibrate.fit import Fit, output_snr, output_snrs, restore, snapshot
from lightning_quant.calibrate.groups import scaling_groups
from lightning_quant.calibrate.lockstep import lockstep


def test_a_snapshot_can_be_put_back_more_than_once() -> None:
    _, prepared, calls = climbed(("correct_outputs",))
    before, saved = output_snrs(prepared, calls), snapshot(prepared)
    for _ in range(2):
        choose_channels(prepared, scaling_groups(prepared), calls)
        Fit(calls, corrects_outputs=True).refresh(prepared)
        prepared.ranges.choose(":layers.2", torch.tensor(0.0), torch.tensor(0.1))
        assert output_snrs(prepared, calls) != before
        restore(prepared, saved)
        assert output_snrs(prepared, calls) == before
        assert not prepared.channels


def test_every_sample_counts_alike_and_equal_outputs_have_a_bound() -> None:
    _, prepared, calls = climbed(())
    ratios = output_snrs(prepared, calls)
    assert len(ratios) == sum(len(args[0]) for args, _ in calls)
    assert output_snr(prepared, calls) == pytest.approx(sum(ratios) / len(ratios))
    with prepared.simulation.quantizing_only(frozenset()):
        assert output_snr(prepared, calls) == 200.0


def test_what_the_float_module_answers_is_kept_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prepared, calls = climbed(())
    known: list[torch.Tensor] = []
    ratios, runs = output_snrs(prepared, calls, known), []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    assert output_snrs(prepared, calls, known) == ratios
    # The rounded module alone has run.
    assert len(runs) == len(calls) == len(known)
    monkeypatch.setattr(fit, "_MOST_BYTES", 1)
    assert output_snrs(prepared, calls, large := []) == ratios
    assert not large
    handle.remove()


def test_activations_that_are_kept_layer_by_layer_are_those_of_whole_runs() -> None:
    model, prepared, calls = climbed(("correct_outputs",))
    kept: dict[str, list[torch.Tensor]] = {"float": [], "rounded": []}

    def visit(site) -> None:
        if site.identity == ":layers.6":
            kept["float"], kept["rounded"] = site.float_inputs, site.quantized_inputs

    lockstep(prepared, calls, visit)
    for phase, name in (("off", "float"), ("frozen", "rounded")):
        whole: list[torch.Tensor] = []
        handle = model.layers[6].register_forward_pre_hook(lambda _, args, whole=whole: whole.append(args[0]))
        with torch.no_grad(), prepared.attached(phase):
            for args, kwargs in calls:
                model(*args, **kwargs)
        handle.remove()
        assert len(whole) == len(calls)
        assert all(torch.equal(one, other) for one, other in zip(kept[name], whole, strict=True))
