"""Static int8 on PyTorch's native kernels: every engine computes the simulation, and the fastest right one is taken."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_nets import IMAGE, residual
from static_programs import ready
from torch import Tensor, nn

from lightning_quant import load, runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.export.export import export
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.runtimes import _torch_steps
from lightning_quant.runtimes._flat import tensors_in
from lightning_quant.simulate.parity import check_parity
from lightning_quant.simulate.prepared import Prepared

runtime = runtimes.get("torch")

ENGINES = runtime.engines()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Artifact]:
    prepared = ready(residual())
    return prepared, export(prepared, tmp_path_factory.mktemp("static") / "artifact", engine=ENGINES[0])


def simulated(prepared: Prepared, x: Tensor) -> Tensor:
    with torch.no_grad(), prepared.attached("frozen"):
        return prepared.root(x)


# --- what is computed


RESIZING = {
    "linear": (lambda: nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 1)),
    "reflecting": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReflectionPad2d(1), nn.Conv2d(4, 2, 3)), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("build", "size"), RESIZING.values(), ids=RESIZING)
def test_deterministic_algorithms_leave_it_as_it_is(
    build: Callable[[], nn.Module], size: tuple[int, ...], engine: str, tmp_path: Path
) -> None:
    # Trainer(deterministic=True) asks for them, and PyTorch then refuses to resize quantized tensors.
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(size)
    torch.use_deterministic_algorithms(True)
    try:
        prepared = ready(model, x)
        artifact = export(prepared, tmp_path / "artifact", engine=engine)
        loaded = load(artifact.path)
        output = loaded(x)
        parity = check_parity(prepared, loaded, runtime, artifact.model_path, [x])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

    assert parity.failures == []
    assert torch.equal(output, loaded(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_computes_the_simulation_at_every_batch_size(engine: str, made: tuple[Prepared, Artifact]) -> None:
    prepared, artifact = made
    model: Any = load(artifact.path, engine=engine)

    assert model.engine == engine
    for batch in (1, 3, 9):
        x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
        assert signal_to_noise(simulated(prepared, x), model(x)) > 60


def test_forced_integers_go_to_each_reader(made: tuple[Prepared, Artifact]) -> None:
    prepared, artifact = made
    with torch.no_grad(), prepared.attached("frozen"), prepared.simulation.recording() as edges:
        prepared.root(IMAGE)
    given = {name: integers.numpy() for name, integers in edges}
    right = runtime.run_forced(artifact.model_path, {"image": IMAGE}, given)
    assert set(right) == set(given)
    assert all((right[name] == given[name]).all() for name in given)
    zeros = runtime.run_forced(artifact.model_path, {"image": IMAGE}, {name: 0 * edge for name, edge in given.items()})
    second = list(given)[1]
    assert not (zeros[second] == given[second]).all()
    with pytest.raises(ExportError, match="quantized tensors of the plan"):
        runtime.run_forced(artifact.model_path, {"image": IMAGE}, {"other": given[second]})


@pytest.mark.parametrize("engine", ENGINES)
def test_calls_set_nothing_of_the_process_and_run_on_their_engine(engine: str, made: tuple[Prepared, Artifact]) -> None:
    model: Any = load(made[1].path, engine=engine)
    expected = model(IMAGE)
    before, others = torch.backends.quantized.engine, [name for name in ENGINES if name != engine]
    torch.use_deterministic_algorithms(True)
    try:
        for other in (*others, before):
            torch.backends.quantized.engine = other
            assert torch.equal(model(IMAGE), expected)
            assert torch.backends.quantized.engine == other
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.quantized.engine = before


# --- which engine


def test_engine_of_the_process_stays_what_it_was(made: tuple[Prepared, Artifact]) -> None:
    before = torch.backends.quantized.engine
    other = next(engine for engine in ENGINES if engine != before)
    load(made[1].path, engine=other)(IMAGE)
    assert torch.backends.quantized.engine == before


# --- the file


def test_nothing_is_unpickled(made: tuple[Prepared, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert load(made[1].path)(IMAGE).shape == (4, 4)


def test_weights_are_stored_in_one_byte_each(made: tuple[Prepared, Artifact]) -> None:
    values = sum(p.numel() for name, p in made[0].root.named_parameters() if p.dim() > 1)
    stored = tensors_in(made[1].model_path)
    integers = [tensor for tensor in stored.values() if tensor.dtype is torch.int8]
    others = [tensor for tensor in stored.values() if tensor.dtype is not torch.int8]

    assert sum(tensor.numel() for tensor in integers) == values
    # Scales and biases.
    assert all(tensor.dim() == 1 for tensor in others)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [{"name": "step.x", "call": "os.system", "args": ["true"], "kwargs": {}}]},
        {"steps": [{"name": "step.x", "call": "operator.attrgetter", "args": ["a"], "kwargs": {}}]},
        {"steps": [{"name": "step.x", "call": "aten.__class__", "args": [], "kwargs": {}}]},
        {"steps": [{"name": "step.x", "call": "aten.no_such.default", "args": [], "kwargs": {}}]},
        {"steps": [{"name": "step.x", "call": "aten.relu.default", "args": [{"value": "nothing"}], "kwargs": {}}]},
        {"steps": [{"name": "step.x", "call": "aten.zeros.default", "args": [[1], {"torch": "load"}], "kwargs": {}}]},
        {"steps": [{"call": "aten.relu.default"}]},
        {"steps": 7},
        {"results": {"value": "nothing"}},
        {"results": None},
        {"engine": 3},
        {"engine": "cudnn"},
        {"format": 2},
        {"inputs": []},
    ],
    ids=str,
)
def test_changed_program_is_refused(change: dict[str, Any], made: tuple[Prepared, Artifact], tmp_path: Path) -> None:
    artifact = made[1]
    source = artifact.model_path.parent
    program = json.loads(gzip.decompress((source / _torch_steps.FILE).read_bytes()))
    (tmp_path / "model.safetensors").write_bytes(artifact.model_path.read_bytes())
    (tmp_path / _torch_steps.FILE).write_bytes(gzip.compress(json.dumps({**program, **change}).encode()))
    files = {"model": "model.safetensors", _torch_steps.FILE: _torch_steps.FILE}
    with pytest.raises(QuantizationError, match="Expected"):
        runtime.load(tmp_path, files, artifact.signature)


def test_there_are_no_layers_to_fill_a_model_with(made: tuple[Prepared, Artifact]) -> None:
    with pytest.raises(QuantizationError, match="a static recipe quantizes what runs between layers"):
        load(made[1].path, into=residual())
