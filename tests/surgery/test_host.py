"""What is made and measured is on the CPU in float32, and the user's own is left where it is."""

import torch
from torch import nn

from lightning_quant.surgery.host import HOST, copied_to, device_for_search, moved, moved_call, on_host


def test_a_module_that_is_there_is_itself_and_another_a_copy_with_its_ties() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    model[1].weight = model[0].weight
    assert on_host(model) is model
    half = model.to(torch.bfloat16)
    copy = on_host(half)

    assert copy is not half
    assert copy[0].weight is copy[1].weight
    assert (copy[0].weight.dtype, half[0].weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(copy[0].weight, half[0].weight.float())


def test_attributes_that_name_the_old_device_name_the_new_one() -> None:
    model = nn.Linear(2, 2)
    model.place, model.spelling, model.other = torch.device("cpu"), "cpu", "cpu:7"
    there = copied_to(model, torch.device("meta"))

    assert (there.place, there.spelling, there.other) == (torch.device("meta"), "meta", "cpu:7")
    assert {parameter.device.type for parameter in there.parameters()} == {"meta"}
    assert model.place == HOST


def test_tensors_that_are_right_are_themselves() -> None:
    x, indices = torch.randn(3), torch.arange(3)
    assert moved(x) is x
    assert moved(indices) is indices
    assert moved(x.half()).dtype == torch.float32
    assert moved(x.half(), in_float32=False).dtype == torch.float16
    parameter = moved(nn.Parameter(x.half(), requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad


def test_calls_are_moved_whole_and_search_needs_double_precision() -> None:
    call = moved_call((torch.randn(2).half(), [torch.device("meta")]), {"flag": True})
    assert call.args[0].dtype == torch.float32
    assert (call.args[1], call.kwargs) == ([HOST], {"flag": True})
    assert device_for_search(torch.device("mps")) == HOST
    assert device_for_search(torch.device("meta")) == torch.device("meta")
