"""What is called without a Trainer, on a device that is not the CPU."""

import copy
from pathlib import Path
from typing import Any

import emulated
import pytest
import torch
from lightning_models import ConvNet, images
from torch import Tensor, nn

import lightning_quant as lq
from lightning_quant.calibrate.calibrate import calibrate
from lightning_quant.calls.recorded_calls import recorded_calls
from lightning_quant.errors import NoEffectWarning
from lightning_quant.export.convert import convert
from lightning_quant.export.prepare import prepare
from lightning_quant.layers import refine
from lightning_quant.numerics.exact import exact_arithmetic
from lightning_quant.numerics.gptq import Hessian, gptq
from lightning_quant.numerics.learned_steps import LearnedSteps
from lightning_quant.planned.layerwise import quantize_layers
from lightning_quant.surgery.host import HOST, copied_to, on_host

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning"),
]
DATA = [images(8, seed=seed).tensors[0] for seed in range(3)]
RECIPES = ("int8", "int4_weights", "int8_weight_only_gptq")


def net() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().eval()


def where_all_is(module: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in module.state_dict().values()}


def test_two_devices_do_not_mix(where: Any) -> None:
    x, y = torch.ones(3, device=where.device), torch.ones(3)
    for meet in (lambda: x + y, lambda: torch.cat([x, y]), lambda: nn.Linear(3, 2).to(where.device)(y)):
        with pytest.raises(RuntimeError, match=r"same device|is on cpu"):
            meet()
    assert (x + torch.ones(())).device == where.device


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("data_on_device", [False, True])
def test_module_and_data_apart(where: Any, tmp_path: Path, recipe: str, data_on_device: bool) -> None:
    model = net() if data_on_device else net().to(where.device)
    data = [x.to(where.device) for x in DATA] if data_on_device else DATA
    artifact = lq.quantize(model, recipe, calibration_data=data, output_dir=tmp_path, sensitivity="gptq" not in recipe)
    assert where_all_is(model) == {"cpu" if data_on_device else where.name}
    here = lq.quantize(net(), recipe, calibration_data=DATA, output_dir=tmp_path / "here")
    assert lq.verify(artifact.path).identical
    inputs = DATA[0].to(where.device)
    outputs = lq.load(artifact.path)(inputs)
    assert outputs.device == inputs.device
    torch.testing.assert_close(outputs.cpu(), lq.load(here.path)(DATA[0]), rtol=0, atol=0.05)


@pytest.mark.parametrize("recipe", ["int8_dynamic", "int8_weight_only", "int4_weight_only"])
def test_artifact_loaded_into_a_module_there(where: Any, tmp_path: Path, recipe: str) -> None:
    artifact = lq.quantize(net(), recipe, "torch", calibration_data=DATA, output_dir=tmp_path)
    filled = lq.load(artifact.path, into=net().to(where.device))
    assert where_all_is(filled) == {where.name}
    torch.testing.assert_close(
        filled(DATA[0].to(where.device)).cpu(), lq.load(artifact.path)(DATA[0]), rtol=0, atol=0.01
    )


class KnowsItsDevice(nn.Module):
    """Keeps the device, tensors that are neither parameters nor buffers, and objects that hold such."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8).to(device)
        self.where, self.name = device, str(device)
        self.plain = torch.arange(8.0, device=device)
        self.kept = {"inside": [torch.ones(8, device=device)]}

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(8, device=self.where) + torch.zeros(8, device=self.name)
        return self.layer(x + ramp * 0.1 + self.plain * 0.1 + self.kept["inside"][0])


def test_attributes_go_along(where: Any, tmp_path: Path) -> None:
    model = KnowsItsDevice(where.device).eval()
    data = [torch.randn(4, 8) for _ in range(2)]
    artifact = lq.quantize(model, calibration_data=data, output_dir=tmp_path)
    assert lq.verify(artifact.path).identical
    expected = model(data[0].to(where.device)).cpu()
    torch.testing.assert_close(lq.load(artifact.path)(data[0]), expected, rtol=0, atol=0.1)
    assert model.where == where.device
    assert model.plain.device == where.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_for_the_cpu(where: Any, dtype: torch.dtype) -> None:
    model = net().to(where.device, dtype)
    model.tied = model.head
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    allocated = torch.ops.emulated_device.allocated() if where.name == emulated.NAME else 0
    duplicate = on_host(model)
    if where.name == emulated.NAME:
        assert torch.ops.emulated_device.allocated() == allocated
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert where_all_is(duplicate) == {"cpu"}
    assert {t.dtype for t in duplicate.state_dict().values() if t.is_floating_point()} == {torch.float32}
    assert duplicate.tied.weight is duplicate.head.weight
    assert on_host(duplicate) is duplicate


def calibrated(model: nn.Module, recipe: str = "int8") -> Any:
    device = next(model.parameters()).device
    prepared = prepare(model, (DATA[0],), recipe=recipe, observer="mse")
    calibrate(prepared, [lambda x=x: model(x.to(device)) for x in DATA])
    return prepared


def test_simulation_gives_the_integers_of_the_cpu(where: Any) -> None:
    prepared = calibrated(net().to(where.device))
    recorded = []
    for bound, device in ((prepared, where.device), (prepared.on_host(), HOST)):
        with torch.no_grad(), bound.attached("frozen"), bound.simulation.recording() as edges:
            bound.root(DATA[0].to(device))
        recorded.append([(name, integers.cpu()) for name, integers in edges])
    assert len(recorded[0]) > 4
    for (name, there), (_, here) in zip(*recorded, strict=True):
        assert torch.equal(there, here), name


def test_what_was_learned_follows_the_module(where: Any) -> None:
    prepared = calibrated(net().to(where.device), "int8_accurate")
    prepared.learned_steps = LearnedSteps(1e-3)
    # In evaluation, a model that calibration has adjusted computes in integers.
    prepared.root.train()
    with prepared.attached("fake_quantize"):
        prepared.root(DATA[0].to(where.device)).sum().backward()
    prepared.learned_steps.update()
    steps = {name: step.detach().cpu() for name, step in prepared.learned_steps.logarithms.items()}
    here = prepared.on_host()
    convert(here)(DATA[0])
    assert {step.device for step in here.learned_steps.logarithms.values()} == {HOST}
    with prepared.attached("fake_quantize"):
        prepared.root(DATA[0].to(where.device)).sum().backward()
    prepared.learned_steps.update()
    assert {step.device for step in prepared.learned_steps.logarithms.values()} == {where.device}
    assert any(not torch.equal(step.cpu(), steps[n]) for n, step in prepared.learned_steps.logarithms.items())


def test_calls_of_another_device_between_calls_of_this_one(where: Any) -> None:
    prepared = calibrated(net())
    other = prepared.bound_to(copied_to(prepared.root, where.device))
    with torch.no_grad():
        for bound, device in ((prepared, HOST), (other, where.device), (prepared, HOST)):
            with bound.attached("frozen"):
                assert bound.root(DATA[0].to(device)).device == device


def test_gptq_there(where: Any) -> None:
    weight, inputs = torch.randn(6, 16), torch.randn(64, 16)
    results = []
    for device in (HOST, where.device):
        hessian = Hessian(16, device)
        hessian.update(inputs.to(device))
        assert hessian.total.device == device
        integers = gptq(weight.to(device), hessian.mean, torch.full((6,), 0.2, device=device), -7, 7)
        assert integers.device == device
        results.append(integers.cpu())
    assert torch.equal(*results)


def test_hessians_within_a_limit(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made = refine.Hessian.__init__

    def counted(self: Any, features: int, device: torch.device) -> None:
        sizes.append(features)
        made(self, features, device)

    monkeypatch.setattr(refine.Hessian, "__init__", counted)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(where.device)
    calls = [((torch.randn(4, 8),), {})]
    weights = []
    for limit in (1 << 30, 8 * 8 * 8):
        monkeypatch.setattr(refine, "HESSIAN_BYTES", limit)
        quantized = quantize_layers(model, *calls[0], recipe="int8_weight_only_gptq", calls=calls)
        weights.append([layer.stored("weight")[0] for layer in quantized.layers.values()])
        assert len(refine._affordable(model, ["0", "2", "4"])) == (1 if limit > 1000 else 3)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.filterwarnings("default::lightning_quant.errors.NoEffectWarning")
def test_recorded_calls_within_a_limit(where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_quant.calls.recorded_calls.RECORDED_BYTES", 3 * 16)
    layer = nn.Linear(4, 4).to(where.device)
    with pytest.warns(NoEffectWarning, match="first 3 of 5 calls"), recorded_calls(layer) as calls:  # noqa: PT031
        for _ in range(5):
            layer(torch.randn(1, 4, device=where.device))
    assert len(calls) == 3


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_exact_arithmetic_is_put_back(precision: str) -> None:
    def settings() -> tuple[Any, ...]:
        matmul = torch.backends.cuda.matmul
        return (
            torch.get_float32_matmul_precision(),
            matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.enabled,
            matmul.allow_bf16_reduced_precision_reduction,
        )

    untouched = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        before = settings()
        with pytest.raises(ZeroDivisionError), exact_arithmetic():  # noqa: PT012
            assert settings() == ("highest", False, False, False, False)
            _ = 1 / 0
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision(untouched)


def test_integers_are_simulated_in_exact_arithmetic() -> None:
    prepared = calibrated(net())
    seen = []
    untouched = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        prepared.root.conv2.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
        with torch.no_grad(), prepared.attached("frozen"):
            prepared.root(DATA[0])
        prepared.root(DATA[0])
    finally:
        torch.set_float32_matmul_precision(untouched)
    assert seen == ["highest", "medium"]


def test_deep_copies_stay_there(where: Any) -> None:
    prepared = calibrated(net().to(where.device))
    with torch.no_grad(), prepared.attached("frozen"):
        twin = copy.deepcopy(prepared.root)
        x = DATA[0].to(where.device)
        assert torch.equal(twin(x), prepared.root(x))
