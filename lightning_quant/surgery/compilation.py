"""Modules under `torch.compile`: copies without it, and calls that no compiler looks into."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Uncompiled(nn.Module):
    """Stands in a copy where the user has what `torch.compile(module)` returns, under the same names."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._orig_mod = original

    def __getattr__(self, name: str) -> Any:
        """Look where the compiled module does: in the original."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original."""
        return self._orig_mod(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether a module is what `torch.compile(module)` returned."""
    return type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules


def original_path(root: nn.Module, path: str) -> str:
    """Return the path of the user's own module where `path` names a compiled one."""
    while isinstance(module := root.get_submodule(path), Uncompiled) or is_compiled(module):
        path = f"{path}._orig_mod" if path else "_orig_mod"
    return path


def kept_from_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that a compiler calls as it is: what a graph does there depends on what it sees."""
    # Where nothing is compiled the compiler, which takes seconds to import, is not loaded.
    return torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function


def scripted_part(module: nn.Module) -> str:
    """Return the name of a part that is TorchScript, or the type of the module if all of it is; empty without one."""
    scripted = (name for name, child in module.named_modules() if isinstance(child, torch.jit.ScriptModule))
    name = next(scripted, None)
    return "" if name is None else name or type(module).__name__
