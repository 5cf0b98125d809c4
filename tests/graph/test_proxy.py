"""What Python code asks of a traced value is answered as of the value itself."""

import collections.abc
import copy
import dataclasses
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quant import quantize
from lightning_quant.errors import PlanError, QuantizationError
from lightning_quant.export.prepare import prepare

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def has_attribute(y: Any) -> Tensor:
    return y.logits if hasattr(y, "logits") else y


def attribute_with_default(y: Any) -> Tensor:
    return getattr(y, "logits", y)


def tried_attribute(y: Any) -> Tensor:
    try:
        return y.last_hidden_state
    except AttributeError:
        return y


def instance_of_tensor(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y * 2


def instance_of_containers(y: Any) -> Tensor:
    return y[0] if isinstance(y, (tuple, list, dict, collections.abc.Sequence)) else y


def exact_type(y: Any) -> Tensor:
    return y if type(y) is Tensor else y * 2


def name_of_type(y: Any) -> Tensor:
    return y if type(y).__name__ == "Tensor" and isinstance(type(y), type) else y * 2


def is_tensor(y: Any) -> Tensor:
    return y if torch.is_tensor(y) else y * 2


def can_be_called(y: Any) -> Tensor:
    return y() if callable(y) else y


def length(y: Any) -> Tensor:
    return y * len(y)


def kind_of_numbers(y: Any) -> Tensor:
    return y * 2 if y.is_cuda or y.is_complex() or not torch.is_floating_point(y) else y


def layout(y: Any) -> Tensor:
    return y if y.layout is torch.strided and y.is_contiguous() else y * 2


def place(y: Any) -> Tensor:
    return y * 2 if y.device.type == "cuda" else y


def has_keys(y: Any) -> Tensor:
    return y["logits"] if hasattr(y, "keys") else y


def is_dataclass(y: Any) -> Tensor:
    return y.logits if dataclasses.is_dataclass(y) else y


def size_as_text(y: Any) -> Tensor:
    return y * {"8": 2.0, "9": 3.0}[f"{y.shape[1]}"]


def size_as_key(y: Any) -> Tensor:
    return y * {8: 2.0}.get(y.shape[1], 3.0)


def copied(y: Any) -> Tensor:
    return copy.copy(y) * 2


def answered() -> list[Callable[[Any], Tensor]]:
    return [
        *(has_attribute, attribute_with_default, tried_attribute, instance_of_tensor, instance_of_containers),
        *(exact_type, name_of_type, is_tensor, can_be_called, length, kind_of_numbers, layout, place, has_keys),
        *(is_dataclass, size_as_text, size_as_key, copied),
    ]


class Asking(nn.Module):
    def __init__(self, ask: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.ask = nn.Linear(8, 8), nn.Linear(8, 3), ask

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.ask(self.first(x)))


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def float_graph_of(model: nn.Module) -> dict[str, str]:
    """Prepare a model, check that its graphs do in both modes what it does, and return what each layer becomes."""
    prepared = prepare(model, (X,))
    for training in (True, False):
        model.train(training)
        expected = model(X)
        prepared.attach()
        torch.testing.assert_close(model(X), expected)
        prepared.detach()
    # A part that is one layer alone has a row for that layer's operator.
    return {row.name.removesuffix(".linear"): row.action for row in prepared.plan.rows}


@pytest.mark.parametrize("ask", answered(), ids=lambda ask: ask.__name__)
def test_a_value_answers_in_a_trace_as_ever(ask: Callable[[Any], Tensor]) -> None:
    rows = float_graph_of(Around(Asking(ask)))

    assert {rows[name] for name in ("inner.first", "inner.last", "head")} == {"int8"}
    assert "inner" not in rows


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"logits": y, "hidden": None},
    "tuple": lambda y: (y, y * 2),
    "list": lambda y: [y, None],
    "dataclass": Result,
    "nested": lambda y: {"logits": (y, {"more": y})},
}


class Opaque(nn.Module):
    """Cannot be traced, since it looks into values."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(8, 8), make

    def forward(self, x: Tensor) -> Any:
        if x.sum() > 1e9:
            x = x * 2
        return self.make(self.layer(x))


class Reading(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head = Opaque(make), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        match y:
            case {"logits": logits, **others}:
                y = logits + len(others) + sum(value for key, value in y.items() if key == "more")
            case (first, second):
                y = first if second is None else first + second
            case Result(logits, None):
                y = logits
        return self.head(y[0] if type(y) is tuple else y)


class Nested(Reading):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        first, rest = y["logits"]
        return self.head(first + rest.get("less", rest["more"]))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_what_an_untraceable_module_answers_is_the_container_that_it_is(kind: str) -> None:
    rows = float_graph_of((Nested if kind == "nested" else Reading)(CONTAINERS[kind]))

    assert rows["body.layer"] == rows["head"] == "int8"


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.scripted = nn.Linear(8, 8), torch.jit.script(nn.Sequential(nn.Linear(8, 3), nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scripted(self.first(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::lightning_quant.errors.NoEffectWarning")
def test_scripted_children_run_as_they_are_among_stored_layers(tmp_path: Path) -> None:
    artifact = quantize(Scripted(), "int8_dynamic", "torch", calibration_data=[X], output_dir=tmp_path / "quantized")
    rows = {row["name"]: row["action"] for row in artifact.plan["rows"]}

    assert (rows["first"], rows["scripted.0"]) == ("int8 dynamic", "float")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_children_are_refused_by_name_where_graphs_are_made() -> None:
    with pytest.raises(PlanError, match="'scripted' is scripted or traced, which PyTorch's exporter does not take"):
        prepare(Scripted(), (X,))
    with pytest.raises(QuantizationError, match=r"'scripted' is scripted or traced, which `torch\.export`"):
        quantize(Scripted(), "int8_dynamic", calibration_data=[X])


def steps_of_a_size(y: Tensor) -> Tensor:
    return sum((y[:, i : i + 1] for i in range(y.shape[1])), y)


def entry_of_a_list(y: Tensor) -> Tensor:
    return y * [1.0, 2.0, 3.0, 4.0, 5.0][y.shape[0]]


def slice_of_a_list(y: Tensor) -> Tensor:
    return y * len([1.0, 2.0, 3.0, 4.0, 5.0][: y.shape[0]])


def whole_number(y: Tensor) -> Tensor:
    return y * operator.index(y.shape[0])


def steps_of_a_value(y: Tensor) -> Tensor:
    return sum((y for _ in range((y > 0).sum().item())), y)


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        *((ask, "a size of an input") for ask in (steps_of_a_size, entry_of_a_list, slice_of_a_list, whole_number)),
        (steps_of_a_value, "a value of a tensor"),
    ],
)
def test_numbers_that_only_a_call_knows_are_called_what_they_are(ask: Callable[[Any], Tensor], what: str) -> None:
    body = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(ask(self.body(x)))

    rows = {row.name: row for row in prepare(Net().eval(), (X,), trains=False).plan.rows}

    assert f"Net.forward cannot be traced: {what} says how often a loop runs" in rows["(forward)"].reason
    assert rows["head"].action == "int8"
