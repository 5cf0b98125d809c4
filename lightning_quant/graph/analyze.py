"""Split a module into traceable graphs and make the plan of all of them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_quant.calls.calls import CallSpec, CapturedCall, flatten_call, forward_signature, map_tensors
from lightning_quant.errors import PlanError, UntraceableError
from lightning_quant.graph import operations as ops
from lightning_quant.graph.claims import Claim, claim_of, settle, weigh
from lightning_quant.graph.counting import ObservedCall, observe_call
from lightning_quant.graph.expansions import WHOLE, is_expanded
from lightning_quant.graph.faithful import trace_faithfully
from lightning_quant.graph.patterns import Matcher
from lightning_quant.graph.plan import COMPUTED_ONCE, UNREAD, GraphPlan, Plan, Row, join
from lightning_quant.graph.state import check_state, state_of
from lightning_quant.graph.table import OperatorTable, Selection, matches
from lightning_quant.graph.trace import Traced
from lightning_quant.graph.unread import remove_unread
from lightning_quant.surgery.routing import as_exported, clone, evaluation_mode, resolve, training_mode

UNREACHED = "the captured call never reaches it"
# Of what is no part of an artifact.
_APART = (UNREAD, UNREACHED, COMPUTED_ONCE)
# Their forward hands the weights to a fused kernel; no graph of ours could change them there.
INSIDE = "inside a layer that runs as a whole"
_INDIVISIBLE = frozenset({"attention", "lstm", "gru", "rnn", "cell", "embedding", "bilinear"})


@dataclass(frozen=True)
class Island:
    """A traceable part of the module; the whole module when its path is empty.

    Attributes:
        path: where it is, relative to the module to quantize.
        signature: the signature of its forward.
        spec: its captured call.
        tensors: the tensors of that call.
        plan: its operators and edges.
        constants: key of a weight or bias that forward computes to a function that computes it from the module.
        keys: site in the user's code to key, to find the same operators in a graph traced in training mode.
        opaque: paths, relative to the island, that are called as they are.
        rereads: key of an edge to the nodes that read it rounded anew; see `graph.rereads`.
    """

    path: str
    signature: inspect.Signature
    spec: CallSpec
    tensors: list[Tensor]
    plan: GraphPlan
    constants: dict[str, Callable[[nn.Module], Tensor]]
    keys: dict[Any, str]
    opaque: frozenset[str]
    rereads: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> "Island":
        return self


@dataclass(frozen=True)
class Analysis:
    """The plan of a module and the islands that carry it out.

    Attributes:
        plan: for readers and runtimes.
        islands: the graphs.
        captured: the captured call of the module.
        nothing: why the graphs have nothing to quantize; empty where they have.
    """

    plan: Plan
    islands: tuple[Island, ...]
    captured: CapturedCall
    nothing: str = ""


class _Splitter:
    def __init__(
        self, root: nn.Module, observed: ObservedCall, table: OperatorTable, selection: Selection, *, trains: bool
    ) -> None:
        self.root, self.table, self.selection = root, table, selection
        self.observed, self.trains = observed, trains
        self.islands: list[Island] = []
        self.claims: list[Claim] = []
        self.reason = ""

    @property
    def rows(self) -> list[Row]:
        """The rows so far, with multiply-adds at the traced shapes."""
        return [claim.row for claim in self.claims]

    def split(self, path: str) -> None:
        """Trace the module at a path; where that fails, the largest of its descendants that can be traced."""
        module = resolve(self.root, path)
        if (ops.kind_of(module) in _INDIVISIBLE or isinstance(module, WHOLE)) and not is_expanded(module):
            is_stored = ops.kind_of(module) in ops.STORED or isinstance(module, WHOLE)
            self._list(path, module, ops.STORED_REASON if is_stored else "it runs as a whole")
            return
        args, kwargs = self.observed.first[path]
        try:
            signature = own_signature(module)
            spec, tensors = flatten_call(signature, args, kwargs)
            calls = _calls_under(path, self.observed.first)
            traced = (_trace_for_both_modes if self.trains else trace_faithfully)(module, spec, tensors, calls)
        except (UntraceableError, ValueError) as error:
            self.reason = self.reason or str(error)
            self._refuse(path, module, str(error))
            return
        unread = remove_unread(traced.graph, module)
        matcher = Matcher(traced, module, self.table, self.selection, path, tensors)
        products = any(ops.describe(node, module).kind in ops.WEIGHTED for node in traced.graph.nodes)
        if path and not products and not any(map(_is_layer, module.modules())):
            # Its parameters are no layer's weights, but positions, say.
            return
        self.claims += matcher.claims()
        for node, layer in unread:
            row = Row(join(path, str(node.meta["key"])), layer, "float", UNREAD)
            self.claims.append(claim_of(node, row, path))
        inner = sorted(_opaque_with_weights(traced, module))
        if matcher.plan.operators:
            keys = {node.meta["site"]: node.meta["key"] for node in traced.graph.nodes if "site" in node.meta}
            opaque = frozenset(traced.opaque) | frozenset(inner)
            self.islands.append(Island(path, signature, spec, tensors, matcher.plan, matcher.constants, keys, opaque))
        for name in inner:
            full = join(path, name)
            if name in traced.opaque:
                self._refuse(full, resolve(self.root, full), traced.opaque[name], listed=True)
            elif full in self.observed.first:
                self.split(full)

    def _list(self, path: str, module: nn.Module, reason: str) -> None:
        row = Row(path or "(forward)", type(module).__name__, "float", reason)
        self.claims.append(Claim(row, path, "whole"))

    def _refuse(self, path: str, module: nn.Module, reason: str, *, listed: bool = False) -> None:
        if not listed:
            self._list(path, module, reason)
        for name, child in module.named_children():
            full = join(path, name)
            for inner in _outermost(full, child, self.observed.first):
                self.split(inner)


def analyze(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    table: OperatorTable,
    selection: Selection,
    *,
    recipe: str,
    runtime: str,
    module: str = "",
    trains: bool = True,
) -> Analysis:
    """Make the plan of one module from one call, in eval mode; the module is left as it was.

    What cannot be traced in training mode is left out where the module is to be trained through rounding.

    Raises:
        CaptureError: the module answers one call in several ways.
        PlanError: a pattern matches no operator.
    """
    signature = own_signature(root)
    spec, tensors = flatten_call(signature, args, kwargs)
    with evaluation_mode(root):
        with as_exported():
            copy = clone(root, unrouted=True)
            before = state_of(copy)
            observed = observe_call(copy, args, kwargs)
            check_state(
                copy, before, lambda: copy(*map_tensors(Tensor.clone, args), **map_tensors(Tensor.clone, kwargs))
            )
        splitter = _Splitter(root, observed, table, selection, trains=trains)
        splitter.split("")
    splitter.claims += _never_called(root, splitter.rows, splitter.observed)
    check_patterns(selection, splitter.rows)
    rows = weigh(root, splitter.claims, settle(splitter.claims, splitter.observed))
    # What is no part of the artifact is no part of what its shares are of.
    rows = [replace(row, macs=0, weights=0) if row.reason in _APART else row for row in rows]
    rows = [replace(r, excluded=r.action == "float" and bool(selection.exclusion(r.name, r.kind))) for r in rows]
    # An empty graph, where nothing runs in integers, tells shares of a graph from those of layers alone.
    graphs = tuple(island.plan for island in splitter.islands) or (GraphPlan("", (), ()),)
    plan = Plan(recipe, runtime, module, graphs, tuple(rows))
    nothing = "" if plan.num_quantized else _nothing(root, splitter.rows, splitter.reason)
    return Analysis(plan, tuple(splitter.islands), CapturedCall(signature, spec, tensors), nothing)


def _calls_under(path: str, calls: dict[str, Any]) -> dict[str, Any]:
    """Return the calls of a module and those inside by their paths in it."""
    inside = f"{path}." if path else ""
    return {"": calls[path], **{name.removeprefix(inside): calls[name] for name in calls if name.startswith(inside)}}


def _trace_for_both_modes(module: nn.Module, spec: CallSpec, tensors: list[Tensor], calls: dict[str, Any]) -> Traced:
    """Trace in eval mode, leaving out also what cannot be traced in training mode.

    Raises:
        UntraceableError: the module's own forward cannot be traced in one of the modes.
    """
    reasons: dict[str, str] = {}
    while True:
        traced = trace_faithfully(module, spec, tensors, calls, set(reasons))
        reasons |= traced.opaque
        with training_mode(module):
            in_training = trace_faithfully(module, spec, tensors, calls, set(reasons)).opaque
        if not in_training:
            return Traced(traced.graph, traced.output_spec, reasons)
        reasons |= in_training


def own_signature(module: nn.Module) -> inspect.Signature:
    """Return the signature of a module's own forward, routed or not."""
    return forward_signature(type(module).forward.__get__(module))


def _outermost(path: str, module: nn.Module, called: dict[str, Any]) -> Iterator[str]:
    """Yield the outermost called modules with weights at or under a path."""
    if not has_weights(module):
        return
    if path in called:
        yield path
        return
    for name, child in module.named_children():
        yield from _outermost(join(path, name), child, called)


def has_weights(module: nn.Module) -> bool:
    """Tell whether a convolution or linear layer, or what may be one of the user's own, is at or under a module."""
    own = (c for c in module.modules() if ops.kind_of(c) == "other" and not isinstance(c, WHOLE))
    return any(map(_is_layer, module.modules())) or any(map(_has_own_weights, own))


def _is_layer(module: nn.Module) -> bool:
    return ops.kind_of(module) in ops.WEIGHTED or is_expanded(module)


def _opaque_with_weights(traced: Traced, module: nn.Module) -> set[str]:
    """Return the modules that the graph calls as a whole although layers with weights are inside."""
    paths = set()
    for node in traced.graph.find_nodes(op="call_module"):
        kind, child = ops.describe(node, module).kind, module.get_submodule(str(node.target))
        if kind in ("other", "transformer") and has_weights(child) and not isinstance(child, WHOLE):
            paths.add(str(node.target))
    return paths


def _never_called(root: nn.Module, rows: list[Row], observed: ObservedCall) -> Iterator[Claim]:
    """Yield the layers without a row: those that the call never reaches, and those in modules that run as a whole."""
    listed = [row.name.partition("#")[0] for row in rows]
    modules = dict(root.named_modules(remove_duplicate=False))
    # A layer with several names has a row under the one that it is called by.
    called = {
        id(child) for path, child in modules.items() if any(n == path or n.startswith(f"{path}.") for n in listed)
    }
    for path, child in modules.items():
        if "parametrizations" in path.split("."):
            # What makes a layer's weight belongs to the layer.
            continue
        is_layer = ops.kind_of(child) in ops.WEIGHTED or (path and path in observed.first and _has_own_weights(child))
        if is_layer and id(child) not in called and not _is_part(modules, path, listed):
            reason = ", ".join([INSIDE, *[n for n in listed if path.startswith(f"{n}.")][:1]])
            if path not in observed.first and not any(path.startswith(f"{n}.") for n in listed):
                reason = UNREACHED
            yield Claim(Row(path, type(child).__name__, "float", reason), path, "layer")


def _has_own_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def _is_part(modules: dict[str, nn.Module], path: str, listed: list[str]) -> bool:
    """Tell whether a module is a part of a listed layer, as the output projection is of an attention."""
    return any(path.startswith(f"{n}.") and ops.kind_of(modules[n]) == "attention" for n in listed if n in modules)


def check_patterns(selection: Selection, rows: list[Row]) -> None:
    """Make sure that every pattern of the user names something.

    Raises:
        PlanError: one matches no row.
    """
    for argument, patterns in (("`include`", selection.include), ("`exclude` and `overrides`", selection.exclude)):
        for pattern in patterns:
            if pattern != "*" and not any(matches(pattern, row.name, row.kind) for row in rows):
                names = ", ".join(row.name for row in rows[:8])
                raise PlanError(
                    f"Expected {argument} to hold patterns on names or layer types, but got {pattern!r}, which matches "
                    f"nothing. Names here are {names}{', ...' if len(rows) > 8 else ''}."
                )


def _nothing(root: nn.Module, rows: list[Row], reason: str) -> str:
    weighted = [row for row in rows if row.reason]
    listing = "; ".join(f"{row.name} ({row.kind}): {row.reason}" for row in weighted[:5])
    cause = listing or reason or "it has no convolution or linear layer"
    return f"Expected {type(root).__name__} to have something to quantize, but there is nothing: {cause}."
