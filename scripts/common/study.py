"""What every study does: it runs what has no row yet, keeps the rows, shows them in tables, and draws a picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.records import five_digits, read_records, write_records

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in a folder of its own, with README.md, rows.json and pictures.

    Attributes:
        file: its run.py.
        seeds: that its page shows.
        jobs: ``jobs(options)`` has the columns by which a row is found again, such as the seed, for each job.
        run: ``run(root, **job)`` has the figures of each row that the job makes, with the data in the folder ``root``.
        show: ``show(rows)`` returns the tables.
        draw: ``draw(rows, folder)`` draws the pictures.
        more: further options of the command, by name, with those of ``add_argument``.
    """

    file: str
    seeds: Sequence[int]
    jobs: Callable[[argparse.Namespace], Iterable[Row]]
    run: Callable[..., Iterable[Mapping[str, Any]]]
    show: Callable[[Sequence[Row]], Iterable[str]]
    draw: Callable[[Sequence[Row], Path], None] | None = None
    more: Mapping[str, Mapping[str, Any]] | None = None

    @property
    def folder(self) -> Path:
        """Where its page is."""
        return Path(self.file).resolve().parent

    def main(self, doc: str) -> None:
        """Read the options, run what has no row yet, print the tables, and draw the pictures."""
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        out, own = Path("runs", self.folder.name), self.folder
        parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
        parser.add_argument("--out", type=Path, default=out, help=f"the folder of rows and pictures; default: {out}")
        parser.add_argument("--seeds", nargs="+", type=int, default=list(self.seeds), help="default: those of the page")
        parser.add_argument("--saved", action="store_true", help="run nothing: print the tables of the rows of the page")
        for name, words in (self.more or {}).items():
            parser.add_argument(f"--{name}", **words)
        given = parser.parse_args()
        torch.set_num_threads(1)  # more are slower for so small models
        path = (own if given.saved else given.out) / "rows.json"
        rows = read_records(path)
        if not given.saved:
            rows = kept(path, self.jobs(given), lambda job: self.run(given.data, **job))
        print(*self.show(rows), sep="\n\n")
        if self.draw is not None and not given.saved:
            self.draw(rows, given.out)
            print(f"-> {given.out}")


def kept(path: Path, jobs: Iterable[Row], run: Callable[[Row], Iterable[Mapping[str, Any]]]) -> list[Row]:
    """Run the jobs that the file has no row of, and return all of its rows; it is written after each job.

    Floats are kept with five digits.
    """
    rows = read_records(path)
    for job in jobs:
        (key,) = five_digits([job])
        if not any(key.items() <= row.items() for row in rows):
            begun = time.perf_counter()
            rows += five_digits({**job, **figures} for figures in run(job))
            write_records(path, rows, torch=torch.__version__)
            print(", ".join(map(str, job.values())), f"{time.perf_counter() - begun:.1f} s", flush=True)
    return rows


def by_seed(rows: Iterable[Row], figure: str, **where: Any) -> dict[int, float]:
    """A figure for each seed, of the rows that have these values; the lowest, if there are several.

    >>> by_seed([{"seed": 0, "way": "a", "test": 2.0}, {"seed": 0, "way": "a", "test": 1.0}], "test", way="a")
    {0: 1.0}
    """
    found: dict[int, float] = {}
    for row in rows:
        seed = row["seed"]
        if all(row[name] == value for name, value in where.items()) and (seed not in found or row[figure] < found[seed]):
            found[seed] = row[figure]
    return found


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> list[float]:
    """first − second, for each seed that both have."""
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
