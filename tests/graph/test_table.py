"""What users include and exclude by patterns."""

from typing import Any

import torch
from models import BranchingNet, PaddedNet
from prepared_graphs import rows_of
from torch import Tensor, nn

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def selected(**patterns: Any) -> list[str]:
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))})

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.pool, self.head = model, nn.AdaptiveAvgPool2d(1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.parts["encoder"](x)).flatten(1))

    rows = rows_of(Net(), IMAGE, **patterns)
    for row in rows.values():
        assert row.action == "int8" or row.reason
    return [name for name, row in rows.items() if row.action == "int8" and row.kind in ("Conv2d", "Linear")]


def test_include_and_exclude_take_names_prefixes_patterns_and_types() -> None:
    everything = ["parts.encoder.0", "parts.encoder.2", "head"]
    assert selected() == everything
    assert selected(exclude=("head",)) == everything[:2]
    assert selected(exclude=("parts.encoder",)) == ["head"]
    assert selected(exclude=("parts.*.0",)) == everything[1:]
    assert selected(exclude=("Conv2d",)) == ["head"]
    assert selected(include=("Conv2d",)) == everything[:2]
    assert selected(include=("head", "*.2")) == everything[1:]
    assert selected(include=("parts",), exclude=("*.2",)) == everything[:1]


def test_layer_types_name_subclasses_and_lone_layers_too() -> None:
    image = torch.randn(4, 3, 9, 9)
    rows = rows_of(PaddedNet(), image, exclude=("PaddingConv2d",))
    assert [row.action for row in rows.values() if row.macs] == ["float", "int8"]
    rows = rows_of(BranchingNet(), IMAGE, exclude=("Linear",))
    assert [row.action for row in rows.values() if row.macs] == ["int8", "int8", "float"]
    rows = rows_of(BranchingNet(), IMAGE, exclude=("head",))
    assert [row.action for row in rows.values() if row.macs] == ["int8", "int8", "float"]


def test_excluded_rows_say_which_pattern_excluded_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(2, 4)
    assert rows_of(model, x, exclude=("*2",))["2"].reason == 'excluded by "*2"'
    assert rows_of(model, x, include=("0",))["2"].reason == "not in `include`"
