"""ExecuTorch computes the simulation."""

from collections import Counter
from typing import Any

import lightning_models  # noqa: F401  makes exporting quick
import pytest
import torch
from residual_nets import IMAGE, residual_on

from lightning_quant import load
from lightning_quant.errors import QuantizationError
from lightning_quant.export.export import export
from lightning_quant.runtimes import executorch


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Any:
    prepared = residual_on("executorch")
    return prepared, export(prepared, tmp_path_factory.mktemp("executorch") / "artifact")


def test_executorch_computes_the_simulation_to_the_bit(program: Any) -> None:
    prepared, artifact = program
    with torch.no_grad(), prepared.attached("frozen"):
        simulated = prepared.root(IMAGE)

    assert torch.equal(load(artifact.path)(IMAGE), simulated)


def test_results_do_not_change_under_the_next_call(program: Any) -> None:
    model = load(program[1].path)
    first = model(IMAGE)
    before = first.clone()
    model(2 * IMAGE)

    assert torch.equal(first, before)


def test_batches_larger_than_the_planned_memory_are_refused(program: Any) -> None:
    model = load(program[1].path)
    limit = executorch._MAX_BATCH

    assert model(IMAGE.repeat(limit // 4, 1, 1, 1)).shape == (limit, 4)
    with pytest.raises(QuantizationError, match=rf"`image` to be at most \({limit}, 3, 8, 8\) large.*smaller batches"):
        model(torch.zeros(limit + 1, 3, 8, 8))


def test_pool_of_threads_does_not_change_under_a_loaded_program(program: Any) -> None:
    held = load(program[1].path)
    current = executorch._program  # the module keeps what it loads alive
    assert current is not None
    from executorch.extension.pybindings import portable_lib

    number = portable_lib._threadpool_get_thread_count()
    with pytest.raises(QuantizationError, match=r"a process has one pool of threads"):
        load(program[1].path, threads=number + 1)
    assert held(IMAGE).shape == (4, 4)
    assert load(program[1].path, threads=number)(IMAGE).shape == (4, 4)


def test_integer_operators_of_xnnpack_are_counted(program: Any) -> None:
    prepared, artifact = program
    counts = executorch.RUNTIME.count_operators(artifact.model_path)
    kinds = Counter(operator.kind for operator in prepared.plan.graphs[0].operators)

    assert counts["XNNConv2d_int8"] == kinds["conv2d"] == 3
    assert counts["XNNAdd_int8"] == kinds["add"] == 1
    assert counts["XNNFullyConnected_int8"] == kinds["linear"] == 1
    assert executorch.RUNTIME.still_float(prepared.plan.graphs[0].operators, {**counts, "XNNConv2d_int8": 1}) == {
        "conv2d": 2
    }
