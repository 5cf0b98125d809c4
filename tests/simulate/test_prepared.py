"""A module is routed to its graphs and back, and owned by nobody else."""

import copy

import pytest
import torch
from models import CASES, Case, calibrated
from residual_nets import IMAGE, equal, residual_net

from lightning_quant.errors import QuantizationError


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
