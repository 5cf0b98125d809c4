"""Progress on what takes more than a second; silent where standard error is no terminal."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
# Seconds before a bar appears.
_DELAY_S = 1.0


def tracked(items: Iterable[Item], what: str, unit: str) -> Iterator[Item]:
    """Yield the items of an iterable and show how far they are."""
    yield from tqdm(items, desc=what, unit=unit, delay=_DELAY_S, leave=False, disable=None)


@contextmanager
def shown(what: str) -> Iterator[None]:
    """Show what is being done while a block runs whose length nobody knows."""
    with tqdm(desc=what, leave=False, disable=None, bar_format="{desc} ..."):
        yield
