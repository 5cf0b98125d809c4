import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, Case, DropPathNet, ResidualNet, calibrated, with_statistics
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import Recipe
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.simulate.quantizers import PHASES

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
# Biases that follow the present weights alone, as in training.
UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)


def residual_net() -> tuple[ResidualNet, Prepared]:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max", recipe=UNCORRECTED)
    calibrate(prepared, steps_of(prepared, [IMAGE, 2 * IMAGE]))
    return model, prepared


def equal(left: Any, right: Any) -> bool:
    pairs = list(zip(tensor_leaves(left), tensor_leaves(right), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


# --- the user's module stays the user's


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attaching_changes_nothing_but_forward(case: Case) -> None:
    model, prepared = calibrated(case, batches=1)
    args, kwargs = case.call(2)
    with torch.no_grad():
        float_output = model(*args, **kwargs)
    kind, keys = type(model), list(model.state_dict())
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}

    prepared.attach()
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert {name: id(module) for name, module in model.named_modules()} == modules
    prepared.set_phase("fake_quantize")
    with torch.no_grad():
        quantized_output = model(*args, **kwargs)
    assert not equal(float_output, quantized_output)
    assert type(quantized_output) is type(float_output)

    prepared.detach()
    prepared.detach()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert equal(model(*args, **kwargs), float_output)


@pytest.mark.parametrize("phase", ["off", "observe"])
def test_before_quantizing_the_output_is_the_float_one_to_the_bit(phase: str) -> None:
    for case in CASES:
        model, prepared = calibrated(case, batches=1)
        args, kwargs = case.call(3)
        with torch.no_grad():
            expected = model(*args, **kwargs)
            with prepared.attached(phase, observing=True):
                assert equal(model(*args, **kwargs), expected), case.name


def test_training_while_observing_is_float_training_to_the_bit() -> None:
    def train(observing: bool) -> dict[str, Tensor]:
        torch.manual_seed(5)
        model = with_statistics(DropPathNet()).train()
        prepared = prepare(model, (IMAGE,))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        if observing:
            prepared.attach()
            prepared.set_phase("observe")
            prepared.observing = True
        torch.manual_seed(6)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(torch.randn(8, 3, 8, 8)), torch.randint(4, (8,))).backward()
            optimizer.step()
        return model.state_dict()

    plain, observed = train(False), train(True)
    assert all(torch.equal(plain[name], observed[name]) for name in plain)


def test_attaching_twice_or_over_another_forward_is_refused() -> None:
    model, prepared = residual_net()
    prepared.attach()
    with pytest.raises(QuantizationError, match="have its own forward"):
        prepared.attach()
    prepared.detach()
    model.forward = lambda x: x
    with pytest.raises(QuantizationError, match="instance attribute `forward`"):
        prepared.attach()


def test_a_failed_step_gives_forward_and_phase_back() -> None:
    model, prepared = residual_net()
    with pytest.raises(ZeroDivisionError), prepared.attached("fake_quantize", observing=True):
        raise ZeroDivisionError
    assert "forward" not in vars(model)
    assert (prepared.phase, prepared.observing) == ("off", False)


def test_reattaching_goes_on_with_the_same_ranges() -> None:
    model, prepared = residual_net()
    with torch.no_grad():
        with prepared.attached("frozen"):
            first = model(IMAGE)
        with prepared.attached("frozen"):
            second = model(IMAGE)
    assert torch.equal(first, second)


def test_an_unknown_phase_is_refused_with_the_known_ones() -> None:
    _, prepared = residual_net()
    with pytest.raises(QuantizationError, match="frozen_batch_norm"):
        prepared.set_phase("training")


# --- copies


def test_a_deepcopy_of_an_attached_module_is_independent() -> None:
    model, prepared = residual_net()
    prepared.attach()
    prepared.set_phase("fake_quantize")
    with torch.no_grad():
        before = model(IMAGE)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(IMAGE), before)
        twin.fc.weight.zero_()
        twin.fc.bias.zero_()
        assert torch.count_nonzero(twin(IMAGE)) == 0
        assert torch.equal(model(IMAGE), before)
        for parameter in model.parameters():
            parameter.zero_()
        twin.fc.bias.fill_(1.0)
        assert torch.count_nonzero(model(IMAGE)) == 0
        assert torch.count_nonzero(twin(IMAGE)) > 0
    # The copy observes for itself.
    routed = vars(twin)["forward"].prepared
    assert routed.root is twin
    routed.observing = True
    ranges = [observer.range() for observer in prepared.ranges.observers.values()]
    with torch.no_grad():
        twin(100 * IMAGE)
    assert [observer.range() for observer in prepared.ranges.observers.values()] == ranges


def test_binding_to_another_module_uses_its_weights_and_the_same_ranges() -> None:
    model, prepared = residual_net()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.fc.bias.add_(1.0)
        other = prepared.bound_to(twin)
        with prepared.attached("frozen"), other.attached("frozen"):
            difference = twin(IMAGE) - model(IMAGE)
    torch.testing.assert_close(difference, torch.ones_like(difference), atol=1e-2, rtol=0)


# --- what happens to the module after it was prepared


def test_current_tensors_are_used_after_loading_with_assign() -> None:
    model, prepared = residual_net()
    prepared.attach()
    prepared.set_phase("frozen")
    with torch.no_grad():
        model(IMAGE)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["fc.weight"] *= 0.5
        state["fc.bias"] *= 0.5
        expected = model(IMAGE) * 0.5
        model.load_state_dict(state, assign=True)
        assert signal_to_noise(expected, model(IMAGE)) > 30
        state = {name: value * 0 for name, value in state.items()}
        model.load_state_dict(state, assign=True)
        assert torch.count_nonzero(model(IMAGE)) == 0


def test_current_modules_are_used_after_sync_batch_norm_conversion() -> None:
    model, prepared = residual_net()
    prepared.attach()
    prepared.set_phase("frozen")
    with torch.no_grad():
        before = model(IMAGE)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert converted is model
        assert isinstance(model.bn1, nn.SyncBatchNorm)
        torch.testing.assert_close(model(IMAGE), before)
        model.bn1.running_mean.add_(10.0)
        assert not torch.allclose(model(IMAGE), before)


def test_a_replaced_layer_is_the_one_that_runs() -> None:
    model, prepared = residual_net()
    prepared.attach()
    prepared.set_phase("frozen")
    with torch.no_grad():
        model(IMAGE)
        model.fc = nn.Linear(8, 4)
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(4.0))
        torch.testing.assert_close(model(IMAGE), torch.arange(4.0).expand(4, 4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_changing_the_precision_after_preparing(dtype: torch.dtype) -> None:
    model, prepared = residual_net()
    with torch.no_grad():
        with prepared.attached("frozen"):
            expected = model(IMAGE)
        model.to(dtype)
        with prepared.attached("fake_quantize"):
            result = model(IMAGE.to(dtype))
    assert result.dtype == dtype
    assert signal_to_noise(expected, result) > (15 if dtype == torch.bfloat16 else 30)
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        model(IMAGE.to(dtype)).square().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in model.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    model, prepared = residual_net()
    model.train()
    with prepared.attached("fake_quantize", observing=True):
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(IMAGE), torch.randint(4, (4,)))
        loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    assert all(low.dtype == torch.float32 for low, _ in (o.range() for o in prepared.ranges.observers.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_touch_the_integers_of_evaluation(dtype: torch.dtype) -> None:
    """Sums of 576 products of 8-bit integers fit neither 11 nor 8 bits of precision, nor the range of float16."""
    model = nn.Sequential(nn.Conv2d(64, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.rand(4, 64, 8, 8)
    with torch.no_grad():
        model[0].weight.abs_()
    prepared = prepare(model, (x,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [x]))
    with torch.no_grad(), prepared.attached("frozen"):
        expected = model(x)
        with torch.autocast("cpu", dtype):
            result = model(x)
    assert torch.isfinite(result).all()
    assert signal_to_noise(expected, result) > 45


def test_switching_between_training_and_evaluation_follows_the_flags() -> None:
    model, prepared = residual_net()
    statistics = model.bn1.running_mean.clone()
    with prepared.attached("fake_quantize"), torch.no_grad():
        model(IMAGE)
        assert torch.equal(model.bn1.running_mean, statistics)
        # As Lightning does it: flags only, without calling train().
        for module in model.modules():
            module.training = True
        model(IMAGE)
        assert not torch.equal(model.bn1.running_mean, statistics)
        statistics = model.bn1.running_mean.clone()
        model.bn1.eval()
        model(IMAGE)
        assert torch.equal(model.bn1.running_mean, statistics)


# --- BatchNorm


class ByHand(nn.Module):
    """What fake quantization of conv, BatchNorm and ReLU means, written with PyTorch's own fake quantization."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, scales: list[tuple[float, int]]) -> None:
        super().__init__()
        self.conv, self.norm, self.scales = conv, norm, scales

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fake_quantize_per_tensor_affine(x, *self.scales[0], 0, 255)
        weight = self.conv.weight
        scale = weight.detach().abs().amax((1, 2, 3)) / 127
        zero = torch.zeros(len(scale), dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
        x = F.relu(self.norm(F.conv2d(x, weight, self.conv.bias, self.conv.stride, self.conv.padding)))
        return torch.fake_quantize_per_tensor_affine(x, *self.scales[1], 0, 255)


@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.37, 1e-2), (None, 1e-3)])
def test_batch_norm_keeps_its_momentum_and_eps(momentum: float | None, eps: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, eps, momentum), nn.ReLU())
    model = with_statistics(model)
    prepared = prepare(model, (IMAGE,), observer="min_max")
    calibrate(prepared, steps_of(prepared, [3 * IMAGE]))
    parameters = [prepared.ranges.parameters(identity) for identity in prepared.ranges.edges]
    twin = copy.deepcopy(model)
    by_hand = ByHand(twin[0], twin[1], [(float(scale), int(zero)) for scale, zero in parameters])
    model.train()
    by_hand.train()
    with prepared.attached("frozen"):
        for step in range(3):
            batch = torch.randn(8, 3, 8, 8)
            actual, expected = model(batch), by_hand(batch)
            torch.testing.assert_close(actual, expected, atol=parameters[1][0].item() * 1.01, rtol=0)
            assert (actual - expected).abs().mean() < 1e-4, step
            actual.square().sum().backward()
            expected.square().sum().backward()
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean)
    torch.testing.assert_close(model[1].running_var, twin[1].running_var)
    assert model[1].num_batches_tracked == twin[1].num_batches_tracked
    assert (model[1].momentum, model[1].eps) == (momentum, eps)
    for mine, reference in zip(model.parameters(), twin.parameters(), strict=True):
        assert signal_to_noise(reference.grad, mine.grad) > 40


def test_other_momentum_or_eps_would_be_seen() -> None:
    """The pair of the test above: statistics with torch's default momentum differ."""
    statistics = []
    for momentum in (0.1, 0.37):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU()).train()
        prepared = prepare(model, (IMAGE,))
        with prepared.attached("fake_quantize", observing=True):
            model(IMAGE)
        statistics.append(model[1].running_var)
    assert not torch.allclose(*statistics)


def test_frozen_batch_norm_uses_and_keeps_its_running_statistics() -> None:
    model, prepared = residual_net()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with prepared.attached("frozen"), torch.enable_grad():
        expected = model(IMAGE)
    model.train()
    with prepared.attached("frozen_batch_norm"):
        result = model(IMAGE)
        result.square().sum().backward()
    assert signal_to_noise(expected, result) > 30
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.bn1.training


def test_without_freezing_batch_norm_moves_on() -> None:
    model, prepared = residual_net()
    before = model.bn1.running_mean.clone()
    model.train()
    with prepared.attached("frozen"):
        model(IMAGE)
    assert not torch.equal(model.bn1.running_mean, before)


def test_weights_learn_through_fake_quantization() -> None:
    model, prepared = residual_net()
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    labels = torch.tensor([0, 1, 2, 3])
    losses = []
    with prepared.attached("fake_quantize", observing=True):
        for _ in range(25):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(IMAGE), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- observing


def test_ranges_move_only_while_observing_in_a_phase_that_observes() -> None:
    model, prepared = residual_net()

    def ranges() -> list[tuple[float, float]]:
        return [tuple(map(float, observer.range())) for observer in prepared.ranges.observers.values()]

    start = ranges()
    with torch.no_grad():
        for phase in PHASES:
            with prepared.attached(phase, observing=False):
                model(10 * IMAGE)
            assert ranges() == start, phase
        for phase in ("off", "frozen", "frozen_batch_norm"):
            with prepared.attached(phase, observing=True):
                model(10 * IMAGE)
            assert ranges() == start, phase
        for factor, phase in ((10, "observe"), (100, "fake_quantize")):
            before = ranges()
            with prepared.attached(phase, observing=True):
                model(factor * IMAGE)
            assert all(new != old for new, old in zip(ranges(), before, strict=True)), phase


def test_scales_follow_ranges_that_move() -> None:
    model, prepared = residual_net()
    with torch.no_grad(), prepared.attached("fake_quantize", observing=True):
        model(IMAGE)
        model(1000 * IMAGE)
        (first, *_) = prepared.ranges.edges
        scale, _ = prepared.ranges.parameters(first)
    assert scale.item() == pytest.approx((1000 * (IMAGE.max() - IMAGE.min()) / 255).item(), rel=1e-4)


def test_quantizing_before_observing_raises_and_names_the_edge() -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,))
    with pytest.raises(CalibrationError, match=":image: nothing was observed"), prepared.attached("fake_quantize"):
        model(IMAGE)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("corrected", [False, True])
def test_state_survives_a_checkpoint(corrected: bool) -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,), observer="min_max", recipe="int8" if corrected else UNCORRECTED)
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    prepared.set_phase("frozen")
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = prepare(model, (IMAGE,), observer="min_max")
    other.load_state_dict(state)
    other.load_state_dict(state)
    assert other.phase == "frozen"
    with torch.no_grad():
        with prepared.attached("frozen"):
            expected = model(IMAGE)
        with other.attached("frozen"):
            assert torch.equal(model(IMAGE), expected)


def test_state_of_another_model_is_refused() -> None:
    _, prepared = residual_net()
    other = prepare(with_statistics(DropPathNet()).eval(), (IMAGE,))
    with pytest.raises(QuantizationError, match="Expected quantizer state of this model"):
        other.load_state_dict(prepared.state_dict())


def test_sizes_that_vary_between_calls_are_noted() -> None:
    model, prepared = residual_net()
    assert prepared.varying == set()
    with torch.no_grad(), prepared.attached("observe"):
        model(torch.randn(2, 3, 8, 12))
    assert prepared.varying == {("image", 0), ("image", 3)}


# --- simulation


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evaluation_with_and_without_gradients_agrees(case: Case) -> None:
    """Exact integer arithmetic, used where no gradient is asked for, and float arithmetic differ by few ties only."""
    model, prepared = calibrated(case, recipe=UNCORRECTED)
    args, kwargs = case.call(4)
    check_that_gradients_change_nothing(model, prepared, args, kwargs)


def test_evaluation_with_gradients_knows_corrected_biases() -> None:
    case = next(case for case in CASES if case.name == "mlp")
    model, prepared = calibrated(case)
    args, kwargs = case.call(4)
    check_that_gradients_change_nothing(model, prepared, args, kwargs)


def check_that_gradients_change_nothing(model: nn.Module, prepared: Prepared, args: Any, kwargs: Any) -> None:
    with prepared.attached("frozen"):
        with torch.no_grad():
            exact = model(*args, **kwargs)
        rounded = model(*args, **kwargs)
    with torch.no_grad():
        float_output = model(*args, **kwargs)
    leaves = [tensor_leaves(output) for output in (float_output, exact, rounded)]
    assert signal_to_noise(leaves[1], leaves[2]) > signal_to_noise(leaves[0], leaves[1]) + 6


def test_recorded_integers_are_the_grid_of_each_edge() -> None:
    model, prepared = residual_net()
    with torch.no_grad(), prepared.attached("frozen"), prepared.simulation.recording() as edges:
        model(IMAGE)
    assert [identity for identity, _ in edges] == list(dict(edges))
    assert set(dict(edges)) == set(prepared.ranges.edges)
    image = dict(edges)[":image"]
    scale, zero_point = prepared.ranges.parameters(":image")
    expected = torch.clamp(torch.round(IMAGE / scale) + zero_point, 0, 255)
    assert image.dtype == torch.uint8
    assert torch.equal(image.float(), expected)
    assert prepared.simulation.recorded is None


@pytest.mark.parametrize("build", [lambda: nn.LSTM(4, 4), lambda: nn.Sequential(nn.ReLU(), nn.Flatten())])
def test_a_module_with_nothing_to_quantize_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(QuantizationError, match="there is nothing"):
        prepare(build(), (torch.randn(2, 3, 4),))


def test_unknown_recipe_and_runtime_are_refused_with_the_known_ones() -> None:
    with pytest.raises(QuantizationError, match=r"`recipe`.*'int8'.*'int7'"):
        prepare(nn.Linear(4, 4), (torch.randn(2, 4),), recipe="int7")
    with pytest.raises(QuantizationError, match=r"`runtime`.*'onnxruntime'.*'tensorrt'"):
        prepare(nn.Linear(4, 4), (torch.randn(2, 4),), runtime="tensorrt")


def test_sizes_that_vary_are_noted_where_the_module_itself_has_no_graph() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.one(x)
            return self.other(hidden if hidden.sum() > 0 else -hidden)

    model, calls = Net().eval(), [torch.randn(2, length, 4) for length in (5, 7, 5)]
    prepared = prepare(model, (calls[0],), observer="min_max")
    calibrate(prepared, steps_of(prepared, calls))
    assert "" not in prepared.islands
    assert prepared.varying == {("x", 1)}
    assert not model._forward_pre_hooks
