"""Curves from the rows: the test loss that a method reaches within a budget, and the differences between methods."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import NamedTuple

from common.means import standard_error

from tuner_study.runs import Row

BUDGETS = (1, 2, 4, 8, 16, 32, 64)


class Estimate(NamedTuple):
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    @property
    def is_clear(self) -> bool:
        """Whether it is two standard errors away from zero."""
        return abs(self.mean) > 2 * self.error


def at_budget(row: Row, budget: float, unit: float | None = None) -> float:
    """The test loss of the model that the method returns at this budget: its last result within the budget.

    Before its first result, it is the test loss of a training with the starting values.

    Args:
        row: a method on a problem and a seed.
        budget: in plain trainings.
        unit: the seconds of a plain training, for a budget in seconds; ``None`` for a budget in training gradients.
    """
    spent, left = (0, budget) if unit is None else (1, budget * unit)
    return next((point[3] for point in reversed(row.points[1:]) if point[spent] <= left + 1e-9), row.points[0][3])


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error, NaN for a single value."""
    return Estimate(mean(values), standard_error(values))


class Curves:
    """The rows, looked up by data set, number of hyperparameters, method and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {row.key: row for row in rows}
        self.budgets = [b for b in BUDGETS if b <= min((row.budget for row in self.rows.values()), default=1)]
        self._seeds: dict[tuple[str, int, str], set[int]] = {}
        seconds: dict[tuple[str, int], list[float]] = {}
        for (name, count, method, seed), row in self.rows.items():
            self._seeds.setdefault((name, count, method), set()).add(seed)
            seconds.setdefault((name, count), []).append(row.points[0][1])
        self._units = {cell: sorted(each)[len(each) // 2] for cell, each in seconds.items()}

    def seeds(self, name: str, count: int, *methods: str) -> list[int]:
        """The seeds that all these methods ran on."""
        found = [self._seeds.get((name, count, method), set()) for method in methods]
        return sorted(set.intersection(*found)) if found else []

    def unit(self, name: str, count: int) -> float:
        """Seconds of a plain training: the median over the rows."""
        return self._units[name, count]

    def losses(self, name: str, count: int, method: str, budget: float, in_seconds: bool = False) -> dict[int, float]:
        """The test loss on each seed."""
        unit = self.unit(name, count) if in_seconds else None
        seeds = self.seeds(name, count, method)
        return {seed: at_budget(self.rows[name, count, method, seed], budget, unit) for seed in seeds}

    def difference(
        self, name: str, count: int, first: str, second: str, budget: float, in_seconds: bool = False
    ) -> Estimate:
        """log(test loss of the first method / of the second), paired by seed; below zero the first is better."""
        a, b = (self.losses(name, count, method, budget, in_seconds) for method in (first, second))
        return estimate([math.log(a[seed] / b[seed]) for seed in sorted(a.keys() & b.keys())])

    def winners(self, name: str, count: int, first: str, second: str, in_seconds: bool = False) -> dict[int, str]:
        """For each budget the method that is ahead by two standard errors; an empty string where neither is."""
        found = {}
        for budget in self.budgets:
            difference = self.difference(name, count, first, second, budget, in_seconds)
            found[budget] = (first if difference.mean < 0 else second) if difference.is_clear else ""
        return found
