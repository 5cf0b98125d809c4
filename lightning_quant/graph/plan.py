"""The plan: what happens to each operator of a module, or the reason it stays float. Data only, no tensors."""

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from lightning_quant.numerics.folding import Affine, Norm

COMPUTED_ONCE = "computed from parameters alone, so once and for all when the model is converted"
UNREAD = "nothing reads its result in evaluation, so it is no part of what is exported"
# The key of what the root of a graph does itself begins with a dot: its name is that of the root.
_ITSELF = re.compile(r"(?<=[^.])\.\.[^.#]+")
LOST = "planned in integers, but the exported file computes it in float"


@dataclass(frozen=True)
class Edge:
    """A tensor that is quantized: the result of one node, shared by all its readers.

    Attributes:
        key: key of the node that produces it.
        group: edges of one group share scale and zero point (the input and output of a max-pool, say).
        observed: whether its own values count for the group's range; a max-pool's output is covered by its input.
        passed: whether its node only passes its input on, as dropout does in evaluation: nothing is left to round, and
            in training the values that dropout scales up must not be clipped.
        path: of the graph that it is in; known by its `identity` among the edges of all graphs.
    """

    key: str
    group: str
    observed: bool = True
    passed: bool = False
    path: str = ""

    @cached_property
    def identity(self) -> str:
        """Name among all graphs of a plan."""
        return identify(self.path, self.key)

    @cached_property
    def shared(self) -> str:
        """Name of the group among all graphs of a plan."""
        return identify(self.path, self.group)


@dataclass(frozen=True)
class Operator:
    """One operator that runs in integers, with what is fused into it.

    Attributes:
        key: key of the node that does the main work.
        kind: "conv2d", "linear", "add", "max_pool", ...
        inputs: keys of the edges it reads, in order.
        output: key of the node whose result it produces, after all fused nodes.
        quantized_output: whether that result is an edge; a linear layer may answer in float.
        weight: qualified name of the weight parameter, or key of the node that computes it from parameters; empty when
            there is none.
        bias: the same of the bias.
        pad: key of a fused zero padding.
        batch_norm: key of a fused batch normalization.
        norm: names of the statistics of that.
        affine: factors and shifts of channels behind that, which are folded like it.
        moved: whether values are moved between the layer and that, so that the output has another shape.
        activation: key of a fused activation.
        path: of the graph that it is in; known by its `identity` among the operators of all graphs.
    """

    key: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    quantized_output: bool = True
    weight: str = ""
    bias: str = ""
    pad: str = ""
    batch_norm: str = ""
    norm: Norm | None = None
    affine: tuple[Affine, ...] = ()
    moved: bool = False
    activation: str = ""
    path: str = ""

    @cached_property
    def identity(self) -> str:
        """Name among all graphs of a plan."""
        return identify(self.path, self.key)

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Identities of the edges that it reads, in order."""
        return tuple(identify(self.path, key) for key in self.inputs)

    @cached_property
    def writes(self) -> str:
        """Identity of its output, which is an edge where that is quantized."""
        return identify(self.path, self.output)

    @property
    def name(self) -> str:
        """Qualified name, as rows and overrides call it."""
        return join(self.path, self.key)


@dataclass(frozen=True)
class Row:
    """One line of the plan for a reader.

    Attributes:
        name: qualified name of the layer, or of the module and operation ("layer1.0.add").
        kind: layer type or operation.
        action: "float", "fused" (into the operator that `reason` names), or how it is quantized: "int8" in graphs, the
            action of a `Scheme` in layers.
        reason: why, for everything that is not as the recipe asks.
        macs: multiply-adds that the captured call makes here; the rows of a plan add up to the whole call.
        weights: values of its weights, those with more than one dimension; tied ones count once, for a layer that
            stays float where there is one.
        excluded: whether it is float because the user wants it.
        reads: names of the rows whose results it reads, as far as a graph tells.
    """

    name: str
    kind: str
    action: str
    reason: str = ""
    macs: int = 0
    weights: int = 0
    excluded: bool = False
    reads: tuple[str, ...] = field(default=(), compare=False)

    @property
    def is_quantized(self) -> bool:
        """Whether it is no float layer, nor a part of another row's operator."""
        return self.action not in ("float", "fused")


@dataclass(frozen=True)
class GraphPlan:
    """The part of a plan that concerns one traced graph: the module itself, or an island inside it."""

    path: str
    operators: tuple[Operator, ...]
    edges: tuple[Edge, ...]

    @property
    def weighted(self) -> frozenset[str]:
        """Keys of the operators that carry weights."""
        return frozenset(operator.key for operator in self.operators if operator.weight)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold, with the path said once."""
        parts: dict[str, tuple[Operator | Edge, ...]] = {"operators": self.operators, "edges": self.edges}
        told = {name: tuple(_without_path(item) for item in part) for name, part in parts.items()}
        return {"path": self.path, **told}


@dataclass(frozen=True)
class Plan:
    """What a recipe and a runtime make of one module.

    Attributes:
        recipe: name of the recipe.
        runtime: name of the runtime.
        module: qualified name of the module inside the LightningModule; empty for the whole.
        graphs: one per traced graph.
        rows: one per operator, in the order of execution.
    """

    recipe: str
    runtime: str
    module: str
    graphs: tuple[GraphPlan, ...]
    rows: tuple[Row, ...]

    @property
    def num_quantized(self) -> int:
        """Number of operators or layers that are quantized."""
        return sum(row.is_quantized for row in self.rows)

    @property
    def coverage(self) -> float:
        """Share of the whole call's multiply-adds that run as the recipe asks, in [0, 1].

        With a graph these are the integer ones, without those of layers whose weights alone are stored in integers; in
        recipes of layers, those of the quantized layers. What no layer computes counts as float.
        """
        counted = [row for row in self.rows if row.action == "int8" or (row.is_quantized and not self.graphs)]
        return _share(sum(row.macs for row in counted), sum(row.macs for row in self.rows))

    @property
    def weight_coverage(self) -> float:
        """Share of the weights' bytes that are stored with fewer bits, in [0, 1]."""
        stored = sum(row.weights for row in self.rows if row.is_quantized)
        return _share(stored, sum(row.weights for row in self.rows))

    @property
    def stored_share(self) -> float:
        """The same of the weights that the user did not exclude, in [0, 1]."""
        asked = [row for row in self.rows if not row.excluded]
        return _share(sum(row.weights for row in asked if row.is_quantized), sum(row.weights for row in asked))

    def with_edges(self, present: Collection[str], lost: Collection[str] = ()) -> "Plan":
        """Return the plan of a file that has these edges: operators around others are no part of it, which rows say.

        A part whose own code runs around graphs may compute what nothing reads; exporters leave that out.

        Args:
            present: identities of the edges that the file has.
            lost: of those that it has not although something reads them.
        """
        graphs, unread, in_float = [], set[str](), set[str]()
        for graph in self.graphs:
            edges = tuple(edge for edge in graph.edges if edge.passed or edge.identity in present)
            missing = {edge.key for edge in graph.edges} - {edge.key for edge in edges}
            kept = tuple(o for o in graph.operators if not missing & {o.output, *o.inputs})
            gone = [o for o in graph.operators if o not in kept]
            for key in missing:
                (in_float if identify(graph.path, key) in lost else unread).add(join(graph.path, key))
            for o in gone:
                names = {
                    join(graph.path, key)
                    for key in (o.key, o.batch_norm, o.activation, o.pad, *(a.key for a in o.affine))
                    if key
                }
                (unread if {*o.reads, o.writes}.isdisjoint(lost) else in_float).update(names)
            graphs.append(replace(graph, operators=kept, edges=edges))
        gone_rows = {row for row in self.rows if row.action != "float" and row.name in unread | in_float}
        rows = tuple(_left_out(row, row.name in in_float) if row in gone_rows else row for row in self.rows)
        return replace(self, graphs=tuple(graphs), rows=rows)

    def to_dict(self) -> dict[str, Any]:
        """Return nested dicts and lists that JSON can hold."""
        shares = ("coverage", "weight_coverage", "stored_share")
        graphs = tuple(graph.to_dict() for graph in self.graphs)
        return {**asdict(self), "graphs": graphs, **{name: getattr(self, name) for name in shares}}

    def shares(self) -> str:
        """Say how much of the call's arithmetic and of the weights that is."""
        return f"{self.coverage:.1%} of the multiply-adds and {self.weight_coverage:.1%} of the weights' bytes"

    def __str__(self) -> str:
        from lightning_quant.terminal.tables import text_table

        rows = [(r.name, r.kind, r.action, r.reason, f"{r.macs:,}" if r.macs else "") for r in self.rows]
        head = f"{self.num_quantized} operators in {self.recipe}, {self.shares()}"
        return f"{head}\n{text_table(('layer', 'kind', 'runs in', 'reason', 'multiply-adds'), rows)}"


def identify(path: str, key: str) -> str:
    """Return the name of an edge or operator among all graphs of a plan."""
    return f"{path}:{key}"


def join(*parts: str) -> str:
    """Join dotted paths, leaving out empty ones, and what a layer does itself where the layer has a path."""
    return _ITSELF.sub("", ".".join(part for part in parts if part)).lstrip(".")


def _left_out(row: Row, is_lost: bool) -> Row:
    return (
        replace(row, action="float", reason=LOST)
        if is_lost
        else replace(row, action="float", reason=UNREAD, macs=0, weights=0)
    )


def _without_path(item: Operator | Edge) -> dict[str, Any]:
    return {name: value for name, value in asdict(item).items() if name != "path"}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
