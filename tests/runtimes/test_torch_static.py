"""Static int8 on PyTorch's native kernels: every engine computes the simulation, and the fastest right one is taken."""

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ResidualNet, with_statistics
from torch import Tensor, nn

from lightning_quant import load, quantize, runtimes
from lightning_quant.artifact.artifact import Artifact
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.calls import flatten_call
from lightning_quant.errors import ExportError, QuantizationError
from lightning_quant.export import engines as choosing
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.machine.latency import Timing
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.runtimes import _torch_program, _torch_static, _torch_steps
from lightning_quant.runtimes._flat import tensors_in
from lightning_quant.simulate.parity import check_parity
from lightning_quant.simulate.prepared import Prepared

runtime = runtimes.get("torch")

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ENGINES = runtime.engines()


class Spellings(nn.Module):
    """What the lowering has patterns for, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(3, 8, 4, padding="same")
        self.valid = nn.Conv2d(8, 8, 3, padding="valid", dilation=2)
        self.padded = nn.Conv2d(8, 8, 3, stride=2)
        self.leaky = nn.LeakyReLU(0.1)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.even(image))
        x = self.leaky(self.valid(x))
        x = self.padded(nn.functional.pad(x, (0, 1, 1, 0)))
        x = torch.cat([x, x * x], 1)[:, :8]
        y = self.tokens(x.flatten(2).transpose(1, 2))
        return self.head((y + y).view(x.shape[0], -1))


def ready(model: nn.Module, x: Tensor = IMAGE, recipe: str | Recipe = "int8") -> Prepared:
    prepared = prepare(model, (x,), recipe=recipe, runtime="torch", observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    return prepared


def residual() -> nn.Module:
    torch.manual_seed(0)
    return with_statistics(ResidualNet()).eval()


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


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_every_spelling_becomes_a_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    prepared = ready(Spellings().eval())
    artifact = export(prepared, tmp_path / "artifact", engine=ENGINES[0])
    operators = prepared.plan.graphs[0].operators
    counts = runtime.count_operators(artifact.model_path)

    kinds = {operator.kind for operator in operators}
    assert kinds == {"conv2d", "linear", "leaky_relu", "cat", "mul", "add"}
    assert runtime.still_float(operators, counts) == {}
    # The slice, which keeps its own range, is all that goes through float.
    assert counts["aten.dequantize.self"] <= 3
    _, tensors = flatten_call(prepared.signature, (IMAGE,), {})
    parity = check_parity(prepared, load(artifact.path), runtime, artifact.model_path, tensors)
    assert parity.failures == []


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


def distort(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """Let an engine's kernels saturate: the only thing that is known of it is what it computes."""
    exchange = _torch_program.Forced.exchange
    whole = _torch_static.TorchStaticModule.run

    def saturated(self: Any, edge: Any, result: Tensor) -> Tensor:
        given = exchange(self, edge, result)
        if self.engine == engine:
            self.computed[edge] = self.computed[edge].clamp(max=40)
        return given

    def negative(self: Any, tensors: list[Tensor]) -> list[Tensor]:
        outputs = whole(self, tensors)
        return [-output for output in outputs] if self.engine == engine else outputs

    monkeypatch.setattr(_torch_program.Forced, "exchange", saturated)
    monkeypatch.setattr(_torch_static.TorchStaticModule, "run", negative)


def fastest(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    def timed(calls: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        for call in calls.values():
            call()
        return {name: Timing(1.0 if name == engine else 9.0, 1.0, 9.0, 7) for name in calls}

    monkeypatch.setattr(choosing, "measure", timed)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fastest_engine_is_taken_on_request_and_what_was_measured_is_said(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest(monkeypatch, engine)
    artifact = export(ready(residual()), tmp_path / "artifact", engine="fastest")
    model: Any = load(artifact.path)

    assert model.engine == artifact.manifest["engine"]["name"] == engine
    measured = artifact.manifest["engine"]["measured"]
    assert f"engine {engine} is the fastest of the correct ones" in measured
    assert all(f"{name} 1 (" in measured or f"{name} 9 (" in measured for name in ENGINES)


def test_by_default_nothing_is_timed_and_the_first_correct_engine_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_clock(calls: Any) -> Any:
        raise AssertionError("nobody asked for a measurement")

    monkeypatch.setattr(choosing, "measure", no_clock)
    choice = export(ready(residual()), tmp_path / "artifact").manifest["engine"]
    assert choice["name"] == ENGINES[0]
    assert choice["measured"] == f"engine {ENGINES[0]} is the first in order of the correct ones"

    distort(monkeypatch, ENGINES[0])
    choice = export(ready(residual()), tmp_path / "other").manifest["engine"]
    assert choice["name"] == ENGINES[1]
    assert f"Not correct here: {ENGINES[0]} (at " in choice["measured"]


def test_an_engine_that_saturates_is_rejected_however_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, right = ENGINES[0], ENGINES[1]
    distort(monkeypatch, wrong)
    fastest(monkeypatch, wrong)
    choice = export(ready(residual()), tmp_path / "artifact", engine="fastest").manifest["engine"]

    assert choice["name"] == right
    assert f"Not correct here: {wrong} (at " in choice["measured"]
    assert f"{wrong} 1 (" not in choice["measured"]


def test_what_the_kernels_of_this_machine_get_wrong_is_rejected(tmp_path: Path) -> None:
    """A depthwise convolution with weights at the end of their range, which fbgemm saturates without VNNI."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(0, 2, model[0].weight.shape) * 2.0 - 1.0)
    x = 4 * torch.rand(2, 16, 12, 12)
    prepared = ready(model, x)
    choice = export(prepared, tmp_path / "artifact", engine="fastest").manifest["engine"]
    with torch.no_grad(), prepared.attached("frozen"), prepared.simulation.recording() as edges:
        model(x)
    for engine in ENGINES:
        path = export(prepared, tmp_path / engine, engine=engine).model_path
        computed = runtime.run_forced(path, {"input": x}, {name: integers.numpy() for name, integers in edges})
        far = [abs(ours.int() - torch.from_numpy(computed[name]).int()) > 1 for name, ours in edges]
        is_wrong = max(f.float().mean().item() for f in far) > 0.001
        assert (f"{engine} (at " in choice["measured"]) == is_wrong
        assert not (is_wrong and choice["name"] == engine)


@pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")
def test_where_no_engine_is_right_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch_static, "engines", lambda: ENGINES[:1])
    monkeypatch.setattr(runtime, "engines", lambda: ENGINES[:1])
    distort(monkeypatch, ENGINES[0])
    artifact = quantize(residual(), runtime="torch", calibration_data=[IMAGE], output_dir=tmp_path, threads=1)

    assert "closest" in artifact.manifest["engine"]["measured"]
    assert artifact.report is not None
    assert artifact.report["warnings"][0].startswith("parity FAILED")


def test_engine_that_was_asked_for_is_taken_and_reported(tmp_path: Path) -> None:
    engine = ENGINES[-1]
    options: dict[str, Any] = {"runtime": "torch", "calibration_data": [IMAGE], "threads": 1}
    artifact = quantize(residual(), output_dir=tmp_path, engine=engine, **options)

    assert artifact.manifest["engine"]["name"] == engine
    assert artifact.report is not None
    assert any(f"engine {engine} was asked for" in note for note in artifact.report["notes"])
    for name, wrong, message in (
        ("torch", "qnpack", "Expected `engine` to be one of .* got 'qnpack'. Did you mean 'qnnpack'?"),
        ("onnxruntime", engine, "Expected no `engine` for `runtime` 'onnxruntime'"),
        ("auto", engine, "Expected no `engine` for `runtime` 'auto'"),
    ):
        with pytest.raises(QuantizationError, match=message):
            quantize(residual(), output_dir=tmp_path, engine=wrong, **(options | {"runtime": name}))
    with pytest.raises(QuantizationError, match="Expected `engine` to be one of"):
        load(artifact.path, engine="cudnn")


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


def test_operators_of_others_are_refused_at_export(tmp_path: Path) -> None:
    class Decodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.lightning_quant_tests.double(self.net(x))

    with pytest.raises(ExportError, match=r"own operators that only compute, but it calls .*double"):
        export(ready(Decodes().eval(), torch.randn(3, 6)), tmp_path / "artifact")


# As operators in other languages are: nothing tells what it computes.
_LIBRARY = torch.library.Library("lightning_quant_tests", "FRAGMENT")
_LIBRARY.define("double(Tensor x) -> Tensor")
_LIBRARY.impl("double", lambda x: 2 * x, "CPU")
torch.library.register_fake("lightning_quant_tests::double", torch.empty_like, lib=_LIBRARY)
