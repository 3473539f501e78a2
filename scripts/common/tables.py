"""Tables on the terminal, drawn by rich, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def wide_console(width: int = 150) -> Console:
    """The terminal, or ``width`` columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def table(title: str, *columns: str, left: Sequence[str] = ()) -> Table:
    """An empty table: its first column and those named in ``left`` are aligned to the left, the others to the right."""
    found = Table(title=title, title_justify="left")
    for column in columns:
        found.add_column(column, justify="left" if column in (columns[0], *left) else "right")
    return found


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["", "loss"], [["plain", "0.5"]]))
    |  | loss |
    | --- | --- |
    | plain | 0.5 |
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])
