"""Which operators of a graph could run in integers, and what is fused around each; data for `patterns.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from lightning_quant.graph import operations as ops
from lightning_quant.graph.affine import affine_parts, is_of_channels
from lightning_quant.graph.constants import constant, is_of_parameters
from lightning_quant.graph.norms import norm_of, normalizes_channels
from lightning_quant.graph.plan import join
from lightning_quant.graph.table import OperatorTable, Selection
from lightning_quant.numerics.folding import Affine, Norm
from lightning_quant.surgery.routing import has_hooks

UNKNOWN_SHAPES = "what it reads has a size that follows from values, such as of `nonzero`, so its shapes are unknown"


@dataclass
class Unit:
    """A main node with what is fused around it, on its way to an `Operator`."""

    main: fx.Node
    operation: ops.Operation
    source: list[fx.Node]
    tail: fx.Node
    pad: fx.Node | None = None
    batch_norm: fx.Node | None = None
    norm: Norm | None = None
    affine: dict[fx.Node, Affine] = field(default_factory=dict)
    moved: bool = False
    activation: fx.Node | None = None


class Candidates:
    """Goes forwards over a graph: chains around weighted operators, then elementwise operators that read such chains.

    Attributes:
        operations: what each node does.
        units: main node to its unit, for all that could run in integers.
        fused: node to the unit that takes it up.
        reasons: why other nodes cannot.
        constants: key of a node to a function that computes its value from a module's parameters, of weights and biases
            that forward computes.
    """

    def __init__(
        self, graph: fx.Graph, root: nn.Module, table: OperatorTable, selection: Selection, path: str = ""
    ) -> None:
        self.graph, self.root, self.table, self.selection, self.path = graph, root, table, selection, path
        self.operations = {node: ops.describe(node, root) for node in graph.nodes}
        self.reasons: dict[fx.Node, str] = {}
        self.constants: dict[str, Callable[[nn.Module], Tensor]] = {}
        self.units: dict[fx.Node, Unit] = {}
        self.fused: dict[fx.Node, Unit] = {}
        self._match_weighted()
        self._match_elementwise()

    def name(self, node: fx.Node) -> str:
        """Return the qualified name of a node for readers and patterns."""
        return join(self.path, str(node.meta["key"]))

    def _match_weighted(self) -> None:
        for node in self.graph.nodes:
            operation = self.operations[node]
            if operation.kind not in ops.WEIGHTED:
                continue
            reason = self._weighted_refusal(node, operation)
            if reason:
                self.reasons[node] = reason
                continue
            unit = Unit(node, operation, [ops.argument(node, 0, "input")], node)
            self._fuse_pad(unit)
            self._fuse_batch_norm(unit)
            self._fuse_affine(unit)
            self._fuse_activation(unit)
            self._accept(unit)

    def _weighted_refusal(self, node: fx.Node, operation: ops.Operation) -> str:
        unwanted = self.selection.refusal(self.name(node), operation.layer)
        if unwanted:
            return unwanted
        if operation.kind not in self.table.weighted:
            return self.table.reasons.get(operation.kind, f"the runtime has no integer {operation.kind}")
        if not operation.weight and not self._is_constant(ops.argument(node, 1, "weight")):
            return "its weight is computed from an input in forward"
        if not ops.is_float(node):
            return UNKNOWN_SHAPES
        if self.table.one_channel and operation.kind.startswith("conv") and _channels(node) == 1:
            return self.table.one_channel
        bias = ops.argument(node, 2, "bias")
        if node.op == "call_function" and not operation.bias and bias is not None and not self._is_constant(bias):
            return "its bias is computed from an input in forward"
        return ""

    def _is_constant(self, node: Any) -> bool:
        """Tell whether a value is computed from parameters alone; if so, keep how."""
        if not isinstance(node, fx.Node):
            return False
        value = constant(node, self.root)
        if value is not None:
            self.constants[node.meta["key"]] = value
        return value is not None

    def _fuse_pad(self, unit: Unit) -> None:
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

    def _fuse_batch_norm(self, unit: Unit) -> None:
        user = self._next(unit)
        if user is None or self.operations[user].kind != "batch_norm":
            return
        norm, reason = norm_of(user, self.root)
        axis = -1 if unit.operation.kind == "linear" else 1
        moved = user is not self._reader_of(unit.tail)
        if norm is None:
            self.reasons[user] = reason
        elif not normalizes_channels(unit.tail, axis, user, self.root):
            self.reasons[user] = "it normalizes another dimension than the layer's channels"
        else:
            unit.batch_norm = unit.tail = user
            unit.norm, unit.moved = norm, moved

    def _fuse_affine(self, unit: Unit) -> None:
        """Take up factors and shifts of channels, which fold as those of a BatchNorm do."""
        axis = -1 if unit.operation.kind == "linear" else 1
        while not unit.moved and (user := self._reader_of(unit.tail)) is not None:
            parts = affine_parts(user, self._is_constant)
            if parts is None or self.selection.refusal(self.name(user), self.operations[user].layer):
                return
            kind, position, value = parts
            if not is_of_channels(value, ops.shape_of(unit.main), axis):
                return
            number, constant = (None, value.meta["key"]) if isinstance(value, fx.Node) else (float(value), "")
            unit.affine[user] = Affine(user.meta["key"], kind, position, number, constant)
            unit.tail = user

    def _fuse_activation(self, unit: Unit) -> None:
        user = self._next(unit)
        if user is None or self.operations[user].kind not in self.table.fused_activations:
            return
        limits = ops.bounds(user, self.root, self.operations[user].kind)
        if limits is None or not limits[0] <= 0 <= limits[1]:
            self.reasons[user] = "its bounds are not constant or leave out zero"
        elif not (user.op == "call_module" and has_hooks(self.root.get_submodule(str(user.target)))):
            unit.moved = unit.moved or user is not self._reader_of(unit.tail)
            unit.activation = unit.tail = user

    def _next(self, unit: Unit) -> fx.Node | None:
        """Return what alone reads what a unit makes so far, of a linear layer also behind a reshape.

        Its integer kernels may answer in float, which is moved and then rounded; those of convolutions round at once.
        """
        user = self._reader_of(unit.tail)
        while user is not None and unit.operation.kind == "linear" and self.operations[user].kind == "reshape":
            user = self._reader_of(user)
        return user

    def _reader_of(self, node: fx.Node) -> fx.Node | None:
        """Return what alone reads a node, behind identities and dropouts that evaluation leaves out."""
        user = _only_user(node)
        while user is not None and is_left_out(user, self.root):
            user = _only_user(user)
        return user

    def _match_elementwise(self) -> None:
        near = {unit.tail for unit in self.units.values()}
        near |= {source for unit in self.units.values() for source in unit.source}
        for node in self.graph.nodes:
            kind = self.operations[node].kind
            sources = [ops.moved_from(node)] if kind in ops.MOVING else ops.tensor_inputs(node)
            if node in self.units or node in self.fused or not sources or not ops.is_float(node):
                continue
            all_near = all(source in near for source in sources)
            if kind in self.table.own_scale:
                reason = self._elementwise_refusal(node, sources, all_near)
                if reason:
                    self.reasons[node] = reason
                    continue
                unit = Unit(node, self.operations[node], sources, node)
                if kind in ("add", "mul"):
                    self._fuse_activation(unit)
                self._accept(unit)
                near.add(unit.tail)
            elif all_near and self._passes_on(node, kind):
                near.add(node)

    def _passes_on(self, node: fx.Node, kind: str) -> bool:
        """Tell whether what reads a node may compute in integers as if it read what that reads."""
        passes = kind in self.table.shared_scale or kind in ops.ACTIVATIONS or kind == "pad"
        return passes and not self.is_part_of_float(node)

    def is_part_of_float(self, node: fx.Node) -> bool:
        """Tell whether a node is a part of what an operator may answer in float, moved or not.

        Such parts, queries, keys and values say, are too unlike for one grid; chunks of a convolution's channels are
        joined again.
        """
        takes_part = False
        while self.operations[node].kind in ops.MOVING and ops.is_float(ops.moved_from(node)):
            takes_part = takes_part or self.operations[node].kind == "slice"
            node = ops.moved_from(node)
        unit = next((unit for unit in self.units.values() if unit.tail is node), None) if takes_part else None
        kind = "" if unit is None else unit.operation.kind
        return kind in self.table.float_output and not kind.startswith("conv")

    def _elementwise_refusal(self, node: fx.Node, sources: list[fx.Node], all_near: bool) -> str:
        kind = self.operations[node].kind
        unwanted = self.selection.refusal(self.name(node), self.operations[node].layer)
        if unwanted:
            return unwanted
        operands = ops.argument(node, 0, "tensors") if kind == "cat" else node.args[:2]
        if kind == "matmul" and any(is_of_parameters(operand) for operand in operands):
            return "it multiplies by a stack of matrices, which the runtime's integer kernels do not take"
        if kind in ("add", "mul", "matmul", "cat") and not all(ops.is_float(operand) for operand in operands):
            return "an operand is a constant or no float tensor"
        if kind == "avg_pool" and self.table.padded_average and ops.averages_padding(node, self.root):
            return self.table.padded_average
        if not all_near:
            return "not everything it reads comes from integer operators"
        return ""

    def _accept(self, unit: Unit) -> None:
        self.units[unit.main] = unit
        for node in (unit.pad, unit.batch_norm, *unit.affine, unit.activation):
            if node is not None:
                self.fused[node] = unit


def is_left_out(node: fx.Node, root: nn.Module) -> bool:
    """Tell whether a node is an identity or dropout that evaluation may leave out."""
    if ops.describe(node, root).kind != "pass":
        return False
    if node.op == "call_module":
        return not has_hooks(root.get_submodule(str(node.target)))
    return ops.argument(node, 2, "training", True) is False


def _only_user(node: fx.Node) -> fx.Node | None:
    readers = [user for user in node.users if not _reads_shape(user, node)]
    return readers[0] if len(readers) == 1 else None


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Tell whether a node reads nothing but another's shape, `y.reshape_as(node)` say."""
    if user.target in ("reshape_as", "view_as", "expand_as"):
        return user.args[0] is not node
    return user.target in ("size", "dim", "numel") or (user.target is getattr and user.args[1] in ("shape", "ndim"))


def _channels(convolution: fx.Node) -> int:
    """Return the number of channels that a convolution reads, 0 where it is not known."""
    fake = ops.argument(convolution, 0, "input").meta.get("fake")
    return int(fake.shape[1]) if isinstance(fake, Tensor) and fake.dim() > 1 else 0
