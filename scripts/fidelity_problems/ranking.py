"""Summaries of the rows: medians over seeds, and rankings of the methods within a budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from fidelity_problems.measure import Row

Figures = dict[str, Any]
SAMPLES = 1000  # of the bootstrap
CHANGED = 0.01  # smaller changes of a cosine are not listed


@dataclass(frozen=True, kw_only=True)
class Rank:
    """The results of a method over all problems, ranked among those within the same budget.

    Attributes:
        method: its name.
        median: the median over problems of the median cosine over seeds.
        mean: the mean over problems of the same.
        low: the fifth percentile of ``mean`` over bootstrap samples of the seeds.
        high: the 95th.
        first: the share of bootstrap samples in which no method within the budget has a higher mean.
        rank: its mean rank over problems.
        worst: the lowest median cosine of any problem.
        worst_problem: which problem that is.
        worst_seed: the lowest cosine of all.
        longest: the largest length over the true length: how many times too long a step of the hyperparameters may be.
        failed: the share of solves that failed.
        cost: the median over problems of the median cost, in training gradients.
        dearest: the highest median cost of any problem.
    """

    method: str
    median: float
    mean: float
    low: float
    high: float
    first: float
    rank: float
    worst: float
    worst_problem: str
    worst_seed: float
    longest: float
    failed: float
    cost: float
    dearest: float


def summed_up(rows: Iterable[Row]) -> list[Figures]:
    """One record for each problem and method: medians, quartiles and the worst seed."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.problem, row.method].append(row)
    found = []
    for (problem, method), group in groups.items():
        cosines = [row.cosine for row in group]
        low, middle, high = np.percentile(cosines, (25, 50, 75)).tolist()
        figures = {"cosine": middle, "low": low, "high": high, "worst": min(cosines)}
        figures |= {key: median(getattr(row, key) for row in group) for key in ("length", "cost", "products")}
        figures |= {"failed": sum(not row.ok for row in group), "seeds": len(group)}
        found.append({"problem": problem, "method": method} | {key: round(value, 3) for key, value in figures.items()})
    return found


def ranked(rows: Sequence[Row], budget: float, eligible: Callable[[str], bool] = bool) -> list[Rank]:
    """The methods whose median cost over problems is at most ``budget``, ordered by their mean of median cosines.

    Only methods that ran on every problem are compared. The bootstrap resamples the seeds of each problem, in the same way
    for all methods.
    """
    table: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        table[row.method][row.problem][row.seed] = row
    problems = sorted({row.problem for row in rows})
    names = [m for m in table if eligible(m) and len(table[m]) == len(problems) and _cost(table[m])[0] <= budget]
    if not names:
        return []
    seeds = {p: sorted(set.intersection(*(set(table[m][p]) for m in names))) for p in problems}
    cosines = {p: np.array([[table[m][p][s].cosine for s in seeds[p]] for m in names]) for p in problems}
    medians = np.stack([np.median(cosines[p], axis=1) for p in problems], axis=1)
    means = _resampled(cosines)
    first = (means >= means.max(0)).mean(1)
    ranks = _ranks(medians)
    low, high = np.percentile(means, (5, 95), axis=1)
    found = []
    for i, name in enumerate(names):
        cost, dearest = _cost(table[name])
        every = [row for group in table[name].values() for row in group.values()]
        lowest = int(medians[i].argmin())
        one = Rank(
            method=name,
            median=float(np.median(medians[i])),
            mean=float(medians[i].mean()),
            low=float(low[i]),
            high=float(high[i]),
            first=float(first[i]),
            rank=float(ranks[i].mean()),
            worst=float(medians[i, lowest]),
            worst_problem=problems[lowest],
            worst_seed=min(row.cosine for row in every),
            longest=max(row.length for row in every),
            failed=sum(not row.ok for row in every) / len(every),
            cost=cost,
            dearest=dearest,
        )
        found.append(one)
    return sorted(found, key=lambda one: -one.mean)


def _cost(group: Mapping[str, Mapping[int, Row]]) -> tuple[float, float]:
    costs = [median(row.cost for row in by_seed.values()) for by_seed in group.values()]
    return median(costs), max(costs)


def _resampled(cosines: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean over problems of the median over resampled seeds: a row for each method, a column for each sample."""
    generator, total = np.random.default_rng(0), 0.0
    for values in cosines.values():
        drawn = generator.integers(values.shape[1], size=(SAMPLES, values.shape[1]))
        total = total + np.median(values[:, drawn], axis=2)
    return np.asarray(total) / len(cosines)


def _ranks(medians: np.ndarray) -> np.ndarray:
    """Ranks within each column, 1 for the highest; ties get the mean of their ranks."""
    above = (medians[None] > medians[:, None]).sum(1)
    equal = (medians[None] == medians[:, None]).sum(1)
    return above + (equal + 1) / 2


def differences(now: Sequence[Figures], before: Sequence[Figures]) -> list[Figures]:
    """The records whose median cosine or number of failures differs from those saved before, largest change first."""
    old = {(one["problem"], one["method"]): one for one in before}
    changed = []
    for one in now:
        was = old.get((one["problem"], one["method"]))
        if was is not None and (abs(one["cosine"] - was["cosine"]) >= CHANGED or one["failed"] != was["failed"]):
            changed.append({**one, "before": was["cosine"], "change": one["cosine"] - was["cosine"]})
    return sorted(changed, key=lambda one: -abs(one["change"]))


def merged(old: Iterable[Row], new: Sequence[Row]) -> list[Row]:
    """The new rows, and the old rows that none of them replaces."""
    fresh = {(row.problem, row.method, row.seed) for row in new}
    return [*(row for row in old if (row.problem, row.method, row.seed) not in fresh), *new]
