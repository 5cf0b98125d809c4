"""What a forward keeps of the sizes of its last call: a number of samples, and masks or positions made for it.

Such code computes anew where a size is another one. An exporter compares what is kept, a plain number, with a size that
may vary, and so makes a constant of that: unless what is kept is a size that no call has.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quant.errors import ExportError
from lightning_quant.planned.planned_model import PlannedModel
from lightning_quant.surgery.process import graphs_unprinted
from lightning_quant.surgery.routing import as_exported

# Where a module has what it shows as an attribute beside the plain ones.
_OWNED = ("_parameters", "_buffers", "_modules")
# Numbers of samples of two calls that tell what follows them.
_FEW, _MORE = 2, 3


@contextmanager
def sizes_forgotten(module: nn.Module, captured: PlannedModel) -> Iterator[None]:
    """Let each call find sizes of no call kept while a block runs, and put every plain attribute back afterwards.

    Args:
        module: what is exported, in evaluation; runs on parts of the captured call.
        captured: whose call that is.

    Raises:
        ExportError: the module does not run on parts of the call.
    """
    before = _plain(module)
    forgotten = _following(module, captured)
    # A hook that does nothing would be one that exporters cannot look into.
    hook = module.register_forward_pre_hook(lambda *_: _set(module, forgotten), prepend=True) if forgotten else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for path, name in _plain(module).keys() - before.keys():
            module.get_submodule(path).__dict__.pop(name)
        _set(module, before)


def _following(module: nn.Module, captured: PlannedModel) -> dict[tuple[str, str], Any]:
    """Return the attributes that follow the number of samples, with a value that fits no call."""
    batch = captured.batch
    if batch is None or batch.size < _MORE:
        return {}

    def after(number: int) -> dict[tuple[str, str], Any]:
        args, kwargs = captured.call(batch.cut(captured.spec.names, captured.tensors, 0, number))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), as_exported(), graphs_unprinted():
            try:
                module(*args, **kwargs)
            # Whatever a graph raises that is right for the captured number of samples alone.
            except Exception as error:
                raise ExportError(f"Expected {number} samples to be a call of what is exported, but {error}") from error
        return _plain(module)

    few, more = after(_FEW), after(_MORE)
    values = {place: _without_size(value, more.get(place)) for place, value in few.items()}
    sizes = {place: value for place, value in values.items() if value is not None}
    if not sizes:
        return {}
    # What counts calls, say, is another number by now.
    again = after(_FEW)
    return {place: value for place, value in sizes.items() if _is_alike(few[place], again.get(place))}


def _plain(module: nn.Module) -> dict[tuple[str, str], Any]:
    """Return what hangs on each module of a tree, by path and name, beside parameters, buffers and modules."""
    return {
        (path, name): value
        for path, child in module.named_modules()
        for name, value in vars(child).items()
        if name not in _OWNED
    }


def _set(module: nn.Module, values: dict[tuple[str, str], Any]) -> None:
    for (path, name), value in values.items():
        module.get_submodule(path).__dict__[name] = value


def _without_size(few: Any, more: Any) -> Any:
    """Return a number or tensor of no call's size in place of one whose size follows the samples; None for others."""
    if type(few) is type(more) is int:
        return -1 if _is_multiple(few, more) else None
    if not (isinstance(few, Tensor) and isinstance(more, Tensor)) or few.dim() != more.dim() or few.shape == more.shape:
        return None
    if not all(one == other or _is_multiple(one, other) for one, other in zip(few.shape, more.shape, strict=True)):
        return None
    return few.new_empty([size if size == other else 0 for size, other in zip(few.shape, more.shape, strict=True)])


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape
    return type(one) is type(other) and bool(one == other)


def _is_multiple(few: int, more: int) -> bool:
    """Tell whether two sizes are the same number for each sample."""
    return few > 0 and few * _MORE == more * _FEW
