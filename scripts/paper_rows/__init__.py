"""The results of Lorraine, Vicol and Duvenaud 2019, a module with a ``TABLE`` for each; scripts/paper.py reads them."""

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
        label: what it is, the first cell.
        paper: what the paper has.
        runs: where its runs are, as a pattern of folders below the root, such as ``"paper_x/**/seed=*"``.
        figures: which figure of result.json is in each column; default the table's.
        plain: where the plain trainings are whose seconds are the unit of its cost; default its own inner steps.
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
        columns: the headings of the figures, each with the figure's name in result.json.
        form: how a figure is written, such as ``"{:.1f}"``.
        draw: ``draw(found, folder)`` draws the pictures, from the runs of each row by label.
    """

    title: str
    columns: Mapping[str, str]
    rows: Sequence[Row]
    form: str = "{:.1%}"
    draw: Callable[[Found, Path], None] | None = None
