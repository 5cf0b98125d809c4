"""The ladder keeps what helps on held-back calls, undoes the rest, and its result exports."""

import itertools
import time
from pathlib import Path

import pytest
import torch
from models import CASES
from torch import nn
from uneven_chains import Normalized, climbed, images, uneven

import lightning_quant as lq
from lightning_quant.calibrate import ladder
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calibrate.fit import Fit, output_snr, output_snrs
from lightning_quant.calibrate.steps import STEPS, Step
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.recipe.recipe import RECIPES, Recipe
from lightning_quant.simulate.prepared import Prepared


def test_a_step_that_helps_is_kept_and_one_that_harms_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(prepared: Prepared, fit: Fit) -> int:
        for identity, correction in prepared.bias_corrections.items():
            prepared.bias_corrections[identity] = correction + 3
        prepared.ranges.choose(":layers.2", torch.tensor(0.0), torch.tensor(0.1))
        return 1

    monkeypatch.setitem(STEPS, "harm", Step(harm, 1))
    _, prepared, calls = climbed(("scale_depthwise", "harm"))
    kept, undone = prepared.accuracy_steps
    assert (kept.name, kept.kept) == ("scale_depthwise", True)
    assert kept.after_db > kept.before_db + 1
    assert not undone.kept
    assert undone.after_db < undone.before_db
    # What the harmful step did is gone: the result is that of the ladder without it.
    _, without, _ = climbed(("scale_depthwise",))
    assert output_snr(prepared, calls) == output_snr(without, calls)
    assert "undone" in str(undone)


def test_a_step_that_most_samples_of_one_fold_lose_by_is_not_fitted_in_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fitted: list[int] = []

    def harm(prepared: Prepared, fit: Fit) -> int:
        fitted.append(len(fit.calls))
        prepared.ranges.choose(":layers.2", torch.tensor(0.0), torch.tensor(0.1))
        return 1

    def nothing(prepared: Prepared, fit: Fit) -> int:
        fitted.append(0)
        return 0

    monkeypatch.setitem(STEPS, "harm", Step(harm, 1))
    monkeypatch.setitem(STEPS, "nothing", Step(nothing, 1))
    _, prepared, _ = climbed(("harm", "nothing"))
    harmful, idle = prepared.accuracy_steps
    assert [bool(number) for number in fitted] == [True, False, False]
    assert harmful.after_db < harmful.before_db - 3
    assert not harmful.kept
    assert not idle.kept
    assert idle.after_db == idle.before_db


def test_no_call_judges_what_was_fitted_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list] = []
    judged: list[list] = []

    def look(prepared: Prepared, fit: Fit) -> int:
        fitted.append([args[0] for args, _ in fit.calls])
        return 1

    def watched(prepared: Prepared, calls: list, known: list) -> list[float]:
        judged.append([args[0] for args, _ in calls])
        return output_snrs(prepared, calls, known)

    monkeypatch.setitem(STEPS, "look", Step(look, 1))
    monkeypatch.setattr(ladder, "output_snrs", watched)
    _, _, calls = climbed(("look",))
    quarters = [[args[0] for args, _ in calls[start::4]] for start in (0, 1)]
    others = [[args[0] for place, (args, _) in enumerate(calls) if place % 4 != start] for start in (0, 1)]
    for seen, expected in zip((*fitted, *judged[:2]), (*others, *quarters), strict=True):
        assert len(seen) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


def test_a_step_that_fits_one_call_and_harms_the_others_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def overfit(prepared: Prepared, fit: Fit) -> int:
        """Find the shift of the last bias that is best for the first call alone, as luck has it there."""
        best, found = output_snr(prepared, fit.calls[:1]), 0
        identity = ":layers.6"
        before = prepared.bias_corrections[identity]
        for seed in range(40):
            noise = 0.02 * torch.randn(len(before), generator=torch.Generator().manual_seed(seed))
            prepared.bias_corrections[identity] = before + noise
            reached = output_snr(prepared, fit.calls[:1])
            if reached > best:
                best, found = reached, seed
        shift = torch.randn(len(before), generator=torch.Generator().manual_seed(found))
        prepared.bias_corrections[identity] = before + 0.02 * shift
        return 1

    monkeypatch.setitem(STEPS, "overfit", Step(overfit, 1))
    _, prepared, calls = climbed(("overfit",))
    _, plain, _ = climbed(())
    assert [step.kept for step in prepared.accuracy_steps] == [False]
    assert output_snrs(prepared, calls) == output_snrs(plain, calls)


def test_most_calls_must_not_pay_for_a_few() -> None:
    assert ladder.helps([10.0, 10.0, 10.0, 10.0], [11.0, 11.0, 9.5, 9.5])
    assert not ladder.helps([10.0, 10.0, 10.0, 10.0], [90.0, 9.0, 9.0, 9.0])
    assert not ladder.helps([10.0, 10.0], [11.0, 8.0])
    assert not ladder.helps([10.0, 10.0], [float("nan"), 20.0])
    assert not ladder.helps([10.0, 10.0], [10.0, 10.0])


def test_what_else_the_machine_does_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = RECIPES["int8_accurate"].accuracy_steps
    _, quiet, calls = climbed(steps)
    jumps = itertools.count(0.0, 1e6)
    for clock in ("time", "monotonic", "perf_counter", "process_time"):
        monkeypatch.setattr(time, clock, lambda: next(jumps))
    _, loaded, _ = climbed(steps)
    monkeypatch.undo()
    kept = [[(step.name, step.kept, step.after_db) for step in p.accuracy_steps] for p in (quiet, loaded)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == len(steps)
    assert output_snrs(quiet, calls) == output_snrs(loaded, calls)


@pytest.mark.parametrize("name", ["depthwise", "residual", "branching"])
def test_the_accurate_recipe_is_never_below_the_plain_one_on_what_it_saw(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    calls = [case.call(8) for _ in range(4)]
    reached = []
    for recipe in ("int8", "int8_accurate"):
        prepared = prepare(case.build(), *calls[0], recipe=recipe, observer="mse")
        calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
        reached.append(output_snr(prepared, calls))
    assert reached[1] >= reached[0]


def test_in_the_end_all_calls_count() -> None:
    _, plain, calls = climbed(())
    _, nothing_kept, _ = climbed(("migrate",))
    assert [step.kept for step in nothing_kept.accuracy_steps] == [False]
    assert output_snr(nothing_kept, calls) == output_snr(plain, calls)
    _, prepared, _ = climbed(("scale_depthwise",))
    assert [step.kept for step in prepared.accuracy_steps] == [True]
    STEPS["scale_depthwise"].run(plain, Fit(calls))
    assert output_snrs(prepared, calls) == output_snrs(plain, calls)
    for edge, channels in plain.channels.items():
        assert torch.equal(channels.factor, prepared.channels[edge].factor)


def test_a_step_that_takes_more_work_than_is_left_is_left_out() -> None:
    _, prepared, _ = climbed(("scale_depthwise",), max_passes=0.0)
    assert prepared.accuracy_steps == ()
    assert not prepared.layers
    passes = 2.5 * STEPS["correct_outputs"].passes + 2
    _, prepared, _ = climbed(("adaround", "correct_outputs", "equalize"), max_passes=float(passes))
    assert [step.name for step in prepared.accuracy_steps] == ["correct_outputs"]


def test_refusals() -> None:
    with pytest.raises(QuantizationError, match=r"`accuracy_steps` out of .* but got \['magic'\]"):
        prepare(uneven(nn.ReLU), (images(8),), recipe=Recipe(accuracy_steps=("magic",)))
    unfit = Recipe(accuracy_steps=("choose_ranges",), calibration_observer="min_max")
    with pytest.raises(QuantizationError, match=r"'mse' or 'percentile' for .* but got 'min_max'"):
        prepare(uneven(nn.ReLU), (images(8),), recipe=unfit)
    model = uneven(nn.ReLU)
    prepared = prepare(model, (images(8),), recipe="int8_accurate", observer="mse")
    with pytest.raises(CalibrationError, match="at least two calibration batches for recipe 'int8_accurate'"):
        calibrate(prepared, steps_of(prepared, [images(8)]))
    wrong_observer = prepare(model, (images(8),), recipe=Recipe(accuracy_steps=("choose_ranges",)), observer="min_max")
    with pytest.raises(QuantizationError, match=r"histogram observer, but got 'min_max'"):
        calibrate(wrong_observer, steps_of(wrong_observer, images(16).split(8)))


@pytest.mark.parametrize("name", ["depthwise", "residual", "branching", "squeeze_excite"])
def test_the_whole_ladder_on_nets_of_all_kinds(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    calls = [case.call(8) for _ in range(4)]
    steps = tuple(step for step in STEPS if step != "adaround")
    prepared = prepare(model, *calls[0], recipe=Recipe(accuracy_steps=steps, align_channels=False), observer="mse")
    before = [parameter.clone() for parameter in model.state_dict().values()]
    calibrate(prepared, steps_of(prepared, [args for args, _ in calls]))
    assert len(prepared.accuracy_steps) == len(steps)
    assert [step.name for step in prepared.accuracy_steps] == list(steps)
    values = [step.after_db for step in prepared.accuracy_steps if step.kept]
    assert values == sorted(values)
    check_agreement(prepared, convert(prepared), *calls[0])
    for old, new in zip(before, model.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_the_accurate_recipe_makes_an_artifact_that_runs_in_integers(tmp_path: Path) -> None:
    model = uneven(nn.ReLU6)
    artifact = lq.quantize(
        model, "int8_accurate", calibration_data=images(64).split(8), output_dir=tmp_path / "artifact", threads=1
    )
    assert artifact.report["still_float"] == {}
    assert any("scale_channels" in note and "kept" in note for note in artifact.report["notes"])
    plain = lq.quantize(
        model,
        Recipe(align_channels=False),
        calibration_data=images(64).split(8),
        output_dir=tmp_path / "plain",
        threads=1,
    )
    assert artifact.report["parity"]["quantization_db"] > plain.report["parity"]["quantization_db"] + 1


def test_difficulty_behind_a_layer_norm_migrates_into_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normalized().eval()
    with torch.no_grad():
        for layer in (model.one, model.other):
            layer.weight[:, [3, 20]] /= 40
    x = torch.randn(128, 32, generator=torch.Generator().manual_seed(1))
    recipe = Recipe(accuracy_steps=("migrate",))
    prepared = prepare(model, (x[:16],), recipe=recipe, observer="mse")
    calibrate(prepared, steps_of(prepared, list(x.split(16))))
    (step,) = prepared.accuracy_steps
    assert step.kept
    assert step.after_db > step.before_db + 5
    check_agreement(prepared, convert(prepared), (x,), {})
    artifact = lq.quantize(model, recipe, calibration_data=x.split(16), output_dir=tmp_path / "artifact", threads=1)
    assert artifact.report["still_float"] == {}
    assert artifact.report["parity"]["worst_share"] > 0.999


def test_nothing_migrates_where_no_linear_layer_reads_a_float_operator() -> None:
    _, prepared, _ = climbed(("migrate",))
    assert [(step.changed, step.kept) for step in prepared.accuracy_steps] == [(0, False)]


def test_nothing_migrates_without_a_layer_norm() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    prepared = prepare(nn.Sequential(nn.Linear(8, 4)).eval(), (x,), recipe=Recipe(accuracy_steps=("migrate",)))
    calibrate(prepared, steps_of(prepared, list(x.split(16))))
    assert [step.changed for step in prepared.accuracy_steps] == [0]
