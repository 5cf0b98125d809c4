"""Tables for terminals and Markdown files."""

import re
from collections.abc import Sequence

# What begins an element of HTML, ends the text of a link, or would take the meaning of what follows away.
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])(?=[(\[])|\\(?=[!-/:-@\[-`{-~])")


def one_line(text: str) -> str:
    """Return a text that somebody else chose as one line of Markdown in which nothing is HTML or a link."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return _MARKUP.sub(lambda match: "\\" + match[0], " ".join(printable.split()))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table padded so that it also reads well in a terminal; numbers align right."""
    cells = [[one_line(str(cell)).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in cells[1:]) and len(cells) > 1 for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = "|".join("-" * (w + 1) + ":" if n else "-" * (w + 2) for w, n in zip(widths, numeric, strict=True))
    return "\n".join([line(cells[0]), f"|{rule}|", *map(line, cells[1:])])


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("+-").replace(",", "").replace(" ", "")[:1].isdigit()
