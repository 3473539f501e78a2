"""The tables of the study."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from statistics import mean

from common.means import standard_error
from common.tables import table
from rich.table import Table

from learning_tasks.scores import CHOSEN_ON, Results, half_of, log_ratio
from learning_tasks.settings import BY_CONSTRAINT, DEFAULT, LEVELS, SETTINGS
from learning_tasks.tasks import HALVES, TASKS
from learning_tasks.training import JOINED, PLAIN, Row

HALF_NAMES = ("A", "B", "both")


def percent(log: float) -> str:
    """A log ratio as a change in per cent.

    >>> percent(-0.105), percent(0.02), percent(float("nan"))
    ('−10.0', '2.0', '?')
    """
    return "?" if math.isnan(log) else f"{100 * math.expm1(log):.1f}".replace("-", "−")


def percent_and_error(log: float, error: float) -> str:
    """A mean log ratio and its standard error in per cent; without the error if it is NaN."""
    return percent(log) + ("" if math.isnan(error) else f" ± {100 * error:.1f}")


def of_ratios(ratios: Sequence[float]) -> str:
    """The mean of log ratios and its standard error in per cent."""
    return percent_and_error(mean(ratios), standard_error(ratios)) if ratios else ""


def of_settings(results: Results, names: Sequence[str], seeds: Collection[int] | None) -> Table:
    """A line for each setting: on each half and on both, then median, worst task, wins, skipped hypersteps and cost."""
    columns = (*HALF_NAMES, "median", "worst task", "wins", "skipped", "cost", "seeds")
    found = table("change of the test loss, %", "setting", *columns)
    for name in names:
        by_half = [results.score(name, half_of(half, results.tasks), seeds) for half in HALF_NAMES]
        everywhere = by_half[-1]
        if everywhere is None:
            continue
        found.add_row(
            name,
            *(percent_and_error(one.mean, one.error) if one else "" for one in by_half),
            percent(everywhere.median),
            f"{percent(everywhere.worst)} {everywhere.worst_task}",
            f"{everywhere.wins} of {everywhere.tasks}",
            f"{everywhere.skipped:.1%}" if everywhere.skipped else "0",
            f"{everywhere.cost:.2f}",
            str(everywhere.seeds),
        )
    return found


def held_out(results: Results) -> Table:
    """What each half chooses, scored on the other."""
    found = table(
        "chosen on one half, scored on the other", "chosen on", "setting", "there", "on the other", "worst", "wins"
    )
    for half, other in ("AB", "BA"):
        names = results.chosen(half)
        for name in [*names, *([results.combination(half)] if len(names) > 1 else [])]:
            own, seen = (results.score(name, half_of(h, results.tasks), CHOSEN_ON) for h in (half, other))
            if own is None or seen is None:
                continue
            worst = f"{percent(seen.worst)} {seen.worst_task}"
            shown = [percent_and_error(one.mean, one.error) for one in (own, seen)]
            shown[1] += " *" if seen.wins_clearly else ""
            found.add_row(half, name, *shown, worst, f"{seen.wins} of {seen.tasks}")
    return found


def by_constraint(results: Results) -> Table:
    """The outer optimizers and rates for each kind of constraint: the change of the test loss against the default's."""
    kinds = list(dict.fromkeys(TASKS[name].constraint for name in results.tasks))
    found = table("outer optimizer and rate, by constraint", "setting", *kinds)
    for name, one in SETTINGS.items():
        if one.factor != "outer":
            continue
        cells = []
        for kind in kinds:
            tasks = [task for task in results.tasks if TASKS[task].constraint == kind]
            by_task = {task: results.ratios(task, name, CHOSEN_ON) for task in tasks}
            each = "/".join(f"{100 * math.expm1(mean(r)):.0f}".replace("-", "−") for r in by_task.values() if r)
            cells.append(f"{percent(mean(mean(r) for r in by_task.values() if r))} ({each})" if each else "")
        found.add_row(name, *cells)
    return found


def of_rates(results: Results) -> Table:
    """The rate of Adam that each half chooses for each kind of constraint, scored on its own and on the other's tasks."""
    found = table("chosen for each constraint", "half", "constraint", "setting", "there", "on the other")
    for half, other in ("AB", "BA"):
        for kind, name in results.rates(half).items():
            by_half = [[task for task in half_of(h, results.tasks) if TASKS[task].constraint == kind] for h in (half, other)]
            own, seen = (results.score(name, tasks, CHOSEN_ON) for tasks in by_half)
            found.add_row(half, kind, name, *(percent(one.mean) if one else "" for one in (own, seen)))
        tasks = [task for task in half_of(other, results.tasks) if TASKS[task].constraint in results.rates(half)]
        chosen = results.rates(half)
        ratios = [mean(results.ratios(task, chosen[TASKS[task].constraint], CHOSEN_ON)) for task in tasks]
        if len(ratios) > 1:
            found.add_row(half, "all tasks", "", "", of_ratios(ratios))
    return found


def fresh(results: Results, name: str, seeds: Collection[int]) -> Table:
    """A setting on each task, on seeds that chose nothing: mean over seeds and standard error."""
    found = table(f"{name} on fresh seeds", "task", "constraint", "change of the test loss, %", "seeds")
    for task in results.tasks:
        if ratios := results.ratios(task, name, seeds):
            found.add_row(task, TASKS[task].constraint, of_ratios(ratios), str(len(ratios)))
    for half in HALF_NAMES:
        if score := results.score(name, half_of(half, results.tasks), seeds):
            change = percent_and_error(score.mean, score.error)
            found.add_row(half, f"{score.wins} of {score.tasks} better", change, str(score.seeds))
    return found


def of_levels(results: Results) -> Table:
    """Decays that share levels against the same rates without, on the seeds that chose settings and on others."""
    found = table("levels against rates by constraint, in per cent", "task", "seeds that chose", "others")
    for task in results.tasks:
        seeds = sorted(seed for name, setting, seed in results.rows if (name, setting) == (task, LEVELS))
        pairs = {seed: (results.row(task, LEVELS, seed), results.row(task, BY_CONSTRAINT, seed)) for seed in seeds}
        ratios = {seed: log_ratio(a.test, b.test) for seed, (a, b) in pairs.items() if a is not None and b is not None}
        if ratios:
            parts = ([ratio for seed, ratio in ratios.items() if (seed in CHOSEN_ON) is old] for old in (True, False))
            found.add_row(task, *map(of_ratios, parts))
    return found


def of_tasks(results: Results) -> Table:
    """A line for each task: the plain test loss, and how the others differ from it in per cent, paired by seed."""
    columns: dict[str, Callable[[str, int], Row | None]] = {
        "joined": lambda task, seed: results.row(task, JOINED, seed),
        "best fixed": results.best_fixed,
        "default": lambda task, seed: results.row(task, DEFAULT, seed),
    }
    found = table("against the plain training, in per cent", "task", "half", "plain", *columns)
    for task in results.tasks:
        plain = {seed: row for (name, what, seed), row in results.rows.items() if (name, what) == (task, PLAIN)}
        if not plain:
            continue
        cells = []
        for row_of in columns.values():
            ratios = [log_ratio(one.test, plain[s].test) for s in plain if (one := row_of(task, s)) is not None]
            cells.append(of_ratios(ratios))
        found.add_row(task, HALVES[task], f"{mean(row.test for row in plain.values()):.3f}", *cells)
    return found
