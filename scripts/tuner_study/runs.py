"""One method on one problem until its budget is spent, and the test losses of what it handed out on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fidelity import write
from torch import nn

from tuner_study.costs import Meter, loss_of, train
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
        points: of each result that was handed out: plain trainings and seconds spent until then, in which the training of
            the model that is handed out is not included; the validation loss; the test loss of that model.
        spent: plain trainings and seconds when the last result within the budget came.
        final: seconds of one training of a model that is handed out.
        results: how many results there were, or trials.
        dropped: how many of them were pruned, or hypersteps that failed.
    """

    set: str
    count: int
    method: str
    seed: int
    points: list[list[float]]
    spent: list[float]
    final: float
    results: int
    dropped: int

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What it is a row of."""
        return self.set, self.count, self.method, self.seed


def within(results: Iterator[Found], most: float) -> tuple[list[Found], list[float]]:
    """The results that leave one training of the budget, and the processor time until each; not what comes later."""
    found, seconds, total = [], [], 0.0
    while True:
        begun = time.process_time()
        one = next(results, None)
        total += time.process_time() - begun
        if one is None or one.trainings + 1 > most + 1e-9:
            return found, seconds
        found.append(one)
        seconds.append(total)


def run(problem: Problem, name: str, most: int, method: Method | None = None) -> Row:
    """All of one row. Of results in a row with the same hyperparameters the first counts: they hand out the same model."""
    finals: list[float] = []

    def tested(hparams: nn.Module) -> float:
        begun = time.process_time()
        ignored = Meter(problem)
        model = train(problem, hparams, problem.everything, ignored)
        finals.append(time.process_time() - begun)
        return loss_of(problem, model, problem.test, ignored)

    start = fixed_values(problem) if name == FIXED else problem.hparams()
    points = [[0.0, 0.0, 0.0, tested(start)]]
    found, seconds, last = [], [], None
    if name != FIXED:
        found, seconds = within((method or METHODS[name])(problem, Meter(problem)), most)
    for one, spent in zip(found, seconds, strict=True):
        if one.hparams is not last:
            points.append([one.trainings, spent, one.val, tested(one.hparams)])
        last = one.hparams
    return Row(
        set=problem.name, count=problem.count, method=name, seed=problem.seed,
        points=[[float(f"{value:.5g}") for value in point] for point in points],
        spent=[round(found[-1].trainings, 2), round(seconds[-1], 2)] if found else [0.0, 0.0],
        final=round(sorted(finals)[len(finals) // 2], 4), results=len(found), dropped=sum(one.dropped for one in found),
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
