"""Channels are centered and scaled where that costs the weights nothing, and left where it harms."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CASES
from torch import multiprocessing, nn
from uneven_chains import images, uneven

import lightning_quant as lq
from lightning_quant.calibrate import alignment
from lightning_quant.calibrate.alignment import alignable, calibrate_aligned, extremes, move
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.distributed import Group, calibrate_together
from lightning_quant.calibrate.fit import output_snr
from lightning_quant.errors import NoEffectWarning
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import RECIPES, Recipe
from lightning_quant.simulate.prepared import Prepared


def calibrated(model: nn.Module, data: list[torch.Tensor], **fields) -> Prepared:
    prepared = prepare(model, (data[0],), recipe=Recipe(**fields), observer="mse")
    calibrate(prepared, steps_of(prepared, data))
    return prepared


def bottleneck(*middle: nn.Module) -> nn.Module:
    """Return a net of which the channels between two layers lie far apart, and vary little."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), *middle, nn.Conv2d(6, 8, 1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([-9.0, 9, -5, 5, 7, -7]))
    return model


@pytest.mark.feature("`int8` evens out the channels that depthwise convolutions read, and centers those of bottlenecks")
@pytest.mark.parametrize("build", [lambda: uneven(nn.ReLU6), lambda: uneven(nn.ReLU), bottleneck])
def test_outputs_are_nearer_to_those_of_float(build) -> None:
    data, held = list(images(64).split(8)), [((images(32, seed=7),), {})]
    plain, aligned = calibrated(build(), data, align_channels=False), calibrated(build(), data)
    assert output_snr(aligned, held) > output_snr(plain, held) + 3
    (step,) = aligned.accuracy_steps
    assert (step.name, step.kept) == ("align_channels", True)
    assert check_agreement(aligned, convert(aligned), *held[0]) > 40


def test_the_artifact_computes_so_and_the_report_says_so(tmp_path: Path) -> None:
    model, data, x = bottleneck(), list(images(64).split(8)), images(32, seed=7)
    artifact = lq.quantize(model, "int8", calibration_data=data, output_dir=tmp_path, threads=1)
    assert any("align_channels" in note and "dB on calibration data, kept" in note for note in artifact.report["notes"])
    plain = calibrated(model, data, align_channels=False)
    with torch.no_grad():
        gained = signal_to_noise(model(x), lq.load(artifact.path)(x)) - output_snr(plain, [((x,), {})])
    assert gained > 3


def test_of_few_samples_channels_keep_room_for_more() -> None:
    model, held = uneven(nn.ReLU), images(64, seed=9)
    prepared = calibrated(model, list(images(4).split(2)), align_channels=False)
    groups = alignable(prepared)
    steps = steps_of(prepared, images(4).split(2))
    assert move(prepared, groups, extremes(prepared, groups, steps)) == 1
    factor = prepared.channels[groups[0].edges[0]].factor
    seen = model.layers[:3](images(4)).amax((0, 2, 3))
    expected = torch.where(seen > 0, (seen / seen.max()).sqrt(), 1.0)
    torch.testing.assert_close(factor, expected, atol=1e-5, rtol=1e-4)
    grid_values = prepared.on_grid(groups[0].edges[0], model.layers[:3](held))
    clipped = (grid_values > (seen / factor).max()).float().mean()
    assert float(clipped) < 1e-3


def test_nothing_needs_to_have_been_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    data, held = list(images(64).split(8)), [((images(32, seed=7),), {})]
    plain = output_snr(calibrated(uneven(nn.ReLU6), data, align_channels=False), held)

    def unobserved() -> float:
        prepared = prepare(uneven(nn.ReLU6), (data[0],), recipe=Recipe(), observer="mse")
        calibrate_aligned(prepared, lambda: steps_of(prepared, data))
        return output_snr(prepared, held)

    assert unobserved() > plain + 3
    monkeypatch.setattr(alignment, "rescale", lambda *_: {}["of the user's"])
    with pytest.warns(NoEffectWarning, match="not aligned"):
        assert unobserved() == plain


@pytest.mark.parametrize("middle", [nn.ReLU(), nn.Tanh()])
def test_what_an_activation_bounds_and_dense_layers_read_stays(middle: nn.Module) -> None:
    prepared = calibrated(bottleneck(middle), list(images(16).split(8)))
    assert not prepared.channels
    assert prepared.accuracy_steps == ()


def test_it_is_undone_where_outputs_are_no_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    data = list(images(16).split(4))
    calls = [((x,), {}) for x in data]
    plain = calibrated(uneven(nn.ReLU), data, align_channels=False)
    monkeypatch.setattr(alignment, "_STRENGTH", 6.0)
    prepared = calibrated(uneven(nn.ReLU), data)
    assert [(step.name, step.kept) for step in prepared.accuracy_steps] == [("align_channels", False)]
    assert output_snr(prepared, calls) == output_snr(plain, calls)
    assert not prepared.channels


@pytest.mark.parametrize("recipe", ["int8_reduce_range", "int8_accurate"])
def test_every_static_recipe_aligns(recipe: str) -> None:
    model, data = uneven(nn.ReLU6), list(images(32).split(8))
    prepared = prepare(model, (data[0],), recipe=RECIPES[recipe], observer="mse")
    calibrate(prepared, steps_of(prepared, data))
    assert prepared.accuracy_steps[0].name == "align_channels"


def test_where_it_fails_or_no_call_is_seen_calibration_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    data = list(images(16).split(8))
    calls = [((x,), {}) for x in data]
    plain = calibrated(uneven(nn.ReLU), data, align_channels=False)
    assert alignment.align_channels(plain, alignable(plain), []) is None
    for name in ("scaling_groups", "rescale", "recalibrate"):
        with monkeypatch.context() as patch:
            patch.setattr(alignment, name, lambda *_: {}["of the user's"])
            with pytest.warns(NoEffectWarning, match='not aligned, since that ended in KeyError: "of the user\'s"'):
                prepared = calibrated(uneven(nn.ReLU), data)
        assert prepared.accuracy_steps == ()
        assert output_snr(prepared, calls) == output_snr(plain, calls)


def test_nets_without_such_tensors_keep_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "residual")
    args, kwargs = case.call(4)
    prepared = prepare(case.build(), args, kwargs, recipe="int8", observer="mse")
    monkeypatch.setattr(alignment, "align_channels", lambda *_: pytest.fail("aligned"))
    calibrate(prepared, steps_of(prepared, [args]))
    assert prepared.accuracy_steps == ()


def meet(rank: int, size: int, folder: str, results: Any, fails: str = "") -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    model, data = uneven(nn.ReLU6), list(images(32).split(8))
    prepared = prepare(model, (data[0],), recipe=Recipe(), observer="min_max")
    # The last of three processes has no data.
    part = [] if rank == 2 else data[rank :: min(size, 2)]
    if fails and rank == 1:
        setattr(alignment, fails, lambda *_: {}["of the user's"])
    with pytest.warns(NoEffectWarning, match="of the user's") if fails else nullcontext():
        calibrate_together(Group(size), prepared, lambda: steps_of(prepared, part))
    (step,) = prepared.accuracy_steps or (None,)
    factors = {edge: channels.factor.tolist() for edge, channels in prepared.channels.items()}
    ranges = {edge: [float(end) for end in o.range()] for edge, o in prepared.ranges.observers.items()}
    results[(rank, size)] = (step and step.kept, factors, ranges)
    if size > 1:
        dist.destroy_process_group()


def test_processes_align_alike_and_as_one_does_alone(tmp_path: Path) -> None:
    alone: dict[Any, Any] = {}
    meet(0, 1, str(tmp_path), alone)
    shared = multiprocessing.get_context("fork").Manager().dict()
    multiprocessing.start_processes(meet, (3, str(tmp_path), shared), nprocs=3, start_method="fork")
    kept, factors, ranges = alone[(0, 1)]
    assert kept
    assert factors
    for rank in range(3):
        assert shared[(rank, 3)][:2] == (kept, factors)
        for edge, ends in shared[(rank, 3)][2].items():
            assert ends == pytest.approx(ranges[edge], rel=1e-4)


@pytest.mark.parametrize("fails", ["scaling_groups", "extremes", "rescale"])
def test_where_one_process_fails_calibration_stands_in_all(fails: str, tmp_path: Path) -> None:
    shared = multiprocessing.get_context("fork").Manager().dict()
    multiprocessing.start_processes(meet, (2, str(tmp_path), shared, fails), nprocs=2, start_method="fork")
    assert shared[(0, 2)] == shared[(1, 2)]
    assert shared[(0, 2)][:2] == (None, {})
