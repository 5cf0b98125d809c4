"""Quantizers of tensors as modules: exporters name nodes after modules, so files keep the names of the plan's edges.

What nothing reads has no node in a file, so edges cannot be found there by counting.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import ExportError
from lightning_quant.numerics.grid import Grid

# What stands before an edge's name in the name of a file's node.
PREFIX = "edge "


class EdgeQuantizer(nn.Module):
    """Quantizes one edge of the plan.

    Attributes:
        identity: of the edge.
        grid: scale, zero point, lowest and highest integer of the type that kernels clip to, and that type.
        clip: lowest and highest integer, where there are fewer than that type has; None where there are not.
    """

    def __init__(self, identity: str, scale: float, zero_point: int, grid: Grid, *, clips: bool = True) -> None:
        super().__init__()
        info = torch.iinfo(grid.dtype)
        self.identity, self.grid = identity, (scale, zero_point, info.min, info.max, grid.dtype)
        self.clip = None if grid.fills_type or not clips else (grid.low, grid.high)

    def forward(self, x: Tensor) -> Tensor:
        """Return integers."""
        integers = torch.ops.quantized_decomposed.quantize_per_tensor.default(x, *self.grid)
        # Of integers: a clip in front of the quantizer would keep integer kernels from what it clips.
        return integers if self.clip is None else torch.clamp(integers, *self.clip)


class EdgeNames:
    """Tells which edges the quantizers of an exported module are."""

    def __init__(self, root: nn.Module) -> None:
        named = root.named_modules(remove_duplicate=False)
        self.identities = {_last(path): child.identity for path, child in named if isinstance(child, EdgeQuantizer)}

    def of_fx(self, node: torch.fx.Node) -> str | None:
        """Return the edge that a node of an exported program quantizes, from the calls of modules it was traced in.

        Exporters number the calls of a module, those that are left out since nothing reads them among them.
        """
        calls = [(call, _last(path)) for call, (path, _) in node.meta.get("nn_module_stack", {}).items()]
        inside = [(call, self.identities[last]) for call, last in calls if last in self.identities]
        if not inside:
            return None
        call, identity = inside[-1]
        return _numbered(identity, int(call.partition("@")[2] or 0))

    def of_program(self, program: torch.export.ExportedProgram) -> dict[str, str]:
        """Return the name of a node to the edge that it quantizes."""
        edges = {node.name: self.of_fx(node) for node in program.graph.nodes}
        return {name: edge for name, edge in edges.items() if edge is not None}


def numbered(identities: Iterable[str]) -> list[str]:
    """Tell the calls of a part that runs several times apart, as `EdgeNames` does."""
    seen: Counter[str] = Counter()
    names = []
    for identity in identities:
        names.append(_numbered(identity, seen[identity]))
        seen[identity] += 1
    return names


def edge_of(name: str) -> str:
    """Return the edge that a node of this name quantizes; of a part that runs several times, in whichever run."""
    return name.removeprefix(PREFIX).partition("@")[0]


def check_common(given: Iterable[str], names: Iterable[str]) -> None:
    """Make sure that a file has edges of a plan.

    Raises:
        ExportError: it has none.
    """
    if given and not set(given) & set(names):
        raise ExportError(
            f"Expected quantized tensors of the plan in the exported file, {list(given)[:3]} among them, but it has "
            f"{list(names)[:3] or 'none'}."
        )


def _last(path: Any) -> str:
    """Return the last part of a path: of a module that has several names, exporters note only that."""
    return str(path).rpartition(".")[2]


def _numbered(identity: str, earlier: int) -> str:
    return f"{identity}@{earlier + 1}" if earlier else identity
