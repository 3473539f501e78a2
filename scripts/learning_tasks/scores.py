"""How good a setting is: log ratios of its test loss to the default's, so that tasks of any scale count alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from common.means import standard_error

from learning_tasks.settings import DEFAULT, JOINT, SETTINGS
from learning_tasks.tasks import HALVES, TASKS
from learning_tasks.training import FIXED, PLAIN, Row

MUCH_WORSE = 0.05  # a log ratio above this on a single task rules a setting out
MOST = 1.0  # log ratios are cut off here, so that one run that failed does not hide all the others
CHOSEN_ON = (0, 1, 2)  # the seeds on which settings are chosen; what was chosen is scored on others
FACTORS = ("solver", "curvature", "warm-up", "outer", "average")


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a setting on some tasks. A task counts with the mean over seeds of log(test loss / the default's).

    Attributes:
        setting: its name.
        mean: the mean over tasks; −0.05 is a test loss that is lower by 5 %.
        error: the standard error of the mean, over tasks.
        median: the median over tasks.
        worst: the highest value of a task.
        worst_task: the task that has it.
        wins: how many tasks are below zero.
        tasks: how many tasks there are.
        seeds: how many seeds each task has at least.
        skipped: the share of hypersteps that moved nothing.
        cost: processor time over the default's, the median over tasks.
    """

    setting: str
    mean: float
    error: float
    median: float
    worst: float
    worst_task: str
    wins: int
    tasks: int
    seeds: int
    skipped: float
    cost: float

    @property
    def wins_clearly(self) -> bool:
        """Whether it is better by two standard errors, and on no task worse by more than 5 %."""
        return self.mean + 2 * self.error < 0 and self.worst < MUCH_WORSE


class Results:
    """The rows, looked up by task, setting and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {(row.task, row.setting, row.seed): row for row in rows}
        self.tasks = [name for name in TASKS if any(row.task == name for row in self.rows.values())]

    def row(self, task: str, setting: str, seed: int) -> Row | None:
        """The row of a run; where the setting is no change in this task, the default's row."""
        own = SETTINGS.get(setting)
        return self.rows.get((task, setting if own is None or own.differs(TASKS[task]) else DEFAULT, seed))

    def pairs(self, task: str, setting: str, seeds: Collection[int] | None = None) -> list[tuple[Row, Row]]:
        """The rows of the setting and of the default, for each seed that both have."""
        own = sorted(seed for (name, what, seed) in self.rows if (name, what) == (task, DEFAULT))
        found = [(self.row(task, setting, s), self.row(task, DEFAULT, s)) for s in own if seeds is None or s in seeds]
        return [(one, default) for one, default in found if one is not None and default is not None]

    def ratios(self, task: str, setting: str, seeds: Collection[int] | None = None) -> list[float]:
        """log(test loss / the default's) for each seed."""
        return [log_ratio(one.test, default.test) for one, default in self.pairs(task, setting, seeds)]

    def score(self, setting: str, tasks: Sequence[str], seeds: Collection[int] | None = None) -> Score | None:
        """The setting's score on these tasks; ``None`` if it did not run on all of them."""
        pairs = {task: self.pairs(task, setting, seeds) for task in tasks}
        if not tasks or not all(pairs.values()):
            return None
        by_task = {task: mean(log_ratio(a.test, b.test) for a, b in found) for task, found in pairs.items()}
        rows = [a for found in pairs.values() for a, _ in found]
        worst = max(by_task, key=lambda task: by_task[task])
        return Score(
            setting=setting,
            mean=mean(by_task.values()),
            error=standard_error(by_task.values()),
            median=median(by_task.values()),
            worst=by_task[worst],
            worst_task=worst,
            wins=sum(value < 0 for value in by_task.values()),
            tasks=len(by_task),
            seeds=min(map(len, pairs.values())),
            skipped=sum(row.skipped for row in rows) / max(1, sum(row.hypersteps for row in rows)),
            cost=median(sum(a.seconds for a, _ in found) / sum(b.seconds for _, b in found) for found in pairs.values()),
        )

    def scores(self, factor: str, tasks: Sequence[str], seeds: Collection[int] | None = None) -> list[Score]:
        """The scores of all settings of a factor that ran on these tasks."""
        found = [self.score(name, tasks, seeds) for name, one in SETTINGS.items() if one.factor == factor]
        return [score for score in found if score is not None]

    def chosen(self, half: str) -> list[str]:
        """The setting of each factor that has the lowest mean on a half, if it is better than the default there.

        Settings count only if they ran on all seeds and are on no task of the half worse by more than 5 %.
        """
        found = []
        for factor in FACTORS:
            scores = self.scores(factor, half_of(half, self.tasks), CHOSEN_ON)
            finished = [one for one in scores if one.seeds == len(CHOSEN_ON) and one.worst < MUCH_WORSE]
            best = min(finished, key=lambda one: one.mean, default=None)
            if best is not None and best.mean < 0:
                found.append(best.setting)
        return found

    def rates(self, half: str) -> dict[str, str]:
        """The rate of Adam that has the lowest mean on the half's tasks, for each kind of constraint."""
        found = {}
        for kind in dict.fromkeys(TASKS[name].constraint for name in self.tasks):
            tasks = [name for name in half_of(half, self.tasks) if TASKS[name].constraint == kind]
            scores = [*self.scores("default", tasks, CHOSEN_ON), *self.scores("outer", tasks, CHOSEN_ON)]
            if adam := [one for one in scores if "Adam" in one.setting]:
                found[kind] = min(adam, key=lambda one: one.mean).setting
        return found

    def combination(self, half: str) -> str:
        """The name of the setting that combines all that a half chooses."""
        return JOINT.join(self.chosen(half)) or DEFAULT

    def best_fixed(self, task: str, seed: int) -> Row | None:
        """The training with fixed hyperparameters that has the lowest validation loss; ``None`` if only one ran."""
        fixed = [r for (t, s, n), r in self.rows.items() if (t, n) == (task, seed) and (s == PLAIN or s.startswith(FIXED))]
        return min(fixed, key=lambda row: row.val) if len(fixed) > 1 else None


def log_ratio(a: float, b: float) -> float:
    """log(a / b), cut off at ±1; a loss that is not finite counts as the worst.

    >>> round(log_ratio(0.9, 1.0), 3), log_ratio(float("inf"), 1.0), log_ratio(float("nan"), 1.0)
    (-0.105, 1.0, 1.0)
    """
    if not (math.isfinite(a) and a > 0):
        return MOST
    return max(-MOST, min(MOST, math.log(a / b)))


def half_of(half: str, tasks: Iterable[str]) -> list[str]:
    """The tasks of a half; all of them if ``half`` is neither A nor B."""
    return [task for task in tasks if HALVES[task] == half or half not in HALVES.values()]
