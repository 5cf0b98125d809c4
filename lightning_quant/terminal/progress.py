"""Progress on what takes more than a second: a bar in a terminal or notebook, a line a minute in a log.

While a Trainer shows its own progress with Rich, bars are lines of that display, which any other writing would tear.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import tqdm.auto

Item = TypeVar("Item")
# Seconds before a bar appears, and between the lines of a log.
_DELAY_S, _LINE_S = 1.0, 60.0
_LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go {postfix}"


# What the Trainer shows its progress with, while there is one.
_followed: Any = None


def follow(trainer_bar: Any) -> None:
    """Show bars in a Trainer's display from now on, where it has one that can hold them; None for no longer."""
    global _followed
    _followed = trainer_bar


def _display() -> Any:
    """Return the display of Rich that is shown now, if any."""
    display = getattr(_followed, "progress", None)
    return display if display is not None and display.live.is_started else None


class _Rows(tqdm.tqdm):
    """A bar that is a row of a display of Rich."""

    def __init__(self, display: Any, **options: Any) -> None:
        self._display, self._row = display, None
        super().__init__(**options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Bring the row to where the bar stands."""
        if self._row is None:
            # RichProgressBar writes a total that nobody knows as infinite.
            self._row = self._display.add_task(self.desc, total=math.inf if self.total is None else self.total)
        postfix = f" {self.postfix}" if self.postfix else ""
        self._display.update(self._row, completed=self.n, description=f"{self.desc}{postfix}")

    def close(self) -> None:
        """Take the row away."""
        super().close()
        if self._row is not None:
            self._display.remove_task(self._row)
            self._row = None


class _Lines(tqdm.tqdm):
    """Writes lines where nothing that was written can be taken back."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write where it stands, and nothing when it is over."""
        if msg is None:
            print(str(self), file=sys.stderr, flush=True)


def bar(what: str, unit: str = "it", *, items: Iterable[Any] | None = None, total: int | None = None) -> Any:
    """Return a bar over items, or one of so many steps, with `update`, to be used in a `with` block or as iterable.

    Args:
        what: is being done.
        unit: of which there are so many.
        items: to pass on one by one.
        total: how many steps there are, where there are no items.
    """
    options: dict[str, Any] = {"iterable": items, "total": total, "desc": what, "unit": unit, "leave": False}
    if (display := _display()) is not None:
        return _Rows(display, **options, delay=_DELAY_S)
    # Output of a notebook is no terminal, and shows bars all the same.
    if sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules:
        return tqdm.auto.tqdm(**options, delay=_DELAY_S)
    return _Lines(**options, delay=_LINE_S, mininterval=_LINE_S, miniters=1, bar_format=_LINE)


def tracked(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield the items of an iterable and show how far they are."""
    yield from bar(what, unit, items=items)


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show what is being done while a block runs whose length nobody knows."""
    if (display := _display()) is not None:
        with _Rows(display, desc=what, leave=False):
            yield
        return
    with tqdm.tqdm(desc=what, leave=False, disable=None, bar_format="{desc} ..."):
        yield
