"""One subject of a report, and all that is to be known of it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One subject of a report; a new one is a file beside this one and a line in `make_report`.

    A subclass is a frozen dataclass whose fields JSON can hold once they are nested dicts; it says nothing of what it
    does not override. No two sections have a field or a scalar of one name.
    """

    def text(self) -> str:
        """Return what stands in report.md and in the terminal, as Markdown; empty for nothing."""
        return ""

    def failures(self) -> list[str]:
        """Say in plain words why the artifact is not what was asked for or simulated; each has "FAILED" in it."""
        return []

    def warnings(self) -> list[str]:
        """Say in plain words what else went wrong."""
        return []

    def scalars(self) -> dict[str, float | None]:
        """Return quantity to number, for loggers; None for what was not measured."""
        return {}

    def figures(self) -> dict[str, "Callable[[], Figure]"]:
        """Return name to what draws a picture with matplotlib, for loggers that take them."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Return what stands in report.json: the fields, and what follows from them."""
        return dataclasses.asdict(self)
