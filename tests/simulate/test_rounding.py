"""Training's few operations give the numbers of the simulation."""

from one_by_one import one_by_one
from residual_nets import LARGE, observing_residual
from step_count import count
from torch import Tensor


def test_a_relu_with_a_hook_is_called() -> None:
    model, prepared = observing_residual()
    seen: list[Tensor] = []
    model.relu1.register_forward_hook(lambda module, args, output: seen.append(output))
    prepared.set_phase("fake_quantize")
    for _ in range(2):
        model(LARGE)

    assert len(seen) == 2
    assert all(bool((x >= 0).all()) for x in seen)


def test_a_relu_costs_no_pass_of_its_own() -> None:
    model, prepared = observing_residual()
    prepared.set_phase("observe")
    model(LARGE)
    prepared.set_phase("frozen")
    operations = count(lambda: model(LARGE).sum().backward()).operations

    assert operations["relu"] == operations["threshold_backward"] == 0
    with one_by_one():
        assert count(lambda: model(LARGE).sum().backward()).operations["relu"] == 3
