"""What became of a module since it was planned: hooks and layers that came later are not what its plan is of."""

import itertools

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_quant.calls.calls import Call
from lightning_quant.errors import CaptureError
from lightning_quant.graph.faithful import agree, seeded
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.simulate.prepared import Prepared
from lightning_quant.surgery.host import moved_call
from lightning_quant.surgery.routing import clone, device_of, evaluation_mode

Structure = dict[str, tuple[type, int, int]]
_SINCE = "got other hooks or layers since fit began"
_WAY_OUT = "Make layers in `__init__`, `configure_model` or `setup`, and write what a hook changes into a `forward`"

_STALE = (
    "parity FAILED: the module does something else by now than what was trained through rounding. What training "
    "changes and its forward reads has to be a buffer, not a Python number"
)


class Planned:
    """What a module was when it was planned."""

    def __init__(self, module: nn.Module) -> None:
        self._structure = structure_of(module)
        self._is_checked = False

    def check_once(self, model: PlannedModel, module: nn.Module) -> None:
        """Refuse, before the first batch, hooks and layers that came since and change what is computed.

        Args:
            model: as planned.
            module: as it is about to be trained.

        Raises:
            CaptureError: there are some.
        """
        if not self._is_checked and (changed := self._changed(model, module)):
            raise CaptureError(f"Expected the module to stay as it was, but {changed} {_SINCE}. {_WAY_OUT}.")
        self._is_checked = True

    def failure(self, model: PlannedModel) -> str:
        """Say, when fit has ended, that the module computes something else than was planned; empty where it does not.

        Args:
            model: as planned, over the module whose weights are exported.
        """
        changed = self._changed(model, model.root)
        return f"parity FAILED: {changed} {_SINCE}, which the artifact has not. {_WAY_OUT}" if changed else ""

    def _changed(self, model: PlannedModel, module: nn.Module) -> str:
        """Name the modules whose hooks or class are others than planned, where that changes what is computed."""
        present, planned = structure_of(module), self._structure
        names = [name for name, known in planned.items() if present.get(name, known) != known]
        if not names or not model.has_graphs:
            return ""
        is_of_other_class = any(present[name][0] is not planned[name][0] for name in names)
        if not is_of_other_class and not _depends(model, module, {name: planned[name] for name in names}):
            return ""
        return ", ".join(repr(name) if name else "the module" for name in names[:3]) + ", ..." * (len(names) > 3)


def structure_of(module: nn.Module) -> Structure:
    """Return the class and the numbers of hooks of every module of a tree, by name."""
    return {
        name: (
            parametrize.type_before_parametrizations(child),
            len(child._forward_pre_hooks),
            len(child._forward_hooks),
        )
        for name, child in module.named_modules()
    }


def _depends(model: PlannedModel, module: nn.Module, planned: Structure) -> bool:
    """Tell whether a module answers the captured call otherwise with hooks that it had not when it was planned."""
    root = clone(module, unrouted=True)
    args, kwargs = _call_in_its_type(model, root)
    with evaluation_mode(root):
        present = seeded(root, lambda: root(*args, **kwargs))
        for name, (_, *numbers) in planned.items():
            child = root.get_submodule(name)
            for hooks, number in zip((child._forward_pre_hooks, child._forward_hooks), numbers, strict=True):
                for key in [*itertools.islice(hooks, number, None)]:
                    del hooks[key]
        return not agree(present, seeded(root, lambda: root(*args, **kwargs)))


def stale(model: Prepared) -> list[str]:
    """Say that the graphs that a module was trained through do something else than it does by now; empty where not.

    Python values that a forward reads are those of the first call through a graph.
    """
    root = model.root
    args, kwargs = _call_in_its_type(model, root)
    with evaluation_mode(root):
        expected = seeded(root, lambda: root(*args, **kwargs))
        with model.attached("off"):
            actual = seeded(root, lambda: root(*args, **kwargs))
    return [] if agree(expected, actual) else [_STALE]


def _call_in_its_type(model: PlannedModel, module: nn.Module) -> Call:
    """Return the captured call as it is made of a module that computes in half or double precision."""
    call = Call(*moved_call(*model.call(), device_of(module)))
    kind = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return call.map(lambda tensor: tensor.to(kind) if tensor.is_floating_point() else tensor)
