"""One method on one problem until its budget is spent, and the test losses of what it handed out on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fidelity import write

from tuner_study.costs import Meter, loss_of, trial
from tuner_study.methods import FIXED, METHODS, Found, Method, fixed_values
from tuner_study.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on a problem.

    Attributes:
        set: the name of the data set.
        count: the number of hyperparameters, roughly.
        method: its name.
        seed: of the split, the weights, the batches and the search.
        budget: the plain trainings that it had.
        points: of each model that was handed out: plain trainings and seconds spent until then, its validation loss and its
            test loss. The first is the training with the starting values, with which every budget begins.
        spent: plain trainings and seconds when the last result within the budget came.
        results: how many results there were, or trials.
        dropped: how many of them were pruned, or hypersteps that failed.
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
        """What it is a row of."""
        return self.set, self.count, self.method, self.seed


def within(results: Iterator[Found], most: float) -> tuple[list[Found], list[float]]:
    """The results within the budget, and the processor time until each; not what comes later."""
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
    """All of one row. The test loss is known to nobody and charged to nobody."""
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
    """The rows of a file, none where it is not there."""
    if not path.is_file():
        return []
    saved = json.loads(path.read_text())
    return [Row(**dict(zip(saved["columns"], values, strict=True))) for values in saved["records"]]


def save(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows in one go, so that a kill leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    ordered = sorted(rows, key=lambda row: row.key)
    write(partial, [asdict(row) for row in ordered], torch=torch.__version__)
    partial.replace(path)
