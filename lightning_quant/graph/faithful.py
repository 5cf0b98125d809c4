"""Whether a graph does in the captured call what the forward does that it was traced from.

Whatever a trace was told wrongly, or left out, shows when the graph runs: as an error that the forward does not raise,
or as another result.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lightning_quant.calls.calls import CallSpec, flatten_call, forward_signature, map_tensors
from lightning_quant.calls.structures import register_structures
from lightning_quant.errors import UntraceableError
from lightning_quant.graph.trace import Traced, trace
from lightning_quant.numerics.noise import signal_to_noise
from lightning_quant.surgery.routing import clone, has_hooks, without_fast_path

# Decibels: rounding in another order of sums leaves more than 60, another branch of a forward seldom 20.
_ENOUGH_DB = 40.0
_HOOKED = "a hook on it changes what it is given or what it answers"


class _Located(fx.Interpreter):
    """Runs a graph and remembers at which node."""

    at: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        self.at = n
        return super().run_node(n)


def trace_faithfully(
    module: nn.Module,
    spec: CallSpec,
    tensors: list[Tensor],
    calls: Mapping[str, tuple[Any, Any]],
    opaque: set[str] | None = None,
) -> Traced:
    """Trace a module under its present flags, and leave out the parts whose graph does not do what their forward does.

    Args:
        module: left as it is.
        spec: of its call.
        tensors: of that call.
        calls: path to the captured call of each module of the tree, the module itself under the empty path.
        opaque: paths that are left out in any case.

    Raises:
        UntraceableError: the module's own forward cannot be traced, or its graph or a hook does something else.
    """
    reasons: dict[str, str] = {}
    while True:
        traced = trace(module, spec, tensors, {*(opaque or ()), *reasons})
        unfaithful = _unfaithful(traced, module, tensors, *calls[""])
        if unfaithful is None:
            hooked = {} if module.training else _changed_by_hooks(traced, module, calls)
            for node in traced.graph.find_nodes(op="call_module"):
                node.meta["as_it_is"] = node.target in hooked
            return replace(traced, opaque={**reasons, **traced.opaque, **hooked})
        place, reason = unfaithful
        place = place or _place_of_fault(traced, module, calls)
        if not place or place in reasons:
            raise UntraceableError(f"{type(module).__name__}.forward cannot be traced: {reason}")
        reasons[place] = reason


def _changed_by_hooks(traced: Traced, module: nn.Module, calls: Mapping[str, tuple[Any, Any]]) -> dict[str, str]:
    """Return the modules that a graph calls and whose hooks change what they are given or answer, with that reason.

    Others watch, or make the weights that the forward reads, as those of pruning and of weight norm do. Training runs
    all of them, around layers that round.

    Raises:
        UntraceableError: the module itself has such a hook.
    """
    called = {"", *(str(node.target) for node in traced.graph.nodes if node.op == "call_module")}
    hooked = [path for path in sorted(called & set(calls)) if has_hooks(module.get_submodule(path))]
    if not hooked:
        return {}
    copy = clone(module, unrouted=True)
    changed = {p: _HOOKED for p in hooked if not _agrees_without_hooks(copy.get_submodule(p), *calls[p])}
    if "" in changed:
        raise UntraceableError(_HOOKED)
    return changed


def _agrees_without_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    first, second = (map_tensors(lambda t: t.detach().clone(), (args, kwargs)) for _ in range(2))
    expected = seeded(module, lambda: module(*first[0], **first[1]))
    try:
        return agree(expected, seeded(module, lambda: module.forward(*second[0], **second[1])))
    except Exception:  # whatever a forward raises that is not given what its hook gives it
        return False


def _place_of_fault(traced: Traced, module: nn.Module, calls: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the path of an innermost module that was traced into and whose graph is unfaithful; empty for none."""
    scopes = {str(node.meta.get("scope", "")) for node in traced.graph.nodes} & set(calls)
    for path in sorted(scopes - {""}, key=lambda path: (-path.count("."), path)):
        child, (args, kwargs) = module.get_submodule(path), calls[path]
        spec, tensors = flatten_call(forward_signature(type(child).forward.__get__(child)), args, kwargs)
        try:
            if _unfaithful(trace(child, spec, tensors), child, tensors, args, kwargs) is not None:
                return path
        except UntraceableError:
            return path
    return ""


def _unfaithful(
    traced: Traced, module: nn.Module, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str, str] | None:
    """Return the module whose part of a graph fails, the empty path for all of it, with the reason; None for none."""
    graph = _Located(clone(module, unrouted=True), graph=traced.graph)
    tensors, args, kwargs = map_tensors(lambda t: t.detach().clone(), (tensors, args, kwargs))

    def forward(seed: int = 0) -> Any:
        call = map_tensors(Tensor.clone, (args, kwargs))
        return seeded(module, lambda: clone(module, unrouted=True).forward(*call[0], **call[1]), seed)

    failed = ""
    try:
        leaves = seeded(module, lambda: graph.run(*tensors))
    except Exception as error:  # of whatever the operations of a user's forward raise
        failed = f"{type(error).__name__}: {error}".split("\n")[0]
    try:
        expected = forward()
    except Exception:  # the forward itself does not take the call in this mode
        return None
    if failed:
        site = graph.at.meta.get("site", ("",))
        return site[0].partition("(")[0], f"its graph fails where it does not ({failed})"
    # Where numbers are drawn, as by dropout, results tell nothing.
    if agree(expected, traced.output_spec.build(leaves)) or not agree(expected, forward(1)):
        return None
    return "", "its graph answers otherwise than it does"


def seeded(module: nn.Module, run: Callable[[], Any], seed: int = 0) -> Any:
    """Run something with random numbers of its own, and with gradients where the module trains."""
    with (
        torch.random.fork_rng(devices=[]),
        nullcontext() if module.training else torch.no_grad(),
        without_fast_path(),
    ):
        torch.manual_seed(seed)
        return run()


def agree(expected: Any, actual: Any, enough_db: float = _ENOUGH_DB) -> bool:
    """Tell whether two results are of one structure, and their numbers as close as equal computations leave them."""
    register_structures((expected, actual))
    (wanted, structure), (got, other) = pytree.tree_flatten(expected), pytree.tree_flatten(actual)
    if structure != other or any(type(a) is not type(b) for a, b in zip(wanted, got, strict=True)):
        return False
    for a, b in zip(wanted, got, strict=True):
        if isinstance(a, Tensor) and (a.shape != b.shape or a.dtype != b.dtype):
            return False
        if isinstance(a, Tensor) and a.is_floating_point() and signal_to_noise(a.detach(), b.detach()) < enough_db:
            return False
    return True
