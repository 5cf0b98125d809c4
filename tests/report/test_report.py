import dataclasses
import json
import math
from typing import Any

import pytest
from reports import GOOD_VALUES, changed, row, timing

from lightning_quant.measure.advice import Advice
from lightning_quant.measure.sensitivity import OperatorSensitivity, Sensitivity
from lightning_quant.planned.layer_parity import LayerParity
from lightning_quant.report.metrics import MetricRow
from lightning_quant.report.report import Report
from lightning_quant.report.speed import LatencyRow
from lightning_quant.simulate.parity import Parity

GOOD = changed()
METRICS, LATENCY = GOOD_VALUES["metrics"], GOOD_VALUES["latency"]

BAD_PARITY = Parity("layer1.add", 0.42, 30.0, 12.0, 0.5)


LAYER = OperatorSensitivity(
    *("stem.0", "conv2d", 0.02, 0.001, 0.021, 0.004, 17.0, 0.0, 6.0, 0.001), widest=40.0, spread=3.0, float_bytes=12_000
)


def test_no_layer_is_advised_that_moves_no_metric() -> None:
    found = Sensitivity((LAYER,), 0.02, Advice(("stem.0",), 0.01, 3000))
    assert found.with_gains({"acc": 0.00004, "loss": -0.00002}).advice is None
    nothing = found.with_gains({"acc": 0.0, "loss": -0.003})
    assert nothing.advice is None
    assert "keeping it float makes no metric better (acc +0.0000, loss -0.0030)" in nothing.explanation()
    # A gain is one in the metric's own direction, and losses count where there is nothing else.
    assert found.with_gains({"acc": -0.1}).advice is None
    assert found.with_gains({"acc": 0.1, "loss": 0.2}).advice is found.advice
    assert found.with_gains({"val_loss": -0.1}).advice is found.advice
    assert found.with_gains({"val_loss": 0.1}).advice is None
    assert found.with_gains({"perplexity": 0.1}, {"perplexity": False}).advice is None
    assert found.with_gains({"perplexity": 0.1}).advice is found.advice


def test_sensitivity_stands_in_the_report_where_it_was_asked_for() -> None:
    advice = Advice(("stem.0", "stem.3"), 0.004, 12_000)
    layers = (LAYER, dataclasses.replace(LAYER, name="head", without_error=0.019))
    found = Sensitivity(layers, 0.02, advice, {"val_acc": 0.008})
    text = changed(sensitivity=found).to_markdown()

    assert (
        "80% of the error comes from stem.0, weights, range 40 times its median channel; keep it and what "
        'shares its tensors float with `overrides={"stem.0": "float", "stem.3": "float"}`: '
        "val_acc +0.0080, +7.0 dB, +12 KB."
    ) in text
    assert text.index("| stem.0") < text.index("| head")
    assert changed(sensitivity=found).to_dict()["sensitivity"]["layers"][1]["name"] == "head"
    assert "of the error comes from" not in GOOD.to_markdown()
    assert "report.json" not in text
    many = Sensitivity(tuple(dataclasses.replace(LAYER, name=f"layer{index}") for index in range(30)), 0.02)
    text = changed(sensitivity=many).to_markdown()
    assert text.count("| layer") == 10 + 1  # and the header
    assert "The other 20 operators are in report.json." in text


# --- warnings


def test_good_report_has_no_warnings() -> None:
    assert GOOD.warnings == []
    assert "Warning" not in GOOD.to_markdown()


def test_larger_artifact_is_a_warning() -> None:
    report = changed(artifact_bytes=6000)

    assert report.warnings == ["the artifact is larger than the float model: 1.50 times its bytes"]


def test_artifact_as_large_as_float_is_none() -> None:
    assert changed(artifact_bytes=4000).warnings == []


def test_slower_artifact_is_a_warning_for_its_batch() -> None:
    slower = LatencyRow(1, timing(10), timing(4), timing(5))

    assert changed(latency=(slower, LATENCY[1])).warnings == [
        "the artifact is slower than float at batch 1: 1.25 times the time"
    ]


def test_artifact_faster_than_one_float_peer_only_is_slower() -> None:
    # Twice as fast as torch, but the same runtime in float is faster still.
    (warning,) = changed(latency=(LatencyRow(8, timing(10), timing(4), timing(5)),)).warnings

    assert "slower than float at batch 8" in warning


def test_failed_parity_is_a_warning() -> None:
    operator, end_to_end = changed(parity=BAD_PARITY).warnings

    assert operator.startswith("parity FAILED: at layer1.add only 42.00% of the values")
    assert end_to_end.startswith("parity FAILED: the artifact is 12.0 dB from its simulation, which is 30.0 dB")


def test_operators_that_fell_back_to_float_are_a_warning() -> None:
    assert changed(still_float={"conv2d": 2}).warnings == ["2 planned int8 conv2d still run in float"]


def test_warnings_come_first_and_the_worst_at_the_top() -> None:
    report = changed(
        parity=BAD_PARITY,
        artifact_bytes=6000,
        latency=(LatencyRow(1, timing(10), timing(4), timing(5)),),
        still_float={"add": 1},
    )
    text = report.to_markdown()
    blocks = text.split("\n\n")
    kinds = ["parity FAILED", "parity FAILED", "larger than", "slower than", "still run in float"]

    assert [kind in warning for kind, warning in zip(kinds, report.warnings, strict=True)] == [True] * 5
    assert blocks[0].startswith("# ")
    assert all(block.startswith("**Warning:**") for block in blocks[1:6])
    assert text.index("still run in float") < text.index("| validation")
    assert str(report) == text


def low(*rows: dict[str, Any], coverage: float, weight_coverage: float = 1.0, **values: Any) -> list[str]:
    plan = {**GOOD_VALUES["plan"], "rows": list(rows), "coverage": coverage, "weight_coverage": weight_coverage}
    return changed(plan=plan, **values).warnings


def test_little_in_integers_is_a_warning_with_what_would_help() -> None:
    rows = (row("conv", "Conv2d", "int8", "", 10, 90), row("rnn", "GRU", "float", "as a whole", 90, 10))
    (warning,) = low(*rows, coverage=0.1)
    assert warning.startswith(
        "only 10.0% of the multiply-adds run as 'int8' asks, most of the rest is in rnn (GRU: as a"
    )
    assert "int8_weight_only" in warning
    assert "int8_dynamic" in warning
    assert low(rows[0], row("rnn", "GRU", "float", "as a whole", 9, 10), coverage=0.55) == []


def test_layers_that_are_stored_compute_in_float() -> None:
    rows = (row("conv", "Conv2d", "int8", "", 10, 10), row("rnn", "GRU", "int8 weights", "", 90, 90))
    (warning,) = low(*rows, row("mean", "mean", "float", "nothing reads it"), coverage=0.1)
    assert "most of the rest is in rnn (GRU: int8 weights)" in warning


def test_few_stored_weights_are_a_warning_with_what_would_help() -> None:
    rows = (row("fc", "Linear", "int8", "", 10, 10), row("words", "Embedding", "float", "as a whole", 0, 90))
    (warning,) = low(*rows, coverage=1.0, weight_coverage=0.1)
    assert warning.startswith("only 10.0% of the weights' bytes are stored with fewer bits")
    assert "int8_weight_only" in warning


def test_what_the_user_keeps_float_is_no_warning() -> None:
    head = row("head", "Linear", "float", 'excluded by "head"', 90, 90, excluded=True)
    assert low(row("conv", "Conv2d", "int8", "", 10, 10), head, coverage=0.1, weight_coverage=0.1) == []


def test_the_share_of_the_whole_step_stands_beside_that_of_the_module() -> None:
    report = changed(step_share=0.02)
    assert report.scalars()["quant/coverage"] == 0.75
    assert report.scalars()["quant/step_coverage"] == pytest.approx(0.015)
    assert "The module makes 2.0% of the LightningModule's step: that is 1.5% of the multiply-adds" in str(report)
    assert "LightningModule's step" not in str(GOOD)


@pytest.mark.parametrize(
    ("row", "fails"),
    [
        # darts' Transformer, whose validation ran the training graph: a gain that is none.
        (MetricRow("val_loss", 0.9699, 0.9699, 0.9409, num_samples=200), True),
        (MetricRow("val_loss", 3.209, 3.212, 0.010), True),
        (MetricRow("val_accuracy", 0.9, 0.895, 0.89), False),
        # Two of sixteen predictions may tip, three may not.
        (MetricRow("val_accuracy", 0.9375, 0.9375, 0.8125, num_samples=16), False),
        (MetricRow("val_accuracy", 0.9375, 0.9375, 0.75, num_samples=16), True),
        (MetricRow("val_loss", 0.0, 0.0, 0.0), False),
        (MetricRow("val_loss", 1.0, 1.1, math.nan), True),
        (MetricRow("val_loss", 1.0, math.nan, math.nan), False),
        (MetricRow("val_loss", 1.0, 1.1, None), False),
    ],
)
def test_metric_far_from_the_simulated_one_is_failed_parity(row: MetricRow, fails: bool) -> None:
    report = changed(metrics=(row,))

    assert bool(report.failures) is fails
    assert report.scalars()["quant/parity_failed"] == float(fails)
    if fails:
        assert report.warnings[0].startswith(f"parity FAILED: {row.name} is ")
        assert "ran something else" in report.to_markdown().split("\n\n")[1]


def test_trained_weights_without_rounding_are_no_measure() -> None:
    row = MetricRow("val_loss", 1.0884, 0.6555, 0.75, num_samples=1000)

    assert changed(metrics=(row,)).failures == []
    assert len(changed(metrics=(row,), trained=True).failures) == 1


def test_float_is_named_for_what_it_is_after_training_through_rounding() -> None:
    row = MetricRow("val_loss", 1.0884, 0.6555, 0.6556)
    text = changed(metrics=(row,), trained=True).to_markdown()
    assert "| trained weights without rounding |" in text
    assert "no validation ran before rounding began" in text

    report = changed(metrics=(dataclasses.replace(row, before=0.6977),), trained=True)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.to_markdown().splitlines()]
    assert ["val_loss", "0.6977", "1.0884", "0.6555", "0.6556", "-0.4328"] in cells
    assert "float, before rounding began" in report.to_markdown()
    assert "no validation ran" not in report.to_markdown()
    assert report.scalars()["quant/float_before/val_loss"] == 0.6977


def test_keys_begin_with_a_callbacks_name() -> None:
    named = GOOD.scalars("quant/int8-openvino")

    assert {f"quant/{key.removeprefix('quant/int8-openvino/')}" for key in named} == set(GOOD.scalars())
    assert named["quant/int8-openvino/size_ratio"] == 0.25


# --- numbers


def test_delta_is_artifact_minus_float() -> None:
    assert METRICS[0].delta == pytest.approx(-0.01)
    assert MetricRow("x", 0.5, None, None).delta is None
    assert MetricRow("x", None, 0.5, 0.5).delta is None


def test_best_float_peer_is_the_faster_one() -> None:
    assert LATENCY[0].best_float_ms == 4
    assert LATENCY[0].speedup == 2
    assert LATENCY[1].best_float_ms == 100
    assert LATENCY[1].speedup == 2


def test_without_a_runtime_peer_torch_is_the_best_float() -> None:
    row = LatencyRow(1, timing(10), None, timing(2))

    assert row.best_float_ms == 10
    assert row.speedup == 5


def test_scalars_are_all_numbers_under_one_prefix() -> None:
    scalars = GOOD.scalars()

    assert all(type(value) is float for value in scalars.values())
    assert scalars == {
        "quant/float_bytes": 4000,
        "quant/artifact_bytes": 1000,
        "quant/size_ratio": 0.25,
        "quant/checkpoint_bytes": 12000,
        "quant/coverage": 0.75,
        "quant/step_coverage": 0.75,
        "quant/weight_coverage": 0.8,
        "quant/float/val_accuracy": 0.9,
        "quant/simulated/val_accuracy": 0.895,
        "quant/artifact/val_accuracy": 0.89,
        "quant/delta/val_accuracy": pytest.approx(-0.01),
        "quant/float/val_loss": 0.3,
        "quant/simulated/val_loss": 0.31,
        "quant/artifact/val_loss": 0.32,
        "quant/delta/val_loss": pytest.approx(0.02),
        "quant/latency_ms/batch_1": 2,
        "quant/float_latency_ms/batch_1": 4,
        "quant/speedup/batch_1": 2,
        "quant/latency_ms/batch_32": 50,
        "quant/float_latency_ms/batch_32": 100,
        "quant/speedup/batch_32": 2,
        "quant/parity_worst_share": 1,
        "quant/parity_failed": 0,
        "quant/seconds/export": 1.5,
    }


def test_scalars_leave_out_what_was_not_measured() -> None:
    scalars = changed(
        checkpoint_bytes=None,
        metrics=(MetricRow("val loss/dataloader_idx_0", 0.5, None, None),),
        latency=(),
        parity=None,
    ).scalars()

    assert scalars["quant/float/val_loss/dataloader_idx_0"] == 0.5
    assert not any(
        name.startswith(("quant/artifact/", "quant/delta", "quant/parity", "quant/check")) for name in scalars
    )


def test_failed_parity_is_a_scalar_too() -> None:
    assert changed(parity=BAD_PARITY).scalars()["quant/parity_failed"] == 1


# --- files and terminal


def test_json_holds_everything_and_what_follows_from_it() -> None:
    values = json.loads(json.dumps(changed(artifact_bytes=6000).to_dict()))

    assert values["size_ratio"] == 1.5
    assert values["warnings"] == ["the artifact is larger than the float model: 1.50 times its bytes"]
    assert values["scalars"]["quant/artifact_bytes"] == 6000
    numbers = {"float_value": 0.9, "simulated": 0.895, "artifact": 0.89, "before": None, "num_samples": None}
    assert values["metrics"][0] == {"name": "val_accuracy", "higher_is_better": None, **numbers}
    assert values["latency"][0]["runtime_float"]["median_ms"] == 4
    assert values["parity"]["worst_operator"] == "layer1.add"
    assert values["plan"]["rows"][2]["reason"] == "no integer kernel"


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_json_writes_what_is_not_finite_as_text(value: float) -> None:
    report = changed(parity=Parity("", 1.0, 30.0, value, None), metrics=(MetricRow("m", value, value, value),))
    values = report.to_dict()
    json.dumps(values, allow_nan=False)

    assert values["parity"]["artifact_db"] == str(value)


def test_markdown_tells_a_reader_all_there_is() -> None:
    text = GOOD.to_markdown()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]

    assert text.startswith("# int8 on onnxruntime\n")
    assert ["float weights", "4,000", "1.00"] in lines
    assert ["training checkpoint", "12,000", "3.00"] in lines
    assert ["artifact", "1,000", "0.25"] in lines
    assert ["val_accuracy", "0.9000", "0.8950", "0.8900", "-0.0100"] in lines
    assert ["val_loss", "0.3000", "0.3100", "0.3200", "+0.0200"] in lines
    assert ["1", "10 (9 to 11)", "4 (3.6 to 4.4)", "2 (1.8 to 2.2)", "2.00"] in lines
    assert ["gelu", "GELU", "", "no integer kernel"] in lines
    assert ["lstm", "LSTM", "25.0%", "it runs as a whole"] in lines
    assert "80.0% of the weights' bytes are stored with fewer bits" in text
    assert "on 2 threads, A processor" in text
    assert "Parity ok" in text
    assert "Note: weights are the best ones." in text
    assert "75.0% of the multiply-adds" in text
    assert "3 QLinearConv, 1 QGemm" in text
    assert "export 1.5" in text


def test_markdown_shows_gaps_as_dashes() -> None:
    text = changed(
        metrics=(MetricRow("val_loss", 0.3, None, None),), latency=(LatencyRow(1, timing(10), None, timing(2)),)
    ).to_markdown()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]

    assert ["val_loss", "0.3000", "-", "-", "-"] in cells
    assert ["1", "10 (9 to 11)", "-", "2 (1.8 to 2.2)", "5.00"] in cells


def test_markdown_leaves_out_tables_without_rows() -> None:
    text = changed(metrics=(), latency=(), parity=None, checkpoint_bytes=None, notes=()).to_markdown()

    assert not any(word in text for word in ("validation", "Median", "Parity", "checkpoint", "Note"))


def test_markdown_names_failed_parity() -> None:
    assert "Parity FAILED: every operator" not in GOOD.to_markdown()
    assert "FAILED" in changed(parity=BAD_PARITY).to_markdown().split("\n\n")[1]


# --- recipes of layers


def of_layers(*, share: float = 1.0, parity: LayerParity | None = None, **changes: Any) -> Report:
    layer = {**row("lstm", "LSTM", "int8 weights", "", 10, 10), **changes}
    shares = {"coverage": 1.0, "weight_coverage": share, "stored_share": share}
    plan = {"recipe": "int8_dynamic", "graphs": [], "rows": [layer], **shares}
    return changed(recipe="int8_dynamic", runtime="torch", plan=plan, parity=parity, min_stored_share=0.75)


def test_too_few_stored_weights_have_failed() -> None:
    (warning,) = of_layers(share=0.74, reason="int8 dynamic: 3.0 dB").warnings
    assert warning.startswith("int8_dynamic FAILED: only 74.0% of the weights' values are stored with fewer bits")
    assert warning.endswith("less than 75%")
    assert warning in of_layers(share=0.74).to_markdown()
    assert of_layers(share=0.75).warnings == []


def test_layers_and_their_reasons_are_in_the_text() -> None:
    text = of_layers(reason="int8 dynamic: 3.0 dB signal-to-noise where 20 are wanted").to_markdown()
    assert "Layers: 1 int8 weights; 100.0% of the weights' values are stored with fewer bits" in text
    assert "int8 dynamic: 3.0 dB signal-to-noise where 20 are wanted" in text
    text = of_layers(action="float", reason='excluded by "lstm"', excluded=True).to_markdown()
    assert "100.0% of the weights' values that are not excluded are stored with fewer bits" in text


@pytest.mark.parametrize(
    ("quantization_db", "float_artifact_db", "fails"),
    [(30.0, 29.0, False), (30.0, 26.5, True), (90.0, 61.0, False), (90.0, 59.0, True), (20.0, math.nan, True)],
)
def test_parity_of_layers(quantization_db: float, float_artifact_db: float, fails: bool) -> None:
    parity = LayerParity(quantization_db, 40.0, float_artifact_db, None)
    report = of_layers(parity=parity)
    assert bool(report.warnings) is fails
    assert report.scalars()["quant/parity_failed"] == float(fails)
    assert ("Parity FAILED" if fails else "Parity ok") in report.to_markdown()
    json.dumps(report.to_dict(), allow_nan=False)
