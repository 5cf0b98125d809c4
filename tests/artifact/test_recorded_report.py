"""What a manifest may say was measured, whoever wrote it."""

import json
from typing import Any

import pytest
from reports import changed

from lightning_quant.artifact.recorded_report import is_report

WRITTEN = json.loads(json.dumps(changed().to_dict()))


def test_reports_of_ours_and_parts_of_them_are_reports() -> None:
    assert is_report(WRITTEN)
    assert is_report({})
    assert is_report({"metrics": [{"name": "acc", "artifact": "nan"}], "of a later version": object()})


@pytest.mark.parametrize(
    "part",
    [
        {"warnings": "one"},
        {"size_ratio": "small"},
        {"size_ratio": True},
        {"threads": 0},
        {"threads": 10**9},
        {"cpu": None},
        {"scalars": {"a": []}},
        {"metrics": [{"artifact": 1.0}]},
        {"metrics": [{"name": "acc", "higher_is_better": "yes"}]},
        {"latency": [{"batch": 1, "torch_float": {"median_ms": 0.0}}]},
        {"latency": [{"batch": 2**30, "torch_float": {"median_ms": 1.0}}]},
    ],
    ids=str,
)
def test_what_commands_could_not_compute_with_is_none(part: dict[str, Any]) -> None:
    assert not is_report({**WRITTEN, **part})
    assert not is_report([part])
