"""A disk that refuses one file operation of the package, whichever is wanted."""

import builtins
import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_quant

_PACKAGE = str(Path(lightning_quant.__file__).parent)
_CHANGES = ("mkdir", "replace", "rename", "link", "chmod", "fsync")


class Disk:
    """Counts file operations of the package; the one with a number, or the first that a test names, is refused."""

    def __init__(self, code: int, number: int = 0, is_wanted: Callable[[str, str], bool] | None = None) -> None:
        self.code, self.number, self.is_wanted = code, number, is_wanted
        self.count = 0
        self.refused: tuple[str, str] | None = None

    def meet(self, operation: str, path: Any) -> None:
        """Count an operation, and refuse it where it is the one."""
        if not _is_of_the_package():
            return
        self.count += 1
        wanted = self.count == self.number or (self.is_wanted is not None and self.is_wanted(operation, str(path)))
        if wanted and self.refused is None:
            self.refused = operation, str(path)
            named = path if isinstance(path, str | os.PathLike) else None
            raise OSError(self.code, os.strerror(self.code), named)


@contextlib.contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Let a disk refuse what it is told to for the length of a block."""
    kept = [(os, name, getattr(os, name)) for name in (*_CHANGES, "open")] + [(builtins, "open", builtins.open)]
    for module, name, real in kept:
        setattr(module, name, _wrapped(disk, name, real))
    opening, io.open = io.open, builtins.open
    try:
        yield disk
    finally:
        io.open = opening
        for module, name, real in kept:
            setattr(module, name, real)


def _wrapped(disk: Disk, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        mode = args[0] if args else kwargs.get("mode", kwargs.get("flags", "r"))
        reads = name == "open" and not (
            mode & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(mode, int) else set("wax+") & set(mode)
        )
        if not reads:
            disk.meet(name, path)
        return real(path, *args, **kwargs)

    return call


def _is_of_the_package() -> bool:
    frame = sys._getframe(3)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE):
            return True
        if "importlib" in name:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False
