"""Batches of any class: what a forward is called with is flattened, rebuilt, exported and called again."""

import weakref
from collections import UserDict, namedtuple
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_quant import load, quantize
from lightning_quant.calls.calls import flatten_call, forward_signature, rebuild_call
from lightning_quant.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore::lightning_quant.errors.NoEffectWarning")


@dataclass
class FromRows:
    """Made of something else than its fields."""

    rows: InitVar[list[Tensor]]
    x: Tensor = field(init=False)
    size: int = field(init=False)

    def __post_init__(self, rows: list[Tensor]) -> None:
        self.x, self.size = torch.stack(list(rows)), len(rows)


@dataclass(slots=True, frozen=True)
class Slotted:
    x: Tensor
    label: Tensor | None = None


class Store:
    """Holds the tensors of a graph, and knows its owner."""

    def __init__(self, parent: Any, **values: Any) -> None:
        self.mapping, self.parent = values, weakref.ref(parent)


class Graph:
    """As the batches of graph libraries: attributes are looked up in a store behind."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["store"] = Store(self, **values)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["store"].mapping[name]
        except KeyError:
            raise AttributeError(name) from None


class Circular:
    def __init__(self, x: Tensor) -> None:
        self.x, self.itself = x, [self]


class DictBatch(dict):
    """A dict with a method and an attribute."""

    note = "none"

    def image(self) -> Tensor:
        return self["x"]


class ByName(UserDict):
    """As the encodings of tokenizers."""


class Keyless:
    """Registered by its project without names for its children."""

    def __init__(self, x: Tensor, stage: str) -> None:
        self.x, self.stage = x, stage


pytree.register_pytree_node(Keyless, lambda k: ([k.x], k.stage), lambda children, stage: Keyless(*children, stage))
Pair = namedtuple("Pair", ["x", "rest"])


def graph(x: Tensor) -> Graph:
    return Graph(x=x, num_nodes=3, name="g")


BATCHES: dict[str, tuple[Any, Any, str]] = {
    "a dataclass with InitVar": (lambda x: FromRows(list(x)), lambda b: b.x, "batch_x"),
    "a frozen dataclass with slots": (Slotted, lambda b: b.x, "batch_x"),
    "a graph's batch": (graph, lambda b: b.x, "batch_store_mapping_x"),
    "a subclass of dict": (lambda x: DictBatch(x=x), lambda b: b.image(), "batch_x"),
    "a UserDict": (lambda x: ByName(x=x), lambda b: b["x"], "batch_data_x"),
    "a class registered without names": (lambda x: Keyless(x, "train"), lambda b: b.x, "batch_x"),
    "named tuples and dicts of dicts": (
        lambda x: Pair({"a": {"b": x}}, [1, None]),
        lambda b: b.x["a"]["b"],
        "batch_x_a_b",
    ),
}


class Net(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.read = read
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, batch: Any) -> Tensor:
        return self.layers(self.read(batch))


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_flattened_and_rebuilt(name: str) -> None:
    make, read, input_name = BATCHES[name]
    signature = forward_signature(Net(read).forward)
    batch = make(torch.randn(4, 8))
    spec, tensors = flatten_call(signature, (batch,), {})
    (rebuilt,), _ = rebuild_call(signature, spec.arguments([tensors[0] * 2]))
    again, _ = flatten_call(signature, (make(torch.randn(4, 8)),), {})

    assert spec.names == (input_name,)
    assert type(rebuilt) is type(batch)
    assert torch.equal(read(rebuilt), read(batch) * 2)
    assert again.key() == spec.key()


@pytest.mark.parametrize("name", ["a dataclass with InitVar", "a graph's batch", "a class registered without names"])
def test_artifact_takes_the_batch_as_the_module_does(name: str, tmp_path: Path) -> None:
    make, read, input_name = BATCHES[name]
    model, batch = Net(read).eval(), make(torch.randn(16, 8))
    artifact = quantize(model, calibration_data=[(batch,)], output_dir=tmp_path)

    assert [info["name"] for info in artifact.manifest["signature"]["inputs"]] == [input_name]
    assert (load(tmp_path)(batch) - model(batch)).abs().max() < 0.05


def test_object_that_contains_itself_is_refused_by_name() -> None:
    batch = Circular(torch.randn(4, 8))
    signature = forward_signature(Net(None).forward)
    with pytest.raises(CaptureError, match="contains itself"):
        flatten_call(signature, (batch,), {})
