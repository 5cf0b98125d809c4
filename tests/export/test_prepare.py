import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, DropPathNet, ResidualNet, calibrated, with_statistics
from residual_nets import IMAGE, equal, residual_net
from torch import Tensor, nn

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.errors import CalibrationError, QuantizationError
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise

# --- the user's module stays the user's


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


# --- copies


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


def test_sizes_that_vary_between_calls_are_noted() -> None:
    model, prepared = residual_net()
    assert prepared.varying == set()
    with torch.no_grad(), prepared.attached("observe"):
        model(torch.randn(2, 3, 8, 12))
    assert prepared.varying == {("image", 0), ("image", 3)}


# --- simulation


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
