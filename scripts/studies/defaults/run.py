"""Which solver, warm-up and outer optimizer learn best? Chosen on one half of twelve tasks, scored on the other.

    python scripts/studies/defaults/run.py --data ~/data                  # run what runs/defaults lacks, then the tables
    python scripts/studies/defaults/run.py --tasks iris cnn --settings "CG*" "MINRES 5*"
    python scripts/studies/defaults/run.py --saved                        # the tables of the page; nothing runs

Each setting changes one factor of the default. A figure is the change of the test loss in per cent, against the default on
the same seed: the mean over tasks of mean log ratios over seeds, and its standard error.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import standard_error
from common.study import Row, Study
from common.tables import markdown
from studies.defaults import training
from studies.defaults.tasks import HALVES, TASKS
from studies.defaults.training import BY_CONSTRAINT, DEFAULT, FIXED, JOINED, LEVELS, PLAIN, SETTINGS

CHOSEN_ON = (0, 1, 2)  # the seeds on which settings are chosen; what was chosen is scored on others
MOST = 1.0  # log ratios are cut off here, so that one run that failed does not hide all the others
ADAM = {float(name.split()[1]): name for name in SETTINGS if name.startswith("Adam ")} | {0.05: DEFAULT}


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """The settings and the runs without learning on the seeds that choose, the rates and levels on others too."""
    for seed in options.seeds:
        for name in options.tasks:
            task = TASKS[name]
            known = SETTINGS if seed in CHOSEN_ON else (DEFAULT, BY_CONSTRAINT, LEVELS)
            wanted = [one for one in known if SETTINGS[one].differs(task)]
            wanted += training.references(task) if seed in CHOSEN_ON else []
            for one in wanted:
                if any(fnmatchcase(one, pattern) for pattern in (DEFAULT, *options.settings)):
                    yield {"task": name, "setting": one, "seed": seed}


def run(root: Path, task: str, setting: str, seed: int) -> Iterator[dict[str, float]]:
    yield training.run(TASKS[task], setting, seed, root)


class Results:
    """The rows, looked up by task, setting and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {(row["task"], row["setting"], row["seed"]): row for row in rows}
        known = {task for task, _, _ in self.rows}
        self.tasks, self.seeds = [name for name in TASKS if name in known], sorted({seed for _, _, seed in self.rows})

    def pairs(
        self, task: str, setting: str, seeds: Collection[int] | None = CHOSEN_ON, base: str = DEFAULT
    ) -> list[tuple[Row, Row]]:
        """The rows of the setting and of the base, for each seed that both have.

        Where the setting is no change in this task, it has the base's row.
        """
        own = setting if setting not in SETTINGS or SETTINGS[setting].differs(TASKS[task]) else base
        wanted = self.seeds if seeds is None else [seed for seed in self.seeds if seed in seeds]
        found = [(self.rows.get((task, own, seed)), self.rows.get((task, base, seed))) for seed in wanted]
        return [(one, other) for one, other in found if one is not None and other is not None]

    def ratios(self, task: str, setting: str, *where: Any) -> list[float]:
        """log(test loss / the base's) for each seed."""
        return [log_ratio(one["test"], base["test"]) for one, base in self.pairs(task, setting, *where)]

    def best_fixed(self, task: str, seed: int) -> Row | None:
        """The training with fixed hyperparameters that has the lowest validation loss; ``None`` if only one ran."""
        names = [name for t, name, s in self.rows if (t, s) == (task, seed) and (name == PLAIN or name.startswith(FIXED))]
        found = [self.rows[task, name, seed] for name in names]
        return min(found, key=lambda row: row["val"]) if len(found) > 1 else None


def log_ratio(a: float, b: float) -> float:
    """log(a / b), cut off at ±1; a loss that is not finite counts as the worst."""
    return max(-MOST, min(MOST, math.log(a / b))) if math.isfinite(a) and a > 0 else MOST


def percent(logs: Collection[float]) -> str:
    """The mean of log ratios as a change in per cent, and its standard error."""
    if not logs:
        return ""
    shown = f"{100 * math.expm1(mean(logs)):.1f}".replace("-", "−")
    return shown + (f" ± {100 * standard_error(logs):.1f}" if len(logs) > 1 else "")


def half_of(half: str, tasks: Iterable[str]) -> list[str]:
    """The tasks of half A or B; all of them for any other name."""
    return [task for task in tasks if HALVES[task] == half or half not in "AB"]


def of_settings(results: Results) -> Iterator[list[str]]:
    """A line for each setting that ran on all tasks: on each half and on both, worst task, wins, cost and seeds."""
    for name in dict.fromkeys(setting for _, setting, _ in results.rows):
        pairs = {task: results.pairs(task, name) for task in results.tasks}
        if name in (DEFAULT, BY_CONSTRAINT, LEVELS, PLAIN, JOINED) or not all(pairs.values()):
            continue
        logs = {task: mean(results.ratios(task, name)) for task in results.tasks}
        worst = max(logs, key=logs.__getitem__)
        cost = median(sum(a["seconds"] for a, _ in each) / sum(b["seconds"] for _, b in each) for each in pairs.values())
        halves = [percent([logs[task] for task in half_of(half, results.tasks)]) for half in ("A", "B", "both")]
        wins = str(sum(log < 0 for log in logs.values()))
        seeds = str(min(map(len, pairs.values())))
        yield [name, *halves, f"{percent([logs[worst]])} {worst}", wins, f"{cost:.2f}", seeds]


def of_tasks(results: Results) -> Iterator[list[str]]:
    """A line for each task: the plain test loss, and how the others differ from it in per cent, paired by seed."""
    columns: list[Callable[[str, int], Row | None]] = [
        lambda task, seed: results.rows.get((task, JOINED, seed)),
        results.best_fixed,
        lambda task, seed: results.rows.get((task, DEFAULT, seed)),
    ]
    for task in results.tasks:
        plain = {seed: row["test"] for (name, what, seed), row in results.rows.items() if (name, what) == (task, PLAIN)}
        if plain:
            rows = [{seed: row_of(task, seed) for seed in plain} for row_of in columns]
            cells = [percent([log_ratio(row["test"], plain[s]) for s, row in each.items() if row]) for each in rows]
            yield [TASKS[task].title, HALVES[task], f"{mean(plain.values()):.3f}", *cells]


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Every setting, the rates and levels on old and fresh seeds, and what learning is worth in each task."""
    results = Results(rows)
    yield markdown(["setting", "A", "B", "both", "worst task", "wins", "cost", "seeds"], of_settings(results))
    fresh = {seed for _, _, seed in results.rows} - set(CHOSEN_ON)
    lines = []
    for task in results.tasks:
        both = [results.ratios(task, LEVELS, seeds, BY_CONSTRAINT) for seeds in (CHOSEN_ON, fresh)]
        lines.append([task, percent(results.ratios(task, BY_CONSTRAINT, fresh)), *map(percent, both)])
    yield markdown(["", "rates by constraint, fresh seeds", "levels against them, seeds that chose", "fresh seeds"], lines)
    yield markdown(["task", "half", "plain", "joined", "best fixed", "learned"], of_tasks(results))


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Every setting on both halves, and the rate of Adam for each kind of constraint."""
    from common.pictures import plt, save

    results = Results(rows)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7.5), layout="constrained", width_ratios=(1.25, 1))
    names = [line[0] for line in of_settings(results)]
    for half, colour, shift in (("A", "C0", -0.17), ("B", "C1", 0.17)):
        for place, name in enumerate(names):
            dots = [100 * mean(results.ratios(task, name)) for task in half_of(half, results.tasks)]
            left.plot(dots, [place + shift] * len(dots), ".", color=colour, alpha=0.35, markersize=4)
            label = f"half {half}" if not place else None
            left.errorbar(mean(dots), place + shift, xerr=standard_error(dots), fmt="o", color=colour, label=label)
    left.set(xlim=(-60, 60), yticks=range(len(names)), yticklabels=names)
    left.set(xlabel="test loss against the default's, % (log ratio): mean over tasks ± standard error; dots are tasks")
    left.invert_yaxis()
    for number, kind in enumerate(dict.fromkeys(task.constraint for task in TASKS.values())):
        tasks = [name for name in results.tasks if TASKS[name].constraint == kind]
        rates = sorted(rate for rate, name in ADAM.items() if tasks and all(results.ratios(t, name) for t in tasks))
        ratios = [[100 * mean(results.ratios(task, ADAM[rate])) for rate in rates] for task in tasks]
        for values in ratios:
            right.plot(rates, values, color=f"C{number}", alpha=0.3, linewidth=0.8)
        right.plot(rates, [mean(column) for column in zip(*ratios, strict=True)], "o-", color=f"C{number}", label=kind)
    right.set(xscale="log", xlabel="rate of the outer Adam", ylabel="test loss against that at 0.05, % (log ratio)")
    right.set(ylim=(-60, 60), xticks=sorted(ADAM), xticklabels=[f"{rate:g}" for rate in sorted(ADAM)])
    for axis in (left, right):
        axis.legend(frameon=False, loc="lower right")
        axis.grid(alpha=0.25)
    save(figure, folder / "defaults.png", dpi=85)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=range(6), jobs=jobs, run=run, show=show, draw=draw,
        more={
            "tasks": {"nargs": "+", "choices": list(TASKS), "default": list(TASKS), "help": "default: all"},
            "settings": {"nargs": "+", "default": ["*"], "help": "patterns of names; the default setting always runs"},
        },
    ).main(__doc__)  # fmt: skip
