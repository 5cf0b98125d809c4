"""Which tensors can be scaled channel by channel without changing the function, and what takes the factors up.

A positive factor per channel passes through ReLU, pooling and addition. Tensors that such operators connect form one
group: all of them are scaled alike, by the weighted operators that write them, and back by those that read them.
"""

import math
from dataclasses import dataclass

from torch import Tensor, fx

from lightning_quant.graph import operations as ops
from lightning_quant.graph.analyze import Island
from lightning_quant.graph.moves import KEEPS_CHANNELS
from lightning_quant.graph.plan import Operator
from lightning_quant.graph.rereads import insert_rereads
from lightning_quant.graph.trace import trace
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.routing import evaluation_mode, resolve

_LINKS = frozenset({"add", "avg_pool", "global_avg_pool", "leaky_relu"})


@dataclass(frozen=True)
class ScalingGroup:
    """Edges that share one factor per channel.

    Attributes:
        edges: identities of the edges.
        axis: dimension of the channels in all of them.
        channels: their number.
        producers: identities of the weighted operators that write them.
        consumers: identities of the weighted operators that read them.
        links: number of operators between edges that the factors pass through.
        from_float: whether a float operator or an input writes one of them.
        clip: upper bound of a fused clipping activation; infinite without one.
        padded: whether a consumer pads with zeros, which rules a shift out.
        activated: whether all producers have a fused activation that is zero for negative values.
        linear: whether producers have no activation at all, and consumers are all that reads the edges.
        normalized: whether a LayerNorm writes one of them.
    """

    edges: tuple[str, ...]
    axis: int
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    links: int
    from_float: bool
    clip: float
    padded: bool
    activated: bool
    linear: bool
    normalized: bool

    @property
    def can_shift(self) -> bool:
        """Whether a constant for each channel can move into the next bias, whatever it is."""
        return self.linear and not (self.padded or self.links or self.from_float)


def is_depthwise(prepared: Prepared, group: ScalingGroup) -> bool:
    """Tell whether each reader of a group has one input channel for each output: scaling costs its weights nothing."""
    return all(prepared.weight(identity).shape[1] == 1 for identity in group.consumers) and group.channels > 1


def is_linear(prepared: Prepared, group: ScalingGroup) -> bool:
    """Tell whether only linear operators read a group."""
    return all(prepared.operators[identity].kind == "linear" for identity in group.consumers)


def worth_scaling(prepared: Prepared, every: list[ScalingGroup]) -> list[ScalingGroup]:
    """Return the groups that factors cost nothing at run time, and those of linear layers in nets with LayerNorm."""
    has_norm = any(group.normalized for group in every)
    return [g for g in every if not g.from_float or (has_norm and not g.links and is_linear(prepared, g))]


def scaling_groups(prepared: Prepared) -> list[ScalingGroup]:
    """Return the groups of a prepared model that at least one weighted operator reads; finding them traces it once."""
    if prepared.scaling_groups is None:
        islands = prepared.islands.values()
        prepared.scaling_groups = [group for island in islands for group in _Finder(prepared, island).groups()]
    return prepared.scaling_groups


class _Finder:
    def __init__(self, prepared: Prepared, island: Island) -> None:
        self.island = island
        self.root = resolve(prepared.root, island.path)
        with evaluation_mode(self.root):
            graph = trace(self.root, island.spec, island.tensors, set(island.opaque)).graph
        self.nodes: dict[str, fx.Node] = {node.meta["key"]: node for node in graph.nodes if "key" in node.meta}
        insert_rereads(island, self.nodes)
        self.parent = {edge.key: edge.key for edge in island.plan.edges}
        self.blocked: set[str] = set()
        self.written: set[str] = set()
        self.links: list[str] = []
        self._connect()

    def groups(self) -> list[ScalingGroup]:
        blocked = {self._find(key) for key in self.blocked}
        members: dict[str, list[str]] = {}
        for key in self.parent:
            if self._find(key) not in blocked:
                members.setdefault(self._find(key), []).append(key)
        scaling_groups = [self._group(root, keys) for root, keys in members.items()]
        return [group for group in scaling_groups if group is not None]

    def _connect(self) -> None:
        for operator in self.island.plan.operators:
            if operator.quantized_output:
                self.written.add(operator.output)
            if operator.moved and operator.output in self.parent:
                self.blocked.add(operator.output)
            if not operator.weight:
                self._link(operator)
        for edge in self.island.plan.edges:
            if edge.key not in self.written and (edge.group != edge.key or not edge.observed):
                self._share(edge.key)

    def _link(self, operator: Operator) -> None:
        keys = [*operator.inputs, operator.output] if operator.quantized_output else [*operator.inputs]
        shapes = {self._shape(key) for key in operator.inputs}
        # What a convolution adds before it rounds is no edge.
        are_edges = self.parent.keys() >= set(keys)
        if operator.kind not in _LINKS or len(shapes) > 1 or not (operator.quantized_output and are_edges):
            self.blocked.update(self.parent.keys() & set(keys))
            return
        for key in keys[1:]:
            self._union(keys[0], key)
        self.links.append(keys[0])

    def _share(self, key: str) -> None:
        """Connect a max-pool or reshape with what it reads."""
        node = self.nodes[key]
        source = ops.moved_from(node).meta["key"]
        self.written.add(key)
        # Any other kind may have put a channel elsewhere, but what only adds or drops dimensions of one has not.
        only_places = self._kind(key) == "reshape" and self._shape(key)[:2] == _without_places(self._shape(source))
        same = self._kind(key) in KEEPS_CHANNELS or only_places
        passed = self._kind(key) == "pass" and any(not self._reads_grid(user) for user in node.users)
        if source in self.parent and same and not passed:
            self._union(source, key)
            self.links.append(key)
        else:
            self.blocked.update({key, source} & set(self.parent))

    def _reads_grid(self, node: fx.Node) -> bool:
        key = node.meta.get("key")
        return key in self.parent or any(key in (o.key, o.pad) for o in self.island.plan.operators)

    def _only_on_grid(self, keys: list[str]) -> bool:
        return all(self._reads_grid(user) for key in keys for user in self.nodes[key].users)

    def _kind(self, key: str) -> str:
        return ops.describe(self.nodes[key], self.root).kind

    def _group(self, root: str, keys: list[str]) -> ScalingGroup | None:
        operators = self.island.plan.operators
        readers = [o for o in operators if o.weight and o.inputs[0] in keys]
        writers = [o for o in operators if o.weight and o.quantized_output and o.output in keys]
        axes = {self._axis(o, o.inputs[0]) for o in readers} | {self._axis(o, o.output) for o in writers}
        axis = axes.pop() if len(axes) == 1 else -1
        if not readers or axis < 0 or any(len(self._shape(key)) <= axis for key in keys):
            return None
        sizes = {self._shape(key)[axis] for key in keys}
        limits = [self._bounds(o) for o in operators if o.output in keys and o.quantized_output]
        if len(sizes) != 1 or any(-math.inf < low < 0 for low, _ in limits):
            return None
        identities = {edge.key: edge.identity for edge in self.island.plan.edges}
        return ScalingGroup(
            edges=tuple(identities[key] for key in keys),
            axis=axis,
            channels=sizes.pop(),
            producers=tuple(o.identity for o in writers),
            consumers=tuple(o.identity for o in readers),
            links=sum(self._find(key) == root for key in self.links),
            from_float=any(key not in self.written for key in keys),
            clip=min((high for _, high in limits), default=math.inf),
            padded=any(bool(o.pad) or self._pads(o) for o in readers),
            activated=bool(writers) and all(self._bounds(o)[0] == 0 for o in writers),
            linear=bool(writers) and limits == [(-math.inf, math.inf)] * len(limits) and self._only_on_grid(keys),
            normalized=any(self._kind(key) == "layer_norm" for key in keys),
        )

    def _bounds(self, operator: Operator) -> tuple[float, float]:
        if not operator.activation:
            return -math.inf, math.inf
        node = self.nodes[operator.activation]
        return ops.bounds(node, self.root, self._kind(operator.activation)) or (-math.inf, math.inf)

    def _pads(self, operator: Operator) -> bool:
        if operator.kind == "linear":
            return False
        node = self.nodes[operator.key]
        if node.op == "call_module":
            padding = self.root.get_submodule(str(node.target)).padding
        else:
            padding = ops.argument(node, 4, "padding", 0)
        return padding not in (0, "valid") and padding != (0,) * len(padding if isinstance(padding, tuple) else ())

    def _axis(self, operator: Operator, key: str) -> int:
        return len(self._shape(key)) - 1 if operator.kind == "linear" else 1

    def _shape(self, key: str) -> tuple[int, ...]:
        fake = self.nodes[key].meta.get("fake")
        return tuple(fake.shape) if isinstance(fake, Tensor) else ()

    def _find(self, key: str) -> str:
        while self.parent[key] != key:
            key = self.parent[key]
        return key

    def _union(self, one: str, other: str) -> None:
        self.parent[self._find(other)] = self._find(one)


def _without_places(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return batch and channels of a tensor whose other dimensions are all one; nothing otherwise."""
    return shape[:2] if all(size == 1 for size in shape[2:]) else ()
