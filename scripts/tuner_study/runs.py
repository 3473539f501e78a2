"""Run one method on one problem until its budget is spent, and test its results."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common.records import read_records, write_records

from tuner_study.costs import Meter, loss_of, trial
from tuner_study.methods import FIXED, METHODS, Found, Method, fixed_values
from tuner_study.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on a problem.

    Attributes:
        set: the name of the data set.
        count: the number of hyperparameters, roughly.
        method: the name of the method.
        seed: of the split, the weights, the batches and the search.
        budget: in plain trainings.
        points: for each new best model: plain trainings and seconds spent until then, validation loss and test loss. The
            first point is the training with the starting values, with which every budget begins.
        spent: plain trainings and seconds at the last result within the budget.
        results: how many results, or trials, there were.
        dropped: how many trials were pruned, or how many hypersteps failed.
    """

    set: str
    count: int
    method: str
    seed: int
    budget: int
    points: list[list[float]]
    spent: list[float]
    results: int
    dropped: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What identifies the row: data set, number of hyperparameters, method and seed."""
        return self.set, self.count, self.method, self.seed


def within(results: Iterator[Found], most: float) -> tuple[list[Found], list[float]]:
    """The results within the budget, and the processor time until each of them."""
    found, seconds, total = [], [], 0.0
    while True:
        begun = time.process_time()
        one = next(results, None)
        total += time.process_time() - begun
        if one is None or one.trainings > most + 1e-9:
            return found, seconds
        found.append(one)
        seconds.append(total)


def run(problem: Problem, name: str, most: int, method: Method | None = None) -> Row:
    """Make one row. No method sees the test loss, and none is charged for it."""
    meter, begun = Meter(problem), time.process_time()
    first, val = trial(problem, fixed_values(problem) if name == FIXED else problem.hparams(), meter)
    unit, ignored = time.process_time() - begun, Meter(problem)
    points = [[1.0, unit, val, loss_of(problem, first, problem.test, ignored)]]
    found: list[Found] = []
    seconds: list[float] = []
    if name != FIXED:
        found, seconds = within((method or METHODS[name])(problem, Meter(problem)), most)
    last = None
    for one, spent in zip(found, seconds, strict=True):
        if one.model is not last:
            points.append([one.trainings, spent, one.val, loss_of(problem, one.model, problem.test, ignored)])
        last = one.model
    return Row(
        set=problem.name, count=problem.count, method=name, seed=problem.seed, budget=most,
        points=[[float(f"{value:.5g}") for value in point] for point in points],
        spent=[round(found[-1].trainings, 2), round(seconds[-1], 2)] if found else [1.0, round(unit, 2)],
        results=len(found), dropped=sum(one.dropped for one in found),
    )  # fmt: skip


def read(path: Path) -> list[Row]:
    """The rows of a file; none if there is no such file."""
    return [Row(**record) for record in read_records(path)]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows; a kill leaves the old file or the new one."""
    write_records(path, [asdict(row) for row in sorted(rows, key=lambda row: row.key)], torch=torch.__version__)
