"""What commands compare artifacts by."""

import dataclasses
from types import SimpleNamespace

from lightning_quant.report.metrics import MetricRow
from lightning_quant.report.summary import columns, summary


def test_users_metrics_cannot_hide_what_the_summary_says() -> None:
    names = {"bytes": (1.0, 2.0), "runtime": (3.0, 4.0), "schema_version": (5.0, 6.0)}
    rows = [MetricRow(name, before, before, after) for name, (before, after) in names.items()]
    report = {"metrics": list(map(dataclasses.asdict, rows)), "scalars": {"quant/speedup/batch_1": 1.5}}
    manifest, plan = {"recipe": "int8", "runtime": "onnxruntime"}, {"coverage": 1.0}
    artifact = SimpleNamespace(path="q", manifest=manifest, size_bytes=1234, plan=plan, report=report)
    found = summary(artifact)  # type: ignore[arg-type]

    assert (found["schema_version"], found["bytes"], found["runtime"]) == (1, 1234, "onnxruntime")
    assert found["metrics"]["bytes"] == {
        "float": 1.0,
        "artifact": 2.0,
        "delta": 1.0,
        "margin": None,
        "higher_is_better": None,
    }
    assert found["speedup"] == {"1": 1.5}
    cells = columns(found)
    assert cells["", "bytes"] == "1,234"
    assert cells["metric", "bytes"] == "2.0000"
