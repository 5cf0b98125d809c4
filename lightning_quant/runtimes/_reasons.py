"""Why PyTorch's exporter refuses a module, in the user's names and with the place in the user's code."""

import builtins
import linecache
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

_TORCH, _PACKAGE = (os.path.dirname(os.path.abspath(path)) + os.sep for path in (torch.__file__, __file__ + "/.."))
# How the exporter calls the flat inputs, whole or a size of theirs.
_INPUT = re.compile(r"L\['(?:args|tensors)'\]\[(\d+)\](?:\.size\(\)\[(\d+)\])?")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CALL = re.compile(r'The following call raised this error:\s+File "([^"]+)", line (\d+)[^\n]*\n\s*([^\n]*)')


def first_line(error: BaseException) -> str:
    """Return the first line of what an error, or the one that caused it, says."""
    lines = [line.strip() for line in str(_origin(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(_origin(error)).__name__


def reason(error: BaseException, names: tuple[str, ...], fixed: list[str]) -> str:
    """Return what an exporter's error says that a user can use.

    Args:
        error: as raised.
        names: of the inputs, in order.
        fixed: places in the user's code that made a constant of a size that may vary.
    """
    text = str(_origin(error))
    said = first_line(error).partition(" For more information")[0]
    hints = re.search(r"Suggested fixes:\n((?:[ \t]+\S[^\n]*\n?)+)", text)
    if hints:
        said += f" (PyTorch suggests {', '.join(line.strip() for line in hints[1].splitlines() if line.strip())})"
    said = _INPUT.sub(lambda match: _named(match, names), said).rstrip(".!")
    # PyTorch closes some messages twice.
    said = said[:-1] if said.endswith(")") and said.count(")") > said.count("(") else said
    called = _CALL.search(text)
    places = [f"{called[1]}:{called[2]} `{called[3].strip()}`"] if called else _raised_at(error) or fixed
    return f"{said}, at {places[-1]}" if places else said


@contextmanager
def sizes_watched() -> Iterator[list[str]]:
    """Let `len(x)` be a size that may vary, and note the places in the user's code that make constants of such sizes.

    Python wants a plain number of `len`, which would fix the batch in the file.
    """
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    places: list[str] = []
    length, replace = builtins.len, ShapeEnv._set_replacement

    def symbolic_length(x: Any) -> Any:
        return x.shape[0] if isinstance(x, Tensor) and x.dim() else length(x)

    def noted(self: Any, symbol: Any, target: Any, *args: Any) -> Any:
        if target.is_number and (place := _present_place()) is not None:
            places.append(place)
        return replace(self, symbol, target, *args)

    builtins.len, ShapeEnv._set_replacement = symbolic_length, noted  # type: ignore[assignment, method-assign]
    try:
        yield places
    finally:
        builtins.len, ShapeEnv._set_replacement = length, replace  # type: ignore[method-assign]


def _origin(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _named(match: re.Match[str], names: tuple[str, ...]) -> str:
    index = int(match[1])
    name = f"`{names[index]}`" if index < len(names) else f"input {index}"
    return f"dimension {match[2]} of {name}" if match[2] else name


def _is_users(file: str) -> bool:
    return not file.startswith((_TORCH, _PACKAGE, "<"))


def _place(file: str, line: int) -> str:
    return f"{file}:{line} `{linecache.getline(file, line).strip()}`"


def _present_place() -> str | None:
    """Return the innermost place of the user's forward that is running, if one is."""
    frame = sys._getframe(2)
    inner = None
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if inner is None and _is_users(file):
            inner = _place(file, frame.f_lineno)
        if file.startswith(_PACKAGE) and function == "forward":
            return inner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _raised_at(error: BaseException) -> list[str]:
    """Return the places of the user's code below a forward of ours that an error came through."""
    places, inside = [], False
    traceback = _origin(error).__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        node = traceback.tb_frame.f_locals.get("node")
        if isinstance(node, fx.Node):
            # An operator that there is no translation of.
            frames = _FRAME.findall(node.stack_trace or "")
            places += [_place(name, int(line)) for name, line in frames if _is_users(name)]
        inside = inside or (file.startswith(_PACKAGE) and traceback.tb_frame.f_code.co_name == "forward")
        if inside and _is_users(file):
            places.append(_place(file, traceback.tb_lineno))
        traceback = traceback.tb_next
    return places
