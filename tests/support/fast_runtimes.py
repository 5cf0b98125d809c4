"""Two runtimes that export quickly, one of which is the fastest by far."""

from typing import Any

import pytest

from lightning_quant import runtimes
from lightning_quant.export import auto as automatic
from lightning_quant.machine.latency import Timing


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runtimes that export quickly, without float models of theirs."""
    monkeypatch.setattr(runtimes, "names", lambda: ["onnxruntime", "openvino"])
    monkeypatch.setattr(automatic, "_float_peer", lambda *_: {})


def faster(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a runtime, or float in one, be the fastest by far; the contestants are called all the same."""

    def timed(contestants: dict[str, Any], **_: Any) -> dict[str, Timing]:
        for call in contestants.values():
            call()
        return {n: Timing(1.0 if n == name else 9.0, 1.0, 9.0, 7) for n in contestants}

    monkeypatch.setattr(automatic, "measure", timed)
