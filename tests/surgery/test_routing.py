"""Something else runs in place of a forward, and modules are copied without their weights."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant.errors import CaptureError, QuantizationError
from lightning_quant.surgery.routing import (
    Route,
    clone,
    copied,
    device_of,
    evaluation_mode,
    fetch,
    resolve,
    route,
    shadowed,
    training_mode,
    unroute,
    unroute_all,
)


class Doubled(Route):
    """Answers twice what the module does."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        return 2 * type(self.module).forward(self.module, x)  # type: ignore[arg-type]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)))


def test_a_routed_module_keeps_type_keys_and_hooks_and_has_its_forward_back() -> None:
    model, x, seen = net(), torch.randn(3, 4), []
    keys, expected = list(model.state_dict()), model[0](x)
    model[0].register_forward_hook(lambda *_: seen.append(1))
    route(model[0], Doubled(model[0]))
    assert torch.equal(model[0](x), 2 * expected)
    assert (seen, type(model[0]), list(model.state_dict())) == ([1], nn.Linear, keys)
    with pytest.raises(QuantizationError, match=r"own forward, but an instance attribute `forward` \(Doubled\)"):
        route(model[0], Doubled(model[0]))
    unroute(model[0])
    unroute(model[0])
    assert torch.equal(model[0](x), expected)


def test_what_others_put_in_a_forwards_place_stays() -> None:
    model = net()
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    route(model[1], Doubled(model[1]))
    unroute_all(model)
    assert "forward" in vars(model[0])
    assert "forward" not in vars(model[1])


def test_a_clone_shares_parameters_and_owns_buffers_flags_and_attributes() -> None:
    model = net()
    model.history = [torch.randn(2, requires_grad=True) * 2]
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)
    twin = clone(model)

    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    twin[1][0].running_mean.fill_(5)
    twin.train(False)
    assert not model[1][0].running_mean.any()
    assert model.training
    assert not twin.history[0].requires_grad
    assert torch.equal(copied(model.history)[0], model.history[0])


def test_flags_are_put_back_one_by_one_even_after_an_error() -> None:
    model = net()
    model[1][0].eval()
    before = [child.training for child in model.modules()]
    for mode, flag in ((evaluation_mode, False), (training_mode, True)):
        with pytest.raises(KeyError), mode(model):  # noqa: PT012
            assert {child.training for child in model.modules()} == {flag}
            raise KeyError
        assert [child.training for child in model.modules()] == before


def test_attributes_hide_parameters_while_a_block_runs() -> None:
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    expected = layer(x)
    with shadowed(layer, {"weight": torch.zeros(2, 4)}):
        assert torch.equal(layer(x), layer.bias.expand(3, 2))
    assert torch.equal(layer(x), expected)


def test_modules_and_tensors_are_found_by_dotted_names() -> None:
    model = net()
    assert resolve(model, "") is model
    assert resolve(model, "1.1") is model[1][1]
    assert fetch(model, "1.0.running_mean") is model[1][0].running_mean
    assert device_of(nn.ReLU()).type == "cpu"
    with pytest.raises(AttributeError, match="nowhere"):
        resolve(model, "1.nowhere")


def test_parts_are_found_that_have_no_length_or_no_children() -> None:
    class Unmeasured(nn.Linear):
        def __len__(self) -> int:
            raise TypeError("no length")

    root = nn.Sequential(Unmeasured(2, 2), nn.Sequential())
    assert resolve(root, "0") is root[0]
    assert resolve(root, "1") is root[1]


def test_what_nobody_can_copy_is_shared_and_all_else_is_not(tmp_path: Path) -> None:
    class Refuses:
        def __deepcopy__(self, memo: Any) -> None:
            raise RuntimeError("no copies")

    layer = nn.Linear(2, 2)
    with (tmp_path / "log.txt").open("w") as file:
        held = [threading.Lock(), file, (x for x in "abc"), Refuses()]
        layer.held, layer.state = {"several": held, "list": [1]}, {"file": file, "seen": [2]}  # type: ignore[assignment]
        duplicate = clone(layer)

    assert [a is b for a, b in zip(duplicate.held["several"], held, strict=True)] == [True] * 4
    assert duplicate.state["file"] is file
    assert duplicate.held["several"] is not held
    assert duplicate.held["list"] is not layer.held["list"]
    assert duplicate.state["seen"] == [2]
    assert duplicate.state["seen"] is not layer.state["seen"]
    assert duplicate.weight is layer.weight


def test_a_module_that_cannot_be_copied_is_told_by_its_name() -> None:
    class Unique(nn.Linear):
        def __deepcopy__(self, memo: Any) -> None:
            raise RuntimeError("there is one of me")

    with pytest.raises(CaptureError, match=r"Expected Unique to be copied .*there is one of me"):
        clone(nn.Sequential(Unique(2, 2)))
