"""Random nets: whatever is built out of the supported operators keeps every promise."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from lightning_models import decibels, equal_tensors, tensors_of
from random_nets import RandomNet, Spec, specs

from lightning_quant import runtimes
from lightning_quant.artifact.artifact import load
from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.export import export
from lightning_quant.export.prepare import prepare
from lightning_quant.simulate.parity import check_parity


def check(spec: Spec, runtime: str = "onnxruntime") -> None:
    """Check every promise on one net."""
    net = RandomNet(spec).eval()
    x = net.example()
    twin, before = copy.deepcopy(net), tensors_of(net)
    prepared = prepare(net, (x,), runtime=runtime)
    calibrate(prepared, steps_of(prepared, [x]))
    prepared.attach()
    assert list(net.state_dict()) == list(before)
    with torch.no_grad():
        prepared.set_phase("frozen")
        simulated = net(x)
    # Raises when simulation and QDQ graph are farther apart than simulation and float.
    prepared.detach()
    check_agreement(prepared, convert(prepared), (x,), {})
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(prepared, Path(folder) / "artifact")
        loaded = load(artifact.path, threads=1)
        parity = check_parity(prepared, loaded, runtimes.get(runtime), artifact.model_path, [x])
        exported = loaded(x)
    assert parity.failures == []
    assert exported.shape == simulated.shape
    assert decibels(simulated, exported) > 25 or torch.allclose(simulated, exported, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(net(x), twin(x))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            trained = net.train()(x)
            torch.manual_seed(0)
            assert torch.equal(trained, twin.train()(x))
    assert equal_tensors(before, tensors_of(RandomNet(spec).eval()))


ordinary = settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@ordinary
@given(specs())
def test_random_nets(spec: Spec) -> None:
    check(spec)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(5))
def test_many_random_nets(part: int) -> None:
    many = settings(ordinary, max_examples=100, derandomize=False)
    seed(part)(many(given(specs())(lambda spec: check(spec))))()


@pytest.mark.parametrize("runtime", ["openvino", "torch"])
def test_random_nets_on_other_runtimes(runtime: str) -> None:
    some = settings(ordinary, max_examples=4)
    some(given(specs())(lambda spec: check(spec, runtime)))()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("runtime", "number"), [("openvino", 100), ("torch", 100), ("inductor", 10)])
def test_many_random_nets_on_other_runtimes(runtime: str, number: int) -> None:
    many = settings(ordinary, max_examples=number, derandomize=False)
    seed(0)(many(given(specs())(lambda spec: check(spec, runtime))))()
