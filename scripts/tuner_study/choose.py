"""Choose what the study keeps fixed, on splits that it does not score: good fixed values, and hoptim's outer rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from tuner_study.costs import Meter, loss_of, train
from tuner_study.curves import at_budget
from tuner_study.methods import at, learned
from tuner_study.problems import COUNTS, Problem
from tuner_study.runs import run

SEEDS = (100, 101)
DECAYS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEVELS = (0.05, 0.3)
BUDGETS = (4, 8, 16)
SINGLE = (3.0, 6.0, 9.0)


def good_values(name: str, count: int, root: Path) -> tuple[dict[str, float], float]:
    """The values of a grid that have the lowest mean test loss on the seeds, and that loss."""
    levels = LEVELS if count in (3, 10) else LEVELS[:1]
    grid = [{"decay": d, "noise": n, "dropout": p} for d, n, p in product(DECAYS, levels, levels)]

    def score(values: dict[str, float]) -> float:
        losses = []
        for seed in SEEDS:
            problem = Problem(name, count, seed, root)
            meter = Meter(problem)
            losses.append(loss_of(problem, train(problem, at(problem, values), problem.train, meter), problem.test, meter))
        return mean(losses)

    scores = [score(values) for values in grid]
    best = scores.index(min(scores))
    return grid[best], scores[best]


def choose(names: Sequence[str], root: Path) -> None:
    """Print the good fixed values, and then how each of hoptim's settings changes the test loss."""
    for name in names:
        for count in COUNTS[:3]:
            values, loss = good_values(name, count, root)
            print(f"{name} {count}: {values} test loss {loss:.4f}", flush=True)
    gains: dict[float, list[float]] = {}
    for name, count, single in product(names, COUNTS, SINGLE):
        method = partial(learned, single=single)
        rows = [run(Problem(name, count, seed, root), "hoptim", BUDGETS[-1], method) for seed in SEEDS]
        found = [mean(math.log(at_budget(row, budget) / row.points[0][3]) for row in rows) for budget in BUDGETS]
        gains.setdefault(single, []).extend(found)
        shown = ", ".join(f"{100 * gain:.1f}" for gain in found)
        print(f"{name} {count}, single {single}: {shown} % at {BUDGETS}", flush=True)
    for single, found in gains.items():
        print(f"single {single}: {100 * mean(found):.2f} % on average")
