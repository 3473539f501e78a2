"""The results of Lorraine, Vicol and Duvenaud 2019 beside those of hoptim: ``python scripts/paper.py runs``.

It reads the runs of ``experiment=paper/...`` below the folder, prints a Markdown table for each section of the paper, and
writes the pictures into the folder. scripts/README.md has the commands. What was not run has an empty row.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import paper_rows
from compare import Run, mean_error, read_one
from paper_rows import Row, Table


def tables() -> Iterator[Table]:
    """The tables of all modules in scripts/paper_rows."""
    for module in iter_modules(paper_rows.__path__):
        yield import_module(f"paper_rows.{module.name}").TABLE


def finished(root: Path, pattern: str) -> list[Run]:
    """The finished runs in the folders that the pattern names."""
    runs = [read_one(path.parent, root) for path in sorted(root.glob(f"{pattern}/result.json"))]
    return [run for run in runs if run.result["status"] == "finished"]


def cells(row: Row, table: Table, root: Path) -> list[str]:
    """Label, the paper's figure, those found here, hypersteps, cost in plain trainings, and seconds of one run."""
    runs = finished(root, row.runs)
    if not runs:
        return [row.label, row.paper, *[""] * (len(table.columns) + 3)]
    figures = [written([run.result[name] for run in runs], table.form) for name in row.figures or table.columns.values()]
    hypersteps = sorted({run.result["hypersteps"] for run in runs})
    return [row.label, row.paper, *figures, ", ".join(map(str, hypersteps)), cost(row, runs, root), f"{seconds(runs):.0f}"]


def cost(row: Row, runs: Sequence[Run], root: Path) -> str:
    """In plain trainings: those that the row names, or the run's own without hypersteps."""
    if row.plain is None:
        return f"{statistics.mean(run.cost for run in runs):.2f}"
    plain = finished(root, row.plain)
    return f"{seconds(runs) / seconds(plain):.2f}" if plain else ""


def seconds(runs: Sequence[Run]) -> float:
    return statistics.mean(run.seconds for run in runs)


def written(values: Sequence[float], form: str) -> str:
    """The mean, with its standard error where there are several values."""
    mean, error = mean_error(values)
    return form.format(mean) + ("" if error is None else f" ± {form.format(error)}")


def markdown(table: Table, root: Path) -> str:
    """The table as Markdown."""
    head = ["", "paper", *table.columns, "hypersteps", "trainings", "seconds"]
    lines = [head, ["---"] * len(head), *(cells(row, table, root) for row in table.rows)]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


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
