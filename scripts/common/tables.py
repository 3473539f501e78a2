"""Tables on the terminal, drawn by rich, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console


def wide_console(width: int = 150) -> Console:
    """The terminal, or ``width`` columns where the output goes to a file."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["", "loss"], [["plain", "0.5"]]))
    |  | loss |
    | --- | --- |
    | plain | 0.5 |
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])
