"""Compare hoptim with the tuners people use (Optuna, random search) and with good fixed values: test loss against budget.

    python scripts/studies/tuners/run.py --data ~/data --budget 32       # run what runs/tuners lacks; tables and pictures
    python scripts/studies/tuners/run.py --sets fashion --counts 100 --seeds 0 1 2
    python scripts/studies/tuners/run.py --saved                         # the tables of the page; nothing runs

A budget is a number of plain trainings of the same model, counted in training gradients or in processor seconds. All methods
begin at the same values, have the same examples, and return the model with the lowest validation loss. The data are
boston/boston.csv, text/moby_dick.txt, and Fashion-MNIST, which is downloaded. Optuna is the extra `tuners`: pip install
'.[tuners]'.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import standard_error
from common.search import check_optuna
from common.study import Row, Study
from common.tables import markdown
from studies.tuners.methods import FIXED, METHODS, Meter, fixed_values, loss_of, trial
from studies.tuners.problems import COUNTS, SETS, Problem

NAMES = (FIXED, *METHODS)
BUDGETS = (1, 2, 4, 8, 16, 32, 64)


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each data set, number of hyperparameters and method, seed by seed."""
    if {"optuna", "gp"} & set(options.methods):
        check_optuna("--methods fixed random hoptim")
    for seed in options.seeds:
        cells = [(name, count) for name in options.sets for count in options.counts]
        yield from (
            {"set": name, "count": count, "method": method, "seed": seed, "budget": options.budget}
            for name, count in cells
            for method in options.methods
        )


def run(root: Path, set: str, count: int, method: str, seed: int, budget: int) -> Iterator[dict[str, Any]]:
    """Run a method until its budget is spent. It does not see the test loss, and is not charged for it.

    ``points`` has, for each new best model, plain trainings and seconds spent until then, validation loss and test loss; the
    first point is the training with the starting values, with which every budget begins. ``spent`` has plain trainings and
    seconds at the last result within the budget, ``dropped`` how many trials were pruned, or how many hypersteps failed.
    """
    problem = Problem.of(set, count, seed, root)
    meter, ignored = Meter(problem), Meter(problem)
    trial(problem, problem.hparams(), ignored)  # so that nobody pays for what torch loads at first
    begun = time.process_time()
    last, val = trial(problem, fixed_values(problem) if method == FIXED else problem.hparams(), meter)
    unit = time.process_time() - begun
    points, spent, found = [[1.0, unit, val, loss_of(problem, last, problem.test, ignored)]], [1.0, unit], []
    last, results = None, iter(()) if method == FIXED else METHODS[method](problem, Meter(problem))
    seconds = 0.0
    while True:
        begun = time.process_time()
        one = next(results, None)
        seconds += time.process_time() - begun
        if one is None or one.trainings > budget + 1e-9:
            break
        found.append(one.dropped)
        spent = [one.trainings, seconds]
        if one.model is not last:
            points.append([*spent, one.val, loss_of(problem, one.model, problem.test, ignored)])
            last = one.model
    yield {
        "points": [[float(f"{value:.5g}") for value in point] for point in points],
        "spent": [round(value, 2) for value in spent], "results": len(found), "dropped": sum(found),
    }  # fmt: skip


def by_budget(rows: Iterable[Row]) -> list[Curves]:
    """The curves of each budget that methods were given, those with the most rows first."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        found.setdefault(row["budget"], []).append(row)
    return [Curves(own, budget) for budget, own in sorted(found.items(), key=lambda pair: -len(pair[1]))]


class Curves:
    """The rows of one budget, looked up by data set, number of hyperparameters, method and seed."""

    def __init__(self, rows: Iterable[Row], budget: int) -> None:
        self.rows = {(r["set"], r["count"], r["method"], r["seed"]): r for r in rows}
        self.budgets = [smaller for smaller in BUDGETS if smaller <= budget]

    def seeds(self, name: str, count: int, *methods: str) -> list[int]:
        """The seeds that all these methods ran on."""
        own = [{seed for (n, c, m, seed) in self.rows if (n, c, m) == (name, count, method)} for method in methods]
        return sorted(set.intersection(*own))

    def cells(self, *methods: str) -> list[tuple[str, int]]:
        """The data sets and numbers of hyperparameters for which all these methods ran."""
        return [(name, count) for name in SETS for count in COUNTS if self.seeds(name, count, *methods)]

    def unit(self, name: str, count: int) -> float:
        """Seconds of a plain training: the median over all rows."""
        times = [row["points"][0][1] for (n, c, *_), row in self.rows.items() if (n, c) == (name, count)]
        return sorted(times)[len(times) // 2]

    def losses(self, name: str, count: int, method: str, budget: float, in_seconds: bool = False) -> dict[int, float]:
        """The test loss, on each seed, of the model that the method returns at this budget: its last result within it.

        Before its first result, it is the test loss of a training with the starting values. A budget in seconds is that many
        times the median seconds of a plain training.
        """
        spent, left = (1, budget * self.unit(name, count)) if in_seconds else (0, budget)
        found = {}
        for seed in self.seeds(name, count, method):
            first, *points = self.rows[name, count, method, seed]["points"]
            found[seed] = next((point[3] for point in reversed(points) if point[spent] <= left + 1e-9), first[3])
        return found

    def ratios(self, name: str, count: int, first: str, second: str, budget: float, in_seconds: bool = False) -> list[float]:
        """log(test loss of the first method / of the second) on each seed; below zero the first is better."""
        a, b = (self.losses(name, count, method, budget, in_seconds) for method in (first, second))
        return [math.log(a[seed] / b[seed]) for seed in sorted(a.keys() & b.keys())]


def is_clear(logs: Sequence[float]) -> bool:
    """Whether the mean is two standard errors away from zero."""
    return len(logs) > 1 and abs(mean(logs)) > 2 * standard_error(logs)


def percent(logs: Sequence[float]) -> str:
    """A mean log ratio and its standard error in per cent, with a star if it is two standard errors from zero."""
    shown = f"{100 * mean(logs):.1f} ± {100 * standard_error(logs):.1f}".replace("-", "−")
    return f"{shown} *" if is_clear(logs) else shown


def show(rows: Sequence[Row]) -> Iterator[str]:
    """The tables of each budget."""
    for curves in by_budget(rows):
        yield from show_one(curves)


def show_one(curves: Curves) -> Iterator[str]:
    """The test losses after the whole budget, hoptim against each other method, and the seconds of a counted training."""
    methods, last = [m for m in NAMES if curves.cells(m)], curves.budgets[-1]
    lines, costs = [], []
    for name, count in curves.cells(*methods):
        means = [mean(curves.losses(name, count, m, last).values()) for m in methods]
        untuned = mean(curves.losses(name, count, methods[-1], 1).values())
        lines.append([SETS[name].title, f"{count:,}", *(f"{loss:.3f}" for loss in (untuned, *means))])
        for method in methods[methods[0] == FIXED :]:
            own = [curves.rows[name, count, method, seed] for seed in curves.seeds(name, count, method)]
            trainings, seconds = (sum(row["spent"][place] for row in own) for place in (0, 1))
            costs.append((method, seconds / curves.unit(name, count) / trainings))
    yield markdown([f"test loss at {last} trainings", "", "untuned", *methods], lines)
    compared = [("optuna", False), ("gp", False), ("random", False), (FIXED, False), ("optuna", True), ("gp", True)]
    for other, in_seconds in compared if "hoptim" in methods else ():
        lines = []
        for cell in curves.cells("hoptim", other):
            logs = [curves.ratios(*cell, "hoptim", other, budget, in_seconds) for budget in curves.budgets[1:]]
            lines.append([SETS[cell[0]].title, f"{cell[1]:,}", *map(percent, logs)])
        title = f"hoptim against {other}{', seconds' * in_seconds}, %"
        yield markdown([title, "", *map(str, curves.budgets[1:])], lines)
    dear = {m: median(cost for method, cost in costs if method == m) for m in methods if m != FIXED}
    yield "seconds of a counted training, in plain ones: " + ", ".join(f"{m} {value:.2f}" for m, value in dear.items())


STYLES: dict[str, tuple[str, str, Any, float]] = {  # label, colour, dashes, width
    FIXED: ("good fixed values", "#222222", (0, (4, 2)), 1.2),
    "random": ("random search", "#8a8f98", "solid", 1.4),
    "optuna": ("Optuna, TPE", "#d9722b", "solid", 2.0),
    "gp": ("Optuna, GP", "#c9a227", "solid", 1.6),
    "hoptim": ("hoptim", "#1f5fb4", "solid", 2.4),
}
TITLES = dict(zip(COUNTS, ("1 hyperparameter", "3", "9 or 10", "60 to 97, one a unit", "10,000, one a weight"), strict=True))


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Test loss against budget: a row for each data set, a column for each number of hyperparameters."""
    from common.pictures import plt, save

    curves = by_budget(rows)[0]
    names = [name for name in SETS if any(curves.seeds(name, count, "hoptim") for count in COUNTS)]
    for file, in_seconds in (("tuners.png", False), ("seconds.png", True)):
        shape = {"nrows": max(1, len(names)), "ncols": len(COUNTS)}
        size = (13.5, 2.6 * shape["nrows"] + 0.9)
        figure, axes = plt.subplots(**shape, figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained")
        for name, row in zip(names, axes, strict=False):
            for count, axis in zip(COUNTS, row, strict=True):
                _panel(axis, curves, name, count, in_seconds)
                axis.set_title(TITLES[count] if name == names[0] else "", fontsize=11)
            row[0].set_ylabel(f"{SETS[name].title}\ntest loss against untuned, %")
        handles = axes[0][0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right center", frameon=False)
        unit = "processor seconds" if in_seconds else "training gradients"
        figure.supxlabel(
            f"budget in plain trainings, by {unit}; lines are means, bands standard errors of the paired differences, and\n"
            "bars below mark where hoptim is ahead of both TPE and GP (blue), or behind one (orange), by two errors",
            fontsize=9.5,
        )
        save(figure, folder / file, dpi=85)
    draw_by_budget(curves, folder / "by_budget.png")


def draw_by_budget(curves: Curves, path: Path, name: str = "fashion", counts: tuple[int, ...] = (1, 10_000)) -> None:
    """The README's picture: the test losses themselves, on one data set, with few hyperparameters and with many."""
    from common.pictures import plt, save

    shown, grid = [method for method in STYLES if method != "random"], np.geomspace(1, curves.budgets[-1], 49)
    if not all(curves.seeds(name, count, *shown) for count in counts):
        return
    figure, axes = plt.subplots(1, len(counts), figsize=(9.2, 3.4), sharey=True, layout="constrained")
    for count, axis, title in zip(counts, axes, ("One weight decay", "A weight decay for each weight"), strict=True):
        for method in shown:
            label, colour, dashes, width = STYLES[method]
            found = [list(curves.losses(name, count, method, budget).values()) for budget in grid]
            middle, error = np.array(list(map(mean, found))), np.array(list(map(standard_error, found)))
            axis.plot(grid, middle, color=colour, linestyle=dashes, linewidth=width, drawstyle="steps-post", label=label)
            axis.fill_between(grid, middle - error, middle + error, color=colour, alpha=0.12, linewidth=0, step="post")
        _budgets(axis, curves)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("cost, in trainings")
    axes[0].set_ylabel("test loss")
    axes[-1].legend(frameon=False, fontsize=9)
    save(figure, path)


def _budgets(axis: Any, curves: Curves) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(curves.budgets, list(map(str, curves.budgets)))
    axis.set_xlim(1, 1.04 * curves.budgets[-1])
    axis.grid(axis="y", alpha=0.2)


def _panel(axis: Any, curves: Curves, name: str, count: int, in_seconds: bool) -> None:
    grid = np.geomspace(1, curves.budgets[-1], 49)
    for method, (label, colour, dashes, width) in STYLES.items():
        if not curves.seeds(name, count, method):
            continue
        start = curves.losses(name, count, "hoptim" if curves.seeds(name, count, "hoptim") else method, 1)
        found = []
        for budget in grid:
            now = curves.losses(name, count, method, budget, in_seconds)
            found.append([100 * math.log(now[seed] / start[seed]) for seed in sorted(now.keys() & start.keys())])
        middle, error = np.array([mean(logs) for logs in found]), np.array([standard_error(logs) for logs in found])
        axis.plot(grid, middle, color=colour, linestyle=dashes, linewidth=width, drawstyle="steps-post", label=label)
        axis.fill_between(grid, middle - error, middle + error, color=colour, alpha=0.12, linewidth=0, step="post")
    others = [method for method in ("optuna", "gp") if curves.seeds(name, count, "hoptim", method)]
    for left, right in pairwise(grid):
        found = [curves.ratios(name, count, "hoptim", other, left, in_seconds) for other in others]
        behind = any(is_clear(logs) and mean(logs) > 0 for logs in found)
        if behind or (found and all(is_clear(logs) and mean(logs) < 0 for logs in found)):
            colour = STYLES["optuna" if behind else "hoptim"][1]
            axis.axvspan(left, right, ymin=0, ymax=0.035, color=colour, alpha=0.85, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    _budgets(axis, curves)


def chosen(names: Sequence[Any], kind: type = str) -> dict[str, Any]:
    return {"nargs": "+", "type": kind, "choices": list(names), "default": list(names), "help": "default: all"}


if __name__ == "__main__":
    Study(
        file=__file__, seeds=range(10), jobs=jobs, run=run, show=show, draw=draw,
        more={
            "sets": chosen(SETS), "counts": chosen(COUNTS, int), "methods": chosen(NAMES),
            "budget": {"type": int, "choices": BUDGETS[1:], "default": 16, "help": "in plain trainings; default 16"},
        },
    ).main(__doc__)  # fmt: skip
