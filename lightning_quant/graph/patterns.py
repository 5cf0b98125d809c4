"""Match a graph against a runtime's operator table: which operators run in integers, which tensors are quantized.

`candidates.py` goes forwards and says what could run in integers; backwards, what should because somebody reads its
result in integers.
"""

import functools
from dataclasses import replace

import torch
from torch import Size, Tensor, fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.graph.candidates import Candidates, Unit
from lightning_quant.graph.claims import Claim, claim_of
from lightning_quant.graph.constants import ancestors, sources
from lightning_quant.graph.expansions import WHOLE
from lightning_quant.graph.joins import unlike_parts
from lightning_quant.graph.plan import COMPUTED_ONCE, Edge, GraphPlan, Operator, Row
from lightning_quant.graph.table import OperatorTable, Selection
from lightning_quant.graph.trace import Traced


class Matcher(Candidates):
    """Matches one graph; `plan` and `rows` are the result."""

    def __init__(
        self,
        traced: Traced,
        root: nn.Module,
        table: OperatorTable,
        selection: Selection,
        path: str = "",
        tensors: list[Tensor] | None = None,
    ) -> None:
        super().__init__(traced.graph, root, table, selection, path)
        self.opaque = traced.opaque
        self.activations = _activations(traced.graph)
        self.tensors = tensors
        self.edges: dict[fx.Node, Edge] = {}
        self.operators = self._decide()

    @property
    def plan(self) -> GraphPlan:
        """The operators and edges of this graph."""
        return GraphPlan(self.path, tuple(self.operators), tuple(self.edges.values()))

    def claims(self) -> list[Claim]:
        """Return a row for every operator that the plan lists, in the order of execution, and what it answers for."""
        quantized = {unit.main for unit in self.units.values()}
        claims = []
        # Node to the rows that its value comes from, seen through what is not listed.
        made_by: dict[fx.Node, tuple[str, ...]] = {}
        for node in self.graph.nodes:
            read = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in made_by.get(source, ())))
            made_by[node] = (self.name(node),) if self._is_listed(node) else read
            if not self._is_listed(node):
                continue
            row = Row(self.name(node), self.operations[node].layer, "float", self._float_reason(node), reads=read)
            if node in quantized:
                row = self._quantized(row, node)
            elif node in self.fused:
                row = replace(row, action="fused", reason=f"into {self.name(self.fused[node].main)}")
            elif node in self._computed_once:
                row = replace(row, action="fused", reason=COMPUTED_ONCE)
            elif node in self.edges and not self.edges[node].observed:
                row = replace(row, action="int8", reason="same scale as its input")
                row = replace(row, action="float", reason=self.table.in_float) if self.table.in_float else row
            else:
                row = replace(row, excluded=bool(self.selection.exclusion(row.name, row.kind)))
            claims.append(claim_of(node, row, self.path, self._weights(node)))
        return claims

    def _quantized(self, row: Row, node: fx.Node) -> Row:
        if not self.table.in_float:
            return replace(row, action="int8", reason="")
        is_stored = self.units[node].operation.kind in ops.WEIGHTED
        return replace(row, action="int8 weights" if is_stored else "float", reason=self.table.in_float)

    @functools.cached_property
    def _computed_once(self) -> set[fx.Node]:
        """What weights and biases of integer operators are computed with."""
        reads = {node: unit for unit in self.units.values() for node in (unit.main, *unit.affine)}
        read = [node for reader, unit in reads.items() for node in reader.all_input_nodes if node not in unit.source]
        return {node for constant in read if constant.meta["key"] in self.constants for node in ancestors(constant)}

    def _is_listed(self, node: fx.Node) -> bool:
        """Tell whether the plan has a row for a node: not for index arithmetic, nor for what constants give."""
        if node.meta.get("multiply_adds") or node.meta.get("as_it_is") or self._holds_weights(node):
            return True
        fake = node.meta.get("fake")
        is_index = isinstance(fake, Tensor) and not (fake.is_floating_point() or fake.is_complex())
        return self.operations[node].kind in ops.LISTED and not is_index and node in self.activations

    def _decide(self) -> list[Operator]:
        wanted: set[fx.Node] = set()
        added: set[fx.Node] = set()
        shared: list[fx.Node] = []
        for node in reversed(self.graph.nodes):
            unit = self.units.get(node)
            if unit is not None:
                if self._is_worth(unit, wanted):
                    unrounded = self._added_before_rounding(unit)
                    added |= unrounded
                    wanted.update(source for source in unit.source if source not in unrounded)
                else:
                    self._drop(unit, self._unlike.get(unit.main, "nothing reads its result in integers"))
            elif node in wanted and self.operations[node].kind in self.table.shared_scale and ops.is_float(node):
                source = ops.moved_from(node)
                if isinstance(source, fx.Node) and not self.is_part_of_float(node) and self._ends_near(source):
                    wanted.add(source)
                    shared.append(node)
        units = [unit for node in self.graph.nodes if (unit := self.units.get(node)) is not None]
        for unit in units:
            if unit.tail in added:
                continue
            # A float ReLU that others read would be fused into a float matrix product.
            ends_in_float_relu = unit.activation is not None and any(user.op != "output" for user in unit.tail.users)
            fuses_in_float = ends_in_float_relu and not unit.operation.kind.startswith("conv")
            if unit.tail in wanted or unit.operation.kind not in self.table.float_output or fuses_in_float:
                wanted.add(unit.tail)
        groups: dict[fx.Node, str] = {}
        for node in reversed(shared):
            source = ops.moved_from(node)
            groups[node] = groups.get(source, source.meta["key"])
        for node in self.graph.nodes:
            if node in wanted:
                key = node.meta["key"]
                passed = node in groups and self.operations[node].kind == "pass"
                self.edges[node] = Edge(
                    key, groups.get(node, key), observed=node not in groups, passed=passed, path=self.path
                )
        return [self._operator(unit) for unit in units]

    def _added_before_rounding(self, unit: Unit) -> set[fx.Node]:
        """Return the operand of an addition, if any, that a convolution hands over without rounding."""
        if not self.table.fuses_add or unit.operation.kind != "add" or len(set(unit.source)) != 2:
            return set()
        tails = {
            other.tail
            for other in self.units.values()
            if other.operation.kind.startswith("conv")
            and (other.activation is None or self.table.adds_activated)
            and len(other.tail.users) == 1
        }
        fitting = [node for node in self.graph.nodes if node in tails and node in unit.source]
        return set(fitting[-1:])

    def _is_worth(self, unit: Unit, wanted: set[fx.Node]) -> bool:
        if unit.operation.kind in ops.WEIGHTED or unit.tail in wanted:
            return True
        if unit.operation.kind == "add" and self._is_normalized(unit.tail):
            return False
        if unit.operation.kind == "cat" and unit.main in self._unlike:
            return False
        if unit.operation.kind in ("add", "mul", "cat", "matmul"):
            return any(user.op != "output" for user in unit.tail.users)
        return False

    @functools.cached_property
    def _unlike(self) -> dict[fx.Node, str]:
        """Concatenations of parts whose ranges are too unlike for one grid, by the values of the captured call.

        Where an integer operator reads one, its result needs one grid all the same.
        """
        joins = [unit.main for unit in self.units.values() if unit.operation.kind == "cat"]
        return {} if self.tensors is None else unlike_parts(joins, self.operations, self.root, self.tensors)

    def _is_normalized(self, node: fx.Node) -> bool:
        """Tell whether nothing but a LayerNorm, and maybe a float sum, reads a residual sum.

        Such sums have outliers that one scale for the tensor does not bear, and the normalization is float anyway: with
        them quantized, a MiniLM's embeddings were at 5 dB, without at 17. Source of the finding: Bondarenko et al.
        2021, arXiv:2109.12948, section 3.
        """
        users = list(node.users)
        kinds = [self.operations[user].kind for user in users]
        as_float = all(
            kind == "layer_norm" or (kind == "add" and user not in self.units)
            for user, kind in zip(users, kinds, strict=True)
        )
        return as_float and "layer_norm" in kinds

    def _drop(self, unit: Unit, reason: str) -> None:
        del self.units[unit.main]
        self.reasons[unit.main] = reason
        for node in [node for node, owner in self.fused.items() if owner is unit]:
            del self.fused[node]

    def _ends_near(self, node: fx.Node) -> bool:
        """Tell whether moving values back through shared-scale nodes ends at something that is quantized anyway."""
        while self.operations[node].kind in self.table.shared_scale and ops.is_float(ops.moved_from(node)):
            node = ops.moved_from(node)
        tails = {unit.tail for unit in self.units.values()}
        sources = {source for unit in self.units.values() for source in unit.source}
        return ops.is_float(node) and (node in tails or (node in sources and node.op != "placeholder"))

    def _operator(self, unit: Unit) -> Operator:
        def key(node: fx.Node | None) -> str:
            return node.meta["key"] if node is not None else ""

        operands = unit.main.args[0] if unit.operation.kind == "cat" else unit.source
        return Operator(
            key=key(unit.main),
            kind=unit.operation.kind,
            inputs=tuple(key(source) for source in operands),  # type: ignore[union-attr, arg-type]
            output=key(unit.tail),
            quantized_output=unit.tail in self.edges,
            weight=unit.operation.weight or self._computed(unit, 1, "weight"),
            bias=unit.operation.bias or self._computed(unit, 2, "bias"),
            pad=key(unit.pad),
            batch_norm=key(unit.batch_norm),
            norm=unit.norm,
            affine=tuple(unit.affine.values()),
            moved=unit.moved,
            activation=key(unit.activation),
            path=self.path,
        )

    def _computed(self, unit: Unit, position: int, name: str) -> str:
        """Return the key of a weight or bias that forward computes from parameters."""
        value = ops.argument(unit.main, position, name) if unit.operation.kind in ops.WEIGHTED else None
        return value.meta["key"] if isinstance(value, fx.Node) and unit.main.op != "call_module" else ""

    # --- words

    def _float_reason(self, node: fx.Node) -> str:
        kind = self.operations[node].kind
        if node in self.reasons:
            return self.reasons[node]
        if node.op == "call_module" and node.target in self.opaque:
            return self.opaque[str(node.target)]
        if node.op == "call_module" and (kind in ops.STORED or isinstance(self._called(node), WHOLE)):
            return ops.STORED_REASON
        if kind in self.table.reasons:
            return self.table.reasons[kind]
        if kind == "interpolate":
            return "it computes values between those that it reads, in float"
        if node.target is torch.einsum:
            return "it is no product by one matrix, nor of two, as integer kernels compute it"
        if kind == "batch_norm":
            return "no convolution or linear layer directly before it to fold into"
        if kind in self.table.fused_activations:
            return "no operator directly before it to fuse into"
        if kind in self.table.shared_scale:
            return "its input or its readers are float"
        if kind in self.table.own_scale:
            return "not everything it reads comes from integer operators"
        return (
            f"the runtime has no integer {kind}"
            if kind != "other"
            else "not a known layer type; its forward runs as it is"
            if node.op == "call_module"
            else f"no integer form of {self.operations[node].layer} is known here"
        )

    def _weights(self, node: fx.Node) -> tuple[str, ...]:
        """Return the name of the weight that a node reads, or of those that it is computed from."""
        operation = self.operations[node]
        weight = ops.argument(node, 1, "weight") if operation.kind in ops.WEIGHTED and not operation.weight else None
        if not isinstance(weight, fx.Node) or weight.meta["key"] not in self.constants:
            return (operation.weight,) if operation.weight else ()
        return tuple(sources(weight))

    def _holds_weights(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(True for _ in self._called(node).parameters())

    def _called(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))


def _activations(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes whose values depend on the values of an input, and not on its sizes or on weights alone."""
    activations: set[fx.Node] = set()
    for node in graph.nodes:
        tensors = [source for source in node.all_input_nodes if not isinstance(source.meta.get("fake"), int | Size)]
        if node.op == "placeholder" or any(source in activations for source in tensors):
            activations.add(node)
    return activations
