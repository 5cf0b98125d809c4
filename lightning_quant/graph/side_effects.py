"""What a forward leaves behind in the module itself, which a graph of it would not."""

from typing import Any

import torch
from torch import fx, nn

from lightning_quant.errors import UntraceableError


def attributes(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return everything but submodules that hangs on each module of a tree."""
    ignored = ("_modules", "_buffers", "_parameters")
    return {
        path: {**{k: v for k, v in vars(child).items() if k not in ignored}, **child._buffers}
        for path, child in module.named_modules()
        # Scripted modules keep what is asked of them.
        if not isinstance(child, torch.jit.ScriptModule)
    }


def check_attributes(before: dict[str, dict[str, Any]], module: nn.Module) -> None:
    """Refuse a forward that sets attributes: a graph would not do so again.

    Raises:
        UntraceableError: its `places` name the modules.
    """
    places = {}
    for path, after in attributes(module).items():
        old = before.get(path, {})
        changed = [k for k, v in after.items() if not k.startswith("_tensor_constant") and old.get(k, module) is not v]
        if changed:
            places[path] = f"its forward sets {', '.join(changed)}"
    if places:
        raise UntraceableError(next(iter(places.values())), places)


def writes_own_buffer(written: fx.Node, root: nn.Module) -> bool:
    """Tell whether what a node writes into is a buffer of a module that trains, which it may count calls in.

    A graph does so again at each call. In evaluation the buffer would have to be a state of the exported model.
    """
    while written.op in ("call_function", "call_method") and _name(written) in ("getattr", "detach", "view"):
        source = written.args[0]
        if not isinstance(source, fx.Node):
            return False
        written = source
    owner, _, name = str(written.target).rpartition(".")
    if written.op != "get_attr":
        return False
    module = root.get_submodule(owner)
    return module.training and name in module._buffers


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))
