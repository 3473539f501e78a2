"""The results of Lorraine, Vicol and Duvenaud 2019 beside hoptim's: ``python scripts/paper.py runs``.

It reads the runs of ``experiment=paper/...`` in the folder, prints a Markdown table for each section of the paper, and
writes the pictures into the folder. scripts/README.md has the commands for the runs. The row of a missing run is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from statistics import mean

import paper_rows
from common import tables as common_tables
from common.means import mean_and_error
from compare import Run, read_one
from paper_rows import Row, Table


def tables() -> Iterator[Table]:
    """The tables of all modules in scripts/paper_rows."""
    for module in iter_modules(paper_rows.__path__):
        yield import_module(f"paper_rows.{module.name}").TABLE


def finished(root: Path, pattern: str) -> list[Run]:
    """The finished runs in the folders that match the pattern."""
    runs = [read_one(path.parent, root) for path in sorted(root.glob(f"{pattern}/result.json"))]
    return [run for run in runs if run.result["status"] == "finished"]


def cells(row: Row, table: Table, root: Path) -> list[str]:
    """Label, the paper's figure, the figures here, hypersteps, cost in plain trainings, and seconds of one run."""
    runs = finished(root, row.runs)
    if not runs:
        return [row.label, row.paper, *[""] * (len(table.columns) + 3)]
    names = row.figures or table.columns.values()
    figures = [mean_and_error([run.result[name] for run in runs], table.form) for name in names]
    hypersteps = sorted({run.result["hypersteps"] for run in runs})
    return [row.label, row.paper, *figures, ", ".join(map(str, hypersteps)), cost(row, runs, root), f"{seconds(runs):.0f}"]


def cost(row: Row, runs: Sequence[Run], root: Path) -> str:
    """The cost in plain trainings, which are those that the row names, or the run's own inner steps."""
    if row.plain is None:
        return f"{mean(run.cost for run in runs):.2f}"
    plain = finished(root, row.plain)
    return f"{seconds(runs) / seconds(plain):.2f}" if plain else ""


def seconds(runs: Sequence[Run]) -> float:
    return mean(run.seconds for run in runs)


def markdown(table: Table, root: Path) -> str:
    """The table in Markdown, below its title."""
    head = ["", "paper", *table.columns, "hypersteps", "trainings", "seconds"]
    return f"**{table.title}**\n\n{common_tables.markdown(head, [cells(row, table, root) for row in table.rows])}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, nargs="?", default=Path("runs"), help="a folder of runs; default: runs")
    root = parser.parse_args().root
    for table in tables():
        print(markdown(table, root))
        found = {row.label: runs for row in table.rows if (runs := finished(root, row.runs))}
        if table.draw and found:
            table.draw(found, root)


if __name__ == "__main__":
    main()
