"""Reports in Rich's look in a terminal, plain elsewhere."""

import io

import pytest

from lightning_quant.terminal.shown_report import print_markdown

TABLE = "# int8\n\n| a | b |\n|---|--:|\n| x | 1 |"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_tables_and_a_file_has_markdown(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        print_markdown(TABLE, stream)

    assert plain.getvalue() == TABLE + "\n"
    assert "|--" not in terminal.getvalue()
    assert "──" in terminal.getvalue()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    print_markdown(TABLE, bare := Terminal())
    assert bare.getvalue() == TABLE + "\n"


def test_nothing_moves_the_cursor_or_changes_colours() -> None:
    print_markdown("a\x1b[2Jb\n\x07c", plain := io.StringIO())
    assert plain.getvalue() == "a[2Jb\nc\n"
