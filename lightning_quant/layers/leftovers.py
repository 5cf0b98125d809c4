"""Layers that a plan of graphs leaves in float and recipes of layers can store, and the rows of those."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from lightning_quant.graph.analyze import INSIDE, UNREACHED
from lightning_quant.graph.candidates import UNKNOWN_SHAPES
from lightning_quant.graph.expansions import is_expanded
from lightning_quant.graph.plan import UNREAD, Plan, Row
from lightning_quant.layers import class_for
from lightning_quant.surgery.routing import has_hooks

# Why they stay float says the table of the runtime, which knows more than their size.
_IN_TABLES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def left_in_float(root: nn.Module, plan: Plan) -> frozenset[str]:
    """Return the labels of layers and modules with weights that a graph's plan leaves in float for want of a form."""
    return frozenset(_label(root, _path(row)) for row in _storable(root, plan))


def kept_as_whole(root: nn.Module, plan: Plan) -> Plan:
    """Return a plan in which what would be stored together with an excluded row is excluded as well.

    A layer's weights are stored for all of its calls, and with those of the layers inside it; parameters of a module
    with all that its own code multiplies by.
    """
    excluded = [row for row in plan.rows if row.excluded]
    kept = {}
    for row in _storable(root, plan):
        path = _path(row)
        other = next((r for r in excluded if _path(r) == path or _is_part(r, row, path)), None)
        if other is not None:
            reason = f"{other.name} is excluded, and is stored together with it"
            kept[row.name] = replace(row, excluded=True, reason=reason)
    return replace(plan, rows=tuple(kept.get(row.name, row) for row in plan.rows))


def _is_part(excluded: Row, row: Row, path: str) -> bool:
    """Tell whether an excluded row is of a layer inside that of another row, or of a product with its parameters."""
    if row.kind == "Parameter" and excluded.kind.islower() and excluded.macs:
        return excluded.name.rpartition(".")[0] == path
    return bool(path) and excluded.name.startswith(f"{path}.") and excluded.reason.startswith(INSIDE)


def _storable(root: nn.Module, plan: Plan) -> Iterator[Row]:
    modules = dict(root.named_modules(remove_duplicate=False))
    for row in plan.rows:
        if row.action != "float" or row.excluded or row.reason in (UNREAD, UNREACHED):
            continue
        module = modules.get(_path(row))
        # What was written out for a trace is no layer any more that something could take the place of.
        in_tables = isinstance(module, _IN_TABLES) and row.reason != UNKNOWN_SHAPES
        if module is None or in_tables or (is_expanded(module) and not has_hooks(module)):
            continue
        if class_for(module) is not None or any(p.dim() > 1 for p in module.parameters(recurse=False)):
            yield row


def with_stored(root: nn.Module, plan: Plan, stored: Mapping[str, Row]) -> Plan:
    """Return a plan of a module with rows of stored layers, by label, in place of those of the float ones."""
    rows, known = [], set()
    for row in plan.rows:
        label = next((name for name in (_label(root, _path(row)), row.name.partition("#")[0]) if name in stored), None)
        label = label or next((name for name, of in stored.items() if _holds(name, of, row)), None)
        other = None if label is None else stored[label]
        if other is None or row.action in ("int8", "fused") or (row.kind == "Parameter" and not other.is_quantized):
            rows.append(row)
        elif row.kind == "Parameter":
            # One row for the module, whose weights are those of all its parameters.
            if label not in known:
                rows.append(replace(other, macs=0))
        else:
            rows.append(replace(row, action=other.action, reason=other.reason))
        known.add(label)
    rows += [row for label, row in stored.items() if label not in known]
    return replace(plan, rows=tuple(rows))


def _holds(label: str, stored: Row, row: Row) -> bool:
    """Tell whether a row is of a part that is stored with the layer around it."""
    return stored.is_quantized and row.name.startswith(f"{label}.") and row.reason.startswith(INSIDE)


def _path(row: Row) -> str:
    """Return the path of the module that a row is about."""
    name = row.name.partition("#")[0]
    return name.rpartition(".")[0] if row.kind == "Parameter" else "" if name == "(forward)" else name


def _label(root: nn.Module, path: str) -> str:
    return path or type(root).__name__
