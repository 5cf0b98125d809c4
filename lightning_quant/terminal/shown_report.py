"""A report where it is read: in Rich's look in a terminal that has it, as plain Markdown elsewhere."""

import importlib.util
import sys
from typing import TextIO


def in_color(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal and Rich is installed."""
    return stream.isatty() and importlib.util.find_spec("rich") is not None


def print_markdown(text: str, stream: TextIO | None = None) -> None:
    """Print Markdown, its tables drawn by Rich where the stream is a terminal.

    Args:
        text: Markdown, of whoever wrote an artifact: what moves the cursor or the colours of a terminal is left out.
        stream: stdout by default.
    """
    stream = sys.stdout if stream is None else stream
    text = "".join(character for character in text if character.isprintable() or character == "\n")
    if not in_color(stream):
        print(text, file=stream)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console(file=stream).print(Markdown(text))
