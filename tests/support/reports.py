"""Reports of made-up values."""

from typing import Any

from lightning_quant.machine.latency import Timing
from lightning_quant.planned.layer_parity import LayerParity
from lightning_quant.report.agreement import Agreement
from lightning_quant.report.changed import Changed
from lightning_quant.report.coverage import Coverage
from lightning_quant.report.limits import NO_LIMITS
from lightning_quant.report.make_report import with_limits
from lightning_quant.report.metrics import MetricRow, Metrics
from lightning_quant.report.noise import NoiseSection
from lightning_quant.report.numbers import Numbers
from lightning_quant.report.ranking import Ranking
from lightning_quant.report.remarks import Notes, Seconds
from lightning_quant.report.report import Report
from lightning_quant.report.size import Size
from lightning_quant.report.speed import LatencyRow, Speed
from lightning_quant.simulate.parity import Parity


def timing(median_ms: float) -> Timing:
    return Timing(float(median_ms), 0.9 * median_ms, 1.1 * median_ms, 20)


def row(
    name: str, kind: str, action: str, reason: str = "", macs: int = 0, weights: int = 0, *, excluded: bool = False
) -> dict[str, Any]:
    fixed = {"name": name, "kind": kind, "action": action, "reason": reason}
    return {**fixed, "macs": macs, "weights": weights, "excluded": excluded}


GOOD_VALUES: dict[str, Any] = {
    "recipe": "int8",
    "runtime": "onnxruntime",
    "cpu": "A processor",
    "threads": 2,
    "versions": {"torch": "2.13.0"},
    "float_bytes": 4000,
    "checkpoint_bytes": 12000,
    "artifact_bytes": 1000,
    "metrics": (MetricRow("val_accuracy", 0.9, 0.895, 0.89), MetricRow("val_loss", 0.3, 0.31, 0.32)),
    "latency": (
        LatencyRow(1, timing(10), timing(4), timing(2)),
        LatencyRow(32, timing(100), timing(120), timing(50)),
    ),
    "parity": Parity("layer1.add", 1.0, 30.0, 60.0, 1.0),
    "still_float": {},
    "operators": {"QLinearConv": 3, "QGemm": 1},
    "seconds": {"export": 1.5},
    "plan": {
        "recipe": "int8",
        "graphs": [{}],
        "coverage": 0.75,
        "weight_coverage": 0.8,
        "stored_share": 0.8,
        "rows": [
            row("conv", "Conv2d", "int8", "", 300, 80),
            row("bn", "BatchNorm2d", "fused", "into conv"),
            row("gelu", "GELU", "float", "no integer kernel"),
            row("lstm", "LSTM", "float", "it runs as a whole", 100, 20),
        ],
    },
    "notes": ("weights are the best ones",),
}


NOTHING: dict[str, Any] = {"changed": None, "numbers": (), "operator_ms": {}}


def changed(**values: Any) -> Report:
    """Return a good report but for some values, whichever section they belong to."""
    v = {**GOOD_VALUES, "trained": False, "sensitivity": None, "step_share": 1.0, "noise": None, **NOTHING, **values}
    least = v.get("min_stored_share")
    sections = (
        Metrics(v["metrics"], v["trained"]),
        NoiseSection(v["noise"], "Keep it float"),
        Size(v["float_bytes"], v["checkpoint_bytes"], v["artifact_bytes"]),
        Speed(v["latency"], v["runtime"], v["threads"], v["cpu"]),
        Agreement(v["parity"]),
        Changed(v["changed"]),
        Notes(v["notes"]),
        Ranking(v["sensitivity"]),
        Coverage(v["plan"], v["operators"], v["still_float"], v["step_share"], least),
        Numbers(v["numbers"], v["operator_ms"]),
        Seconds(v["seconds"]),
    )
    return with_limits(Report(v["recipe"], v["runtime"], v["versions"], sections), v.get("limits", NO_LIMITS))


def of_layers(*, share: float = 1.0, parity: LayerParity | None = None, **changes: Any) -> Report:
    layer = {**row("lstm", "LSTM", "int8 weights", "", 10, 10), **changes}
    shares = {"coverage": 1.0, "weight_coverage": share, "stored_share": share}
    plan = {"recipe": "int8_dynamic", "graphs": [], "rows": [layer], **shares}
    return changed(recipe="int8_dynamic", runtime="torch", plan=plan, parity=parity, min_stored_share=0.75)
