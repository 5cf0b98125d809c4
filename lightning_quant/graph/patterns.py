"""Match a graph against a runtime's operator table: which operators run in integers, which tensors are quantized.

Three passes over the nodes: fuse chains around the main operators, decide forwards which elementwise operators could
run in integers because all they read is near integers, and decide backwards which of them should because somebody reads
the result in integers.
"""

from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.graph.plan import Edge, GraphPlan, Operator, Row
from lightning_quant.graph.table import OperatorTable, Selection
from lightning_quant.graph.trace import Traced, has_hooks


@dataclass
class _Unit:
    """A main node with what is fused around it, on its way to an `Operator`."""

    main: fx.Node
    operation: ops.Operation
    source: list[fx.Node]
    tail: fx.Node
    pad: fx.Node | None = None
    batch_norm: fx.Node | None = None
    activation: fx.Node | None = None


class Matcher:
    """Matches one graph; `plan` and `rows` are the result."""

    def __init__(
        self,
        traced: Traced,
        root: nn.Module,
        table: OperatorTable,
        selection: Selection,
        path: str = "",
    ) -> None:
        graph = traced.graph
        self.opaque = traced.opaque
        self.graph, self.root, self.table, self.selection, self.path = graph, root, table, selection, path
        self.operations = {node: ops.describe(node, root) for node in graph.nodes}
        self.reasons: dict[fx.Node, str] = {}
        self.units: dict[fx.Node, _Unit] = {}
        self.fused: dict[fx.Node, _Unit] = {}
        self._match_weighted()
        self._match_elementwise()
        self.edges: dict[fx.Node, Edge] = {}
        self.operators = self._decide()

    @property
    def plan(self) -> GraphPlan:
        """The operators and edges of this graph."""
        return GraphPlan(self.path, tuple(self.operators), tuple(self.edges.values()))

    def name(self, node: fx.Node) -> str:
        """Return the qualified name of a node for readers and patterns."""
        key = node.meta["key"]
        return ".".join(part for part in (self.path, key) if part)

    def rows(self) -> list[Row]:
        """Return a row for every operator that the plan lists, in the order of execution."""
        quantized = {unit.main for unit in self.units.values()}
        rows = []
        for node in self.graph.nodes:
            operation = self.operations[node]
            if operation.kind not in ops.LISTED and not self._holds_weights(node):
                continue
            weight = self._parameter(operation.weight)
            macs = ops.multiply_adds(node, operation.kind, weight)
            row = Row(self.name(node), operation.layer, "float", self._float_reason(node), macs)
            if node in quantized:
                row = replace(row, action="int8", reason="")
            elif node in self.fused:
                row = replace(row, action="fused", reason=f"into {self.name(self.fused[node].main)}")
            elif node in self.edges and not self.edges[node].observed:
                row = replace(row, action="int8", reason="same scale as its input")
            rows.append(row)
        return rows

    # --- forwards: what could run in integers

    def _match_weighted(self) -> None:
        for node in self.graph.nodes:
            operation = self.operations[node]
            if operation.kind not in ops.WEIGHTED:
                continue
            reason = self._weighted_refusal(node, operation)
            if reason:
                self.reasons[node] = reason
                continue
            unit = _Unit(node, operation, [ops.argument(node, 0, "input")], node)
            self._fuse_pad(unit)
            self._fuse_batch_norm(unit)
            self._fuse_activation(unit)
            self._accept(unit)

    def _weighted_refusal(self, node: fx.Node, operation: ops.Operation) -> str:
        unwanted = self.selection.refusal(self.name(node), operation.layer)
        if unwanted:
            return unwanted
        if operation.kind not in self.table.weighted:
            return self.table.reasons.get(operation.kind, f"the runtime has no integer {operation.kind}")
        if not operation.weight:
            return "its weight is computed in forward"
        if not ops.is_float(node):
            return "its shapes are unknown"
        if self.table.one_channel and operation.kind.startswith("conv") and _channels(node) == 1:
            return self.table.one_channel
        if (
            node.op == "call_module"
            and getattr(self.root.get_submodule(str(node.target)), "padding_mode", "zeros") != "zeros"
        ):
            return "padding other than zeros"
        if node.op == "call_function" and not operation.bias and ops.argument(node, 2, "bias") is not None:
            return "its bias is computed in forward"
        return ""

    def _fuse_pad(self, unit: _Unit) -> None:
        pad = unit.source[0]
        if not self.table.fuses_pad:
            return
        if self.operations[pad].kind != "pad" or len(pad.users) != 1 or not unit.operation.kind.startswith("conv"):
            return
        fake = pad.meta.get("fake")
        amounts = (
            ops.argument(pad, 1, "pad") if pad.op != "call_module" else self.root.get_submodule(str(pad.target)).padding
        )
        places = fake.dim() - 2 if isinstance(fake, Tensor) else 0
        if (
            isinstance(amounts, tuple | list)
            and len(amounts) <= 2 * places
            and all(isinstance(a, int) and a >= 0 for a in amounts)
        ):
            unit.pad, unit.source = pad, [pad.args[0]]  # type: ignore[list-item]

    def _fuse_batch_norm(self, unit: _Unit) -> None:
        user = self._reader_of(unit.tail)
        if user is None or self.operations[user].kind != "batch_norm":
            return
        module = self.root.get_submodule(str(user.target))
        if module.running_mean is None:
            self.reasons[user] = "it keeps no running statistics to fold"
        elif has_hooks(module):
            self.reasons[user] = "hooks on it see its own input and output"
        elif unit.operation.kind == "linear" and unit.tail.meta["fake"].dim() != 2:
            self.reasons[user] = "it normalizes another dimension than the linear layer's features"
        else:
            unit.batch_norm = unit.tail = user

    def _fuse_activation(self, unit: _Unit) -> None:
        user = self._reader_of(unit.tail)
        if user is None or self.operations[user].kind not in self.table.fused_activations:
            return
        limits = ops.bounds(user, self.root, self.operations[user].kind)
        if limits is None or not limits[0] <= 0 <= limits[1]:
            self.reasons[user] = "its bounds are not constant or leave out zero"
        elif not (user.op == "call_module" and has_hooks(self.root.get_submodule(str(user.target)))):
            unit.activation = unit.tail = user

    def _reader_of(self, node: fx.Node) -> fx.Node | None:
        """Return what alone reads a node, behind identities and dropouts that evaluation leaves out."""
        user = _only_user(node)
        while user is not None and self.operations[user].kind == "pass" and self._leaves_out(user):
            user = _only_user(user)
        return user

    def _leaves_out(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return not has_hooks(self.root.get_submodule(str(node.target)))
        return ops.argument(node, 2, "training", True) is False

    def _match_elementwise(self) -> None:
        near = {unit.tail for unit in self.units.values()}
        near |= {source for unit in self.units.values() for source in unit.source}
        for node in self.graph.nodes:
            kind = self.operations[node].kind
            sources = ops.tensor_inputs(node)
            if node in self.units or node in self.fused or not sources or not ops.is_float(node):
                continue
            all_near = all(source in near for source in sources)
            if kind in self.table.own_scale:
                reason = self._elementwise_refusal(node, sources, all_near)
                if reason:
                    self.reasons[node] = reason
                    continue
                unit = _Unit(node, self.operations[node], sources, node)
                if kind in ("add", "mul"):
                    self._fuse_activation(unit)
                self._accept(unit)
                near.add(unit.tail)
            elif all_near and (kind in self.table.shared_scale or kind in ops.ACTIVATIONS or kind == "pad"):
                near.add(node)

    def _elementwise_refusal(self, node: fx.Node, sources: list[fx.Node], all_near: bool) -> str:
        kind = self.operations[node].kind
        unwanted = self.selection.refusal(self.name(node), self.operations[node].layer)
        if unwanted:
            return unwanted
        operands = ops.argument(node, 0, "tensors") if kind == "cat" else node.args[:2]
        if kind in ("add", "mul", "matmul", "cat") and not all(ops.is_float(operand) for operand in operands):
            return "an operand is a constant or no float tensor"
        if not all_near:
            return "not everything it reads comes from integer operators"
        return ""

    def _accept(self, unit: _Unit) -> None:
        self.units[unit.main] = unit
        for node in (unit.pad, unit.batch_norm, unit.activation):
            if node is not None:
                self.fused[node] = unit

    # --- backwards: what should run in integers, and the edges between

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
                    self._drop(unit)
            elif node in wanted and self.operations[node].kind in self.table.shared_scale and ops.is_float(node):
                source = node.args[0]
                if isinstance(source, fx.Node) and self._ends_near(source):
                    wanted.add(source)
                    shared.append(node)
        units = [unit for node in self.graph.nodes if (unit := self.units.get(node)) is not None]
        for unit in units:
            # A float ReLU that others read would be fused into a float matrix product.
            if unit.tail in added:
                continue
            ends_in_float_relu = unit.activation is not None and any(user.op != "output" for user in unit.tail.users)
            if unit.tail in wanted or unit.operation.kind not in self.table.float_output or ends_in_float_relu:
                wanted.add(unit.tail)
        groups: dict[fx.Node, str] = {}
        for node in reversed(shared):
            source = ops.argument(node, 0, "input")
            groups[node] = groups.get(source, source.meta["key"])
        for node in self.graph.nodes:
            if node in wanted:
                key = node.meta["key"]
                passed = node in groups and self.operations[node].kind == "pass"
                self.edges[node] = Edge(key, groups.get(node, key), observed=node not in groups, passed=passed)
        return [self._operator(unit) for unit in units]

    def _added_before_rounding(self, unit: _Unit) -> set[fx.Node]:
        """Return the operand of an addition, if any, that a convolution hands over without rounding."""
        if not self.table.fuses_add or unit.operation.kind != "add" or len(set(unit.source)) != 2:
            return set()
        tails = {
            other.tail
            for other in self.units.values()
            if other.operation.kind.startswith("conv") and other.activation is None and len(other.tail.users) == 1
        }
        fitting = [node for node in self.graph.nodes if node in tails and node in unit.source]
        return set(fitting[-1:])

    def _is_worth(self, unit: _Unit, wanted: set[fx.Node]) -> bool:
        if unit.operation.weight or unit.tail in wanted:
            return True
        if unit.operation.kind == "add" and self._is_normalized(unit.tail):
            return False
        if unit.operation.kind in ("add", "mul", "cat", "matmul"):
            return any(user.op != "output" for user in unit.tail.users)
        return False

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

    def _drop(self, unit: _Unit) -> None:
        del self.units[unit.main]
        self.reasons[unit.main] = "nothing reads its result in integers"
        for node in [node for node, owner in self.fused.items() if owner is unit]:
            del self.fused[node]

    def _ends_near(self, node: fx.Node) -> bool:
        """Tell whether moving values back through shared-scale nodes ends at something that is quantized anyway."""
        while self.operations[node].kind in self.table.shared_scale and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        tails = {unit.tail for unit in self.units.values()}
        sources = {source for unit in self.units.values() for source in unit.source}
        return ops.is_float(node) and (node in tails or (node in sources and node.op != "placeholder"))

    def _operator(self, unit: _Unit) -> Operator:
        def key(node: fx.Node | None) -> str:
            return node.meta["key"] if node is not None else ""

        operands = unit.main.args[0] if unit.operation.kind == "cat" else unit.source
        return Operator(
            key=key(unit.main),
            kind=unit.operation.kind,
            inputs=tuple(key(source) for source in operands),  # type: ignore[union-attr, arg-type]
            output=key(unit.tail),
            quantized_output=unit.tail in self.edges,
            weight=unit.operation.weight,
            bias=unit.operation.bias,
            pad=key(unit.pad),
            batch_norm=key(unit.batch_norm),
            activation=key(unit.activation),
        )

    # --- words

    def _float_reason(self, node: fx.Node) -> str:
        kind = self.operations[node].kind
        if node in self.reasons:
            return self.reasons[node]
        if node.op == "call_module" and node.target in self.opaque:
            return self.opaque[str(node.target)]
        if kind in self.table.reasons:
            return self.table.reasons[kind]
        if kind == "batch_norm":
            return "no convolution or linear layer directly before it to fold into"
        if kind in self.table.fused_activations:
            return "no operator directly before it to fuse into"
        if kind in self.table.shared_scale:
            return "its input or its readers are float"
        return (
            f"the runtime has no integer {kind}"
            if kind != "other"
            else "not a known layer type; its forward runs as it is"
        )

    def _holds_weights(self, node: fx.Node) -> bool:
        return node.op == "call_module" and any(True for _ in self.root.get_submodule(str(node.target)).parameters())

    def _parameter(self, name: str) -> nn.Parameter | None:
        if not name:
            return None
        owner, _, attribute = name.rpartition(".")
        return getattr(self.root.get_submodule(owner), attribute)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _channels(convolution: fx.Node) -> int:
    """Return the number of channels that a convolution reads, 0 where it is not known."""
    fake = ops.argument(convolution, 0, "input").meta.get("fake")
    return int(fake.shape[1]) if isinstance(fake, Tensor) and fake.dim() > 1 else 0
