import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import CASES, Case, DropPathNet, NormAfterActivationNet, ResidualNet, calibrated, with_statistics
from prepared_graphs import evaluated, quantized_layers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_quant.calibrate.calibrate import calibrate, steps_of
from lightning_quant.calls.signature import tensor_leaves
from lightning_quant.errors import CalibrationError, ExportError
from lightning_quant.export.convert import check_agreement, convert
from lightning_quant.export.prepare import prepare
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.recipe.recipe import IntegerSpec, Recipe
from lightning_quant.simulate.prepared import Prepared

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
UNCORRECTED = Recipe(name="uncorrected", bias_correction=False)
ready = functools.partial(evaluated, recipe=UNCORRECTED)


class Block(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, as in a ResNet."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + x).flatten(1)


def simulate(prepared: Prepared, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad(), prepared.attached("frozen"):
        return prepared.root(*args, **kwargs)


# --- the QDQ graph is what was simulated


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_converted_model_is_the_simulated_one(case: Case) -> None:
    model, prepared = calibrated(case)
    converted = convert(prepared)
    for batch in (1, 5):
        args, kwargs = case.call(batch)
        with torch.no_grad():
            float_output, actual = model(*args, **kwargs), converted(*args, **kwargs)
        simulated = simulate(prepared, *args, **kwargs)
        assert type(actual) is type(float_output)
        leaves = [tensor_leaves(output) for output in (float_output, simulated, actual)]
        assert signal_to_noise(leaves[1], leaves[2]) > signal_to_noise(leaves[0], leaves[1]) + 6
    assert check_agreement(prepared, converted, args, kwargs) > 30


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converting_leaves_the_users_module_alone(case: Case) -> None:
    model, prepared = calibrated(case, batches=1)
    model.train()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    converted = convert(prepared)
    assert not converted.training
    assert {name: vars(module) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    args, kwargs = case.call(2)
    with torch.no_grad():
        converted(*args, **kwargs)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_converting_while_attached_keeps_it_attached() -> None:
    model = with_statistics(ResidualNet())
    prepared = ready(model, IMAGE)
    expected = convert(prepared)(IMAGE)
    with prepared.attached("fake_quantize"):
        actual = convert(prepared)(IMAGE)
        assert "forward" in vars(model)
    assert torch.equal(actual, expected)


# --- against other implementations


def integer_block(block: Block, prepared: Prepared, x: Tensor) -> list[Tensor]:
    """Compute the block in whole numbers from its definition: int8 weights, int32 biases and sums, float64 scales."""

    def quantize(x: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        return torch.clamp(torch.round(x.double() / grid[0].double()) + grid[1].double(), 0, 255)

    def conv(integers: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, grids: list[tuple[Tensor, Tensor]]) -> Tensor:
        gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = (conv.weight * gain.view(-1, 1, 1, 1)).detach().double()
        scale = weight.abs().amax((1, 2, 3), keepdim=True) / 127
        step = (scale * grids[0][0]).view(-1, 1, 1)
        bias = torch.round((norm.bias - norm.running_mean * gain).detach().double().view(-1, 1, 1) / step)
        sums = F.conv2d(integers - grids[0][1].double(), torch.round(weight / scale), padding=1) + bias
        return quantize(sums * step, grids[1])

    grids = {identity: prepared.ranges.parameters(identity) for identity in prepared.ranges.edges}
    entry, middle, branch, result = (grids[f":{key}"] for key in ("x", "relu1", "bn2", "relu2"))
    first = quantize(x, entry)
    second = conv(first, block.conv1, block.bn1, [entry, middle])
    third = conv(second, block.conv2, block.bn2, [middle, branch])
    total = (third - branch[1]) * branch[0] + (first - entry[1]) * entry[0]
    return [first, second, third, quantize(total, result)]


def test_a_residual_block_equals_integer_arithmetic_within_one_step() -> None:
    block, x = with_statistics(Block()).eval(), torch.randn(4, 16, 12, 12)
    prepared = ready(block, x)
    with prepared.simulation.recording() as edges:
        simulate(prepared, x)
    assert [identity for identity, _ in edges] == [":x", ":relu1", ":bn2", ":relu2"]
    for (identity, actual), expected in zip(edges, integer_block(block, prepared, x), strict=True):
        difference = (actual.double() - expected).abs()
        assert difference.max() <= 1, identity
        assert (difference > 0).double().mean() < 0.002, identity
    scale, zero_point = prepared.ranges.parameters(":relu2")
    integers = torch.round(convert(prepared)(x) / scale) + zero_point
    assert (integers - expected.flatten(1)).abs().max() <= 1


def test_a_residual_block_equals_that_of_torch_ao_within_one_step() -> None:
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver, QConfig, QConfigMapping
    from torch.ao.quantization.quantize_fx import convert_to_reference_fx, prepare_fx

    block, x = with_statistics(Block()).eval(), torch.randn(4, 16, 12, 12)
    prepared = ready(block, x)
    with warnings.catch_warnings():
        # torch.ao warns of its own deprecation, and of the integer types that it uses.
        warnings.simplefilter("ignore")
        qconfig = QConfig(
            activation=MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=False),
            weight=PerChannelMinMaxObserver.with_args(
                dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
            ),
        )
        reference = prepare_fx(copy.deepcopy(block), QConfigMapping().set_global(qconfig), (x,))
        with torch.no_grad():
            reference(x)
            reference = convert_to_reference_fx(reference)
            expected = reference(x)
    step = prepared.ranges.parameters(":relu2")[0].item()
    assert step == pytest.approx(expected.unique().diff().min().item(), rel=1e-3)
    difference = (simulate(prepared, x) - expected).abs()
    assert difference.max() <= 1.001 * step
    assert (difference > 0.1 * step).float().mean() < 0.01
    torch.testing.assert_close(convert(prepared)(x), expected, atol=1.001 * step, rtol=0)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "same padding": (nn.Conv2d(3, 5, 3, padding="same"), (4, 3, 8, 8)),
    "valid padding": (nn.Conv2d(3, 5, 3, padding="valid"), (4, 3, 8, 8)),
    "dilated": (nn.Conv2d(3, 5, 3, dilation=2, padding=2), (4, 3, 8, 8)),
    "uneven": (nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1), groups=2), (4, 4, 8, 8)),
    "pointwise": (nn.Conv2d(3, 5, 1, bias=False), (4, 3, 8, 8)),
    "one dimension": (nn.Conv1d(3, 5, 4, stride=3, padding=2), (4, 3, 17)),
    "linear": (nn.Linear(6, 5), (16, 6)),
    "linear on sequences": (nn.Linear(6, 5, bias=False), (4, 7, 6)),
    "linear on grids": (nn.Linear(6, 5), (4, 3, 2, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_every_shape_are_close_to_float(name: str) -> None:
    layer, shape = LAYERS[name]
    x = torch.randn(shape)
    prepared = ready(layer, x)
    converted = convert(prepared)
    with torch.no_grad():
        expected, actual = layer(x), converted(x)
    assert actual.shape == expected.shape
    assert signal_to_noise(expected, actual) > 35
    assert signal_to_noise(simulate(prepared, x), actual) > 55
    assert len(quantized_layers(converted)) == 1


def test_a_functional_convolution_with_its_options() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6))
            self.projection = nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv2d(x, self.weight, bias=self.bias, stride=2, padding=(1, 1), groups=2)
            return F.linear(x.relu().mean((2, 3)), self.projection)

    model, x = Net(), torch.randn(4, 4, 8, 8)
    prepared = ready(model, x)
    assert prepared.plan.coverage == 1.0
    with torch.no_grad():
        assert signal_to_noise(model(x), convert(prepared)(x)) > 30


# --- particular nets


def test_a_batch_norm_behind_an_activation_stays_right() -> None:
    model = with_statistics(NormAfterActivationNet())
    prepared = ready(model, IMAGE)
    converted = convert(prepared)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in converted.modules()) == 3
    with torch.no_grad():
        assert signal_to_noise(model(IMAGE), converted(IMAGE)) > 30


def test_folding_a_batch_norm_behind_an_activation_would_be_wrong() -> None:
    """The pair of the test above: the order of the two matters."""
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))).eval()
    swapped = nn.Sequential(model[0], model[2], model[1]).eval()
    with torch.no_grad():
        wrong = convert(ready(swapped, IMAGE))(IMAGE)
        assert signal_to_noise(model(IMAGE), wrong) < 20
        assert signal_to_noise(model(IMAGE), convert(ready(model, IMAGE))(IMAGE)) > 30


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norms_own_eps_is_folded(affine: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.7, affine=affine), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with torch.no_grad():
        model[1].running_mean.uniform_(-0.3, 0.3)
        model[1].running_var.uniform_(0.1, 0.5)
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        assert signal_to_noise(model(IMAGE), convert(prepared)(IMAGE)) > 30


def test_present_statistics_are_folded() -> None:
    model = with_statistics(ResidualNet())
    prepared = ready(model, IMAGE)
    before = convert(prepared)(IMAGE)
    with torch.no_grad():
        model.bn1.running_mean.add_(1.0)
        model.fc.bias.add_(10.0)
        after = convert(prepared)(IMAGE)
        assert (after - before).mean() > 5
        assert len(quantized_layers(convert(prepared))) == 4


@pytest.mark.parametrize("tool", ["prune", "spectral_norm", "weight_norm"])
def test_weights_that_a_hook_or_parametrization_computes_are_up_to_date(tool: str) -> None:
    """After the last optimizer step, or loading a checkpoint, such a weight is computed anew only by a forward."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1)).eval()
    if tool == "prune":
        prune.l1_unstructured(model[0], "weight", amount=0.3)
    else:
        getattr(parametrizations, tool)(model[0])
    prepared = ready(model, IMAGE)
    with torch.no_grad():
        model(IMAGE)
        for name, parameter in model.named_parameters():
            if name.endswith(("orig", "original", "original0")):
                parameter.neg_()
        converted = convert(prepared)
        assert signal_to_noise(model(IMAGE), converted(IMAGE)) > 20


def test_what_only_training_does_is_not_converted() -> None:
    model = with_statistics(DropPathNet()).train()
    prepared = ready(model, IMAGE)
    model.train()
    converted = convert(prepared)
    assert torch.equal(converted(IMAGE), converted(IMAGE))
    assert all(module.training for module in model.modules())


# --- recipes


@pytest.mark.parametrize(("recipe", "limit"), [("int8", 127), ("int8_reduce_range", 63)])
def test_weights_keep_to_the_recipes_grid(recipe: str, limit: int) -> None:
    model = with_statistics(ResidualNet())
    prepared = ready(model, IMAGE, recipe=recipe)
    converted = convert(prepared)
    assert max(layer.weight.abs().max().item() for layer in quantized_layers(converted)) == limit
    with torch.no_grad():
        assert signal_to_noise(model(IMAGE), converted(IMAGE)) > 15


@pytest.mark.parametrize("spec", [IntegerSpec(bits=16), IntegerSpec(symmetric=True)], ids=["wide", "symmetric"])
def test_activations_keep_to_the_recipes_grid(spec: IntegerSpec) -> None:
    recipe = Recipe(name="own", activation=spec)
    model = with_statistics(ResidualNet())
    prepared = ready(model, IMAGE, recipe=recipe)
    with prepared.simulation.recording() as edges:
        simulated = simulate(prepared, IMAGE)
    assert max(integers.int().max().item() for _, integers in edges) == 2**spec.bits - 1
    zero_points = {int(prepared.ranges.parameters(identity)[1]) for identity, _ in edges}
    assert (zero_points == {128}) == spec.symmetric
    with torch.no_grad():
        assert signal_to_noise(simulated, convert(prepared)(IMAGE)) > 20


@pytest.mark.parametrize("layer", ["conv2d", "grouped", "pointwise", "linear"])
def test_bias_correction_keeps_the_mean_of_each_channel(layer: str) -> None:
    """Behind a ReLU the rounding errors of the weights do not cancel: with two bits they shift every mean."""
    build = {
        "conv2d": lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)),
        "grouped": lambda: nn.Sequential(nn.Conv2d(8, 6, 3, groups=2), nn.BatchNorm2d(6)),
        "pointwise": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)),
        "linear": lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)),
    }[layer]
    torch.manual_seed(4)
    model = with_statistics(build()).eval()
    x = torch.rand(64, 8) if layer == "linear" else torch.rand(64, 8, 6, 6)
    x = x * torch.linspace(0.2, 3, 8).view(1, -1, *[1] * (x.dim() - 2))
    shifts = []
    for corrected in (False, True):
        weight = IntegerSpec(bits=3, symmetric=True, per_channel=True)
        prepared = ready(model, x, recipe=Recipe(name="coarse", weight=weight, bias_correction=corrected))
        with torch.no_grad():
            difference = simulate(prepared, x) - model(x)
            torch.testing.assert_close(convert(prepared)(x), simulate(prepared, x), atol=1e-4, rtol=0)
            # With the weights alone rounded the mean is exact, but for places that not every tap of a kernel reads.
            with prepared.simulation.quantizing_only(frozenset(prepared.operators)), prepared.attached("frozen"):
                weights_alone = model(x).transpose(0, 1).flatten(1).mean(1)
        exact = model(x).detach().transpose(0, 1).flatten(1).mean(1)
        shifts.append(difference.transpose(0, 1).flatten(1).mean(1).abs())
        limit = 1e-4 if layer in ("pointwise", "linear") else 5e-3
        assert ((weights_alone - exact).abs().max() < limit) == corrected
    uncorrected, corrected = shifts
    assert uncorrected.max() > 0.1
    assert corrected.max() < 0.02


# --- errors


def test_an_edge_that_was_never_observed_is_named() -> None:
    model = with_statistics(ResidualNet()).eval()
    prepared = prepare(model, (IMAGE,))
    with pytest.raises(CalibrationError, match=r":image, :stem\.2.*were not"):
        convert(prepared)
    calibrate(prepared, steps_of(prepared, [IMAGE]))
    convert(prepared)
    lost = prepared.ranges.observers[":relu1"]
    lost.low = lost.high = None
    with pytest.raises(CalibrationError, match=r"but :relu1 was not\. Train or calibrate"):
        convert(prepared)


def test_calibration_that_misses_a_layer_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.always(x)
            return self.sometimes(x) if x.sum() > 0 else x

    model = Net().eval()
    with torch.no_grad():
        model.always.weight.copy_(torch.eye(4))
        model.always.bias.zero_()
    prepared = prepare(model, (torch.ones(2, 4),))
    with pytest.raises(CalibrationError, match="sometimes:"):
        calibrate(prepared, steps_of(prepared, [-torch.ones(2, 4)]))


def test_calibration_without_a_batch_is_refused() -> None:
    prepared = prepare(with_statistics(ResidualNet()).eval(), (IMAGE,))
    with pytest.raises(CalibrationError, match="yielded none"):
        calibrate(prepared, [])


@pytest.mark.parametrize("damage", ["bias", "weight"])
def test_a_converted_model_that_differs_is_refused(damage: str) -> None:
    prepared = ready(with_statistics(ResidualNet()), IMAGE)
    converted = convert(prepared)
    check_agreement(prepared, converted, (IMAGE,), {})
    getattr(quantized_layers(converted)[1], damage).zero_()
    with pytest.raises(ExportError, match="Expected the converted model to agree"):
        check_agreement(prepared, converted, (IMAGE,), {})


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(0.2)])
def test_what_evaluation_leaves_out_is_not_exported(between: nn.Module) -> None:
    # Behind a dropout XNNPACK takes no quantized layer.
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 8), between, nn.ReLU(), between, nn.Linear(8, 3), between).eval()
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))
    converted = convert(prepared)

    assert not any(isinstance(module, nn.Identity | nn.Dropout) for module in converted.modules())
    assert check_agreement(prepared, converted, (x,), {}) > 60
    assert len(model) == 6


def test_an_identity_with_hooks_is_exported() -> None:
    x = torch.randn(8, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 3)).eval()
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    prepared = prepare(model, (x,))
    calibrate(prepared, steps_of(prepared, [x]))

    assert check_agreement(prepared, convert(prepared), (x,), {}) > 25
