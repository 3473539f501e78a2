"""The results of Lorraine, Vicol and Duvenaud 2019. Each module has a ``TABLE``, which scripts/paper.py prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare import Run

Found = Mapping[str, Sequence[Run]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result, and the runs that reproduce it.

    Attributes:
        label: the first cell.
        paper: the paper's figure.
        runs: a pattern for the folders of its runs below the root, such as ``"paper_x/**/seed=*"``.
        figures: the figure of result.json in each column; default: the table's.
        plain: a pattern for the plain trainings whose seconds are the unit of cost; default: the runs' own inner steps.
    """

    label: str
    paper: str
    runs: str
    figures: Sequence[str] | None = None
    plain: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of one section of the paper.

    Attributes:
        columns: the heading of each figure, and the figure's name in result.json.
        form: the format of a figure, such as ``".1f"``.
        draw: ``draw(found, folder)`` draws the pictures; ``found`` has the runs of each row by label.
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    form: str = ".1%"
    draw: Callable[[Found, Path], None] | None = None
