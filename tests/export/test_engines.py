"""The engine whose kernels are right here is taken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_nets import IMAGE, residual
from static_programs import ready
from torch import Tensor, nn

from lightning_quant import load, quantize, runtimes
from lightning_quant.errors import QuantizationError
from lightning_quant.export import engines as choosing
from lightning_quant.export.export import export
from lightning_quant.machine.latency import Timing
from lightning_quant.runtimes import _torch_program, _torch_static

runtime = runtimes.get("torch")


ENGINES = runtime.engines()


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
