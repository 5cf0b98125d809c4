"""Settings of the whole process are as they were when the last of several threads is done with them."""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quant import load, quantize
from lightning_quant.surgery.process import quantized_engine, resizable_results, torch_threads


def settings() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.backends.quantized.engine,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


def overlap(context: Callable[[], AbstractContextManager[None]]) -> list[tuple[Any, ...]]:
    """Let one thread enter, a second one enter, the first one leave, then the second; return what each saw at its end.

    The first and the last entry are of a third thread, begun inside and after both.
    """
    entered, left = threading.Event(), threading.Event()
    seen: list[tuple[Any, ...]] = []

    def first() -> None:
        with context():
            other = threading.Thread(target=second)
            other.start()
            entered.wait(60)
        seen.append(settings())
        left.set()
        other.join()

    def second() -> None:
        with context():
            entered.set()
            left.wait(60)
        seen.append(settings())

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    last = threading.Thread(target=lambda: seen.append(settings()))
    last.start()
    last.join()
    return seen


@pytest.mark.parametrize("warn_only", [False, True])
def test_determinism_is_given_back_by_the_last(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        before = settings()
        assert overlap(resizable_results)[1:] == [before, before]
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_number_of_threads_is_given_back_to_each_and_to_threads_to_come() -> None:
    before = settings()
    assert overlap(lambda: torch_threads(torch.get_num_threads() + 1)) == [before] * 3
    assert settings() == before


def test_nothing_is_set_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("set")

    monkeypatch.setattr(torch, "set_num_threads", refuse)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", refuse)
    with torch_threads(None), torch_threads(torch.get_num_threads()), resizable_results():
        pass


def test_engine_is_given_back_on_error() -> None:
    before = settings()
    other = next(name for name in torch.backends.quantized.supported_engines if name not in ("none", before[1]))
    with pytest.raises(ValueError, match="mine"), quantized_engine(other):
        raise ValueError("mine")
    assert settings() == before


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_threads_that_quantize_do_so_one_after_the_other(tmp_path: Path, unmeasured: None) -> None:
    # Exporters send the process's own output elsewhere meanwhile, and tracers patch every module in it.
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(3)]
    x, output = torch.randn(8, 6), (sys.stdout, sys.stderr)
    failed: list[BaseException] = []

    def work(index: int) -> None:
        try:
            quantize(models[index], "int8_weight_only", "torch", calibration_data=[x], output_dir=tmp_path / str(index))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failed == []
    assert (sys.stdout, sys.stderr) == output
    for index, model in enumerate(models):
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / str(index))(x), model(x), atol=0.05, rtol=0.05)
