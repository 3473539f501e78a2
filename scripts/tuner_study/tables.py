"""The tables of the study."""

from __future__ import annotations

from collections.abc import Iterator

from common import tables
from rich.table import Table

from tuner_study.curves import Curves, Estimate, estimate
from tuner_study.methods import FIXED
from tuner_study.problems import COUNTS, SETS


def percent(found: Estimate) -> str:
    """A mean log ratio and its standard error in per cent, with a star if it is two standard errors from zero.

    >>> percent(Estimate(-0.105, 0.02)), percent(Estimate(0.02, 0.03))
    ('−10.5 ± 2.0 *', '2.0 ± 3.0')
    """
    shown = f"{100 * found.mean:.1f} ± {100 * found.error:.1f}".replace("-", "−")
    return f"{shown} *" if found.is_clear else shown


def loss(found: Estimate) -> str:
    return f"{found.mean:.3f} ± {found.error:.3f}"


def of(curves: Curves) -> Iterator[Table]:
    """All tables."""
    yield losses(curves, curves.budgets[-1])
    for second in ("optuna", "gp", "random", FIXED):
        yield against(curves, "hoptim", second, in_seconds=False)
    for second in ("optuna", "gp"):
        yield against(curves, "hoptim", second, in_seconds=True)
    yield counts(curves)


def _table(title: str, *columns: str) -> Table:
    return tables.table(title, "data set", "hyperparameters", *columns)


def cells(curves: Curves, *methods: str) -> list[tuple[str, int]]:
    """The data sets and numbers of hyperparameters for which all these methods ran."""
    return [(name, count) for name in SETS for count in COUNTS if curves.seeds(name, count, *methods)]


def losses(curves: Curves, budget: float) -> Table:
    """The test loss of each method after a budget; a budget of 1 is the training with the starting values."""
    methods = [m for m in (FIXED, "random", "optuna", "gp", "hoptim") if cells(curves, m)]
    found = _table(f"test loss at a budget of {budget} trainings", "untuned", *methods, "seeds")
    for name, count in cells(curves, *methods):
        row = [loss(estimate(list(curves.losses(name, count, methods[-1], 1).values())))]
        row += [loss(estimate(list(curves.losses(name, count, m, budget).values()))) for m in methods]
        found.add_row(SETS[name].title, f"{count:,}", *row, str(len(curves.seeds(name, count, *methods))))
    return found


def against(curves: Curves, first: str, second: str, *, in_seconds: bool) -> Table:
    """How much lower or higher the first method's test loss is than the second's, in per cent, at each budget."""
    what = "processor seconds" if in_seconds else "training gradients"
    budgets = curves.budgets[1:]
    columns = [str(budget) for budget in budgets]
    found = _table(f"{first} against {second}, % of the test loss, at budgets of plain trainings in {what}", *columns)
    for name, count in cells(curves, first, second):
        differences = [curves.difference(name, count, first, second, b, in_seconds) for b in budgets]
        found.add_row(SETS[name].title, f"{count:,}", *map(percent, differences))
    return found


def counts(curves: Curves) -> Table:
    """How many results, pruned trials and failed hypersteps there were, and the seconds of a counted training."""
    methods = [m for m in ("random", "optuna", "gp", "hoptim") if cells(curves, m)]
    columns = [f"{method}: {what}" for method in methods for what in ("results", "dropped", "seconds/counted")]
    found = _table("results within the budget, those pruned or failed hypersteps, seconds over counted trainings", *columns)
    for name, count in cells(curves, *methods):
        row, unit = [], curves.unit(name, count)
        for method in methods:
            rows = [curves.rows[name, count, method, seed] for seed in curves.seeds(name, count, method)]
            trainings, seconds = (sum(one.spent[place] for one in rows) for place in (0, 1))
            row += [
                f"{sum(one.results for one in rows) / len(rows):.1f}",
                f"{sum(one.dropped for one in rows) / len(rows):.1f}",
            ]
            row.append(f"{seconds / unit / trainings:.2f}")
        found.add_row(SETS[name].title, f"{count:,}", *row)
    return found
