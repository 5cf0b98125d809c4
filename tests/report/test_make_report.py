"""What a report is made of is measured on the file itself."""

import torch
from reports import changed
from torch import nn

from lightning_quant.report.limits import Limits
from lightning_quant.report.make_report import tensor_bytes, with_limits


def test_bytes_of_float_count_shared_tensors_once_and_buffers_too() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False), nn.BatchNorm1d(4))
    separate = tensor_bytes(model)
    model[1].weight = model[0].weight

    assert separate - tensor_bytes(model) == 8 * 4 * 4
    assert tensor_bytes(nn.BatchNorm1d(4)) == 4 * 4 * 4 + torch.int64.itemsize


def test_a_report_is_held_against_limits_of_size_and_speed() -> None:
    good = changed()
    held = with_limits(good, Limits(max_size_ratio=0.1))

    assert good.warnings == []
    assert any("limits FAILED" in text for text in held.warnings)
