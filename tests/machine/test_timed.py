import pytest

from lightning_quant.machine import timed as module
from lightning_quant.machine.timed import timed


def test_a_stage_has_the_seconds_of_its_block_once_that_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    seconds: dict[str, float] = {}
    with timed(seconds, "export"):
        assert not seconds
    with pytest.raises(ValueError, match="no"), timed(seconds, "convert"):
        raise ValueError("no")
    assert seconds == {"export": 2.5}
