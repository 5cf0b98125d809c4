import json
import math

import pytest
from reports import changed, of_layers, timing

from lightning_quant.report.metrics import MetricRow
from lightning_quant.report.speed import LatencyRow
from lightning_quant.simulate.parity import Parity

GOOD = changed()

BAD_PARITY = Parity("layer1.add", 0.42, 30.0, 12.0, 0.5)


# --- warnings


def test_good_report_has_no_warnings() -> None:
    assert GOOD.warnings == []
    assert "Warning" not in GOOD.to_markdown()


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


def test_keys_begin_with_a_callbacks_name() -> None:
    named = GOOD.scalars("quant/int8-openvino")

    assert {f"quant/{key.removeprefix('quant/int8-openvino/')}" for key in named} == set(GOOD.scalars())
    assert named["quant/int8-openvino/size_ratio"] == 0.25


# --- numbers


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


# --- files and terminal


def test_json_holds_everything_and_what_follows_from_it() -> None:
    values = json.loads(json.dumps(changed(artifact_bytes=6000).to_dict()))

    assert values["size_ratio"] == 1.5
    assert values["warnings"] == ["the artifact is larger than the float model: 1.50 times its bytes"]
    assert values["scalars"]["quant/artifact_bytes"] == 6000
    numbers = {
        "float_value": 0.9,
        "simulated": 0.895,
        "artifact": 0.89,
        "before": None,
        "num_samples": None,
        "margin": None,
    }
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


# --- recipes of layers


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
