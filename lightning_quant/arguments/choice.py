"""A choice by name: which names there are, and which one was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

from lightning_quant.errors import QuantizationError

# Share of equal letters from which on a name is taken for a slip of the pen.
_CUTOFF = 0.6
# What names are called elsewhere.
_CALLED = {
    **{"fp16": "float16", "half": "float16", "bf16": "bfloat16", "ort": "onnxruntime", "ov": "openvino"},
    **{"qint8": "int8", "quint8": "int8", "uint8": "int8", "w8a8": "int8", "w8a16": "int8_weight_only"},
    **{"w4a16": "int4_weight_only", "qat": "quantizationawaretraining", "ptq": "posttrainingquantization"},
}


def check_choice(argument: str, value: Any, choices: Iterable[str], otherwise: str = "") -> None:
    """Make sure that a value is one of the names that an argument takes.

    Args:
        argument: as the user writes it.
        value: what the user wrote.
        choices: the names.
        otherwise: what the argument takes beside names, such as " or a `Recipe`".

    Raises:
        QuantizationError: it is none of them; the message has the closest.
    """
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        # A type of PyTorch's, such as torch.float16, is written as a text here.
        is_dtype = type(value).__name__ == "dtype"
        meant = str(value).removeprefix("torch.") if is_dtype else value
        is_plain = is_dtype or isinstance(value, str | int | float | None)
        got = f"{value!r:.80}" if is_plain else f"a {type(value).__name__}"
        raise QuantizationError(
            f"Expected `{argument}` to be one of {names}{otherwise}, but got {got}.{did_you_mean(meant, names)}"
        )


def did_you_mean(value: Any, names: Iterable[str]) -> str:
    """Return the question that follows a message, with a blank in front; empty where no name comes close."""
    close = closest(value, names)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def closest(value: Any, names: Iterable[str], cutoff: float = _CUTOFF) -> list[str]:
    """Return up to three names that somebody who wrote a value may have meant, the likeliest first.

    Args:
        value: what was written.
        names: the names that there are.
        cutoff: how alike, in [0, 1], two names must be.
    """
    if not isinstance(value, str) or not value:
        return []
    by_spelling: dict[str, list[str]] = {}
    for name in names:
        by_spelling.setdefault(_plain(name), []).append(name)
    wanted = _CALLED.get(_plain(value), _plain(value))
    near = difflib.get_close_matches(wanted, by_spelling, n=3, cutoff=cutoff)
    if cutoff <= _CUTOFF:
        # "val" for "validation" and "onnx" for "onnxruntime": short for what it begins.
        near += [name for name in by_spelling if len(wanted) > 2 and name.startswith(wanted)]
    return [name for spelling in dict.fromkeys(near) for name in by_spelling[spelling]][:3]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(" ", "_")
