"""The picture of the study: every setting on both halves, and the rate of Adam for each kind of constraint."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from common.pictures import plt, save
from matplotlib import ticker

from learning_tasks.scores import CHOSEN_ON, Results, half_of
from learning_tasks.settings import BY_CONSTRAINT, DEFAULT, LEVELS, SETTINGS
from learning_tasks.tasks import TASKS

ADAM = {float(name.split()[1]): name for name in SETTINGS if name.startswith("Adam ")} | {0.05: DEFAULT}
LEFT, RIGHT = -60, 60


def draw(results: Results, path: Path) -> None:
    """Draw both panels, with log ratios in per cent."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 7.5), layout="constrained", width_ratios=(1.25, 1))
    _settings(results, left)
    _rates(results, right)
    save(figure, path, dpi=85)


def _settings(results: Results, axis: Any) -> None:
    known = [name for name in SETTINGS if name not in (DEFAULT, BY_CONSTRAINT, LEVELS)]
    names = [name for name in known if results.score(name, results.tasks, CHOSEN_ON)]
    for half, colour, shift in (("A", "C0", -0.17), ("B", "C1", 0.17)):
        tasks = half_of(half, results.tasks)
        for place, name in enumerate(names):
            score = results.score(name, tasks, CHOSEN_ON)
            dots = [100 * mean(results.ratios(task, name, CHOSEN_ON)) for task in tasks]
            axis.plot(dots, [place + shift] * len(dots), ".", color=colour, alpha=0.35, markersize=4)
            label = f"half {half}" if not place else None
            x, error = 100 * score.mean, 100 * score.error
            axis.errorbar(x, place + shift, xerr=error, fmt="o", color=colour, markersize=5, label=label)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlim=(LEFT, RIGHT), yticks=range(len(names)), yticklabels=names)
    axis.set(xlabel="test loss against the default's, % (log ratio): mean over tasks ± standard error; dots are tasks")
    axis.invert_yaxis()
    axis.legend(frameon=False, loc="lower right")
    axis.grid(alpha=0.25)


def _rates(results: Results, axis: Any) -> None:
    for number, kind in enumerate(dict.fromkeys(task.constraint for task in TASKS.values())):
        tasks = [name for name in results.tasks if TASKS[name].constraint == kind]
        rates = sorted(rate for rate, name in ADAM.items() if tasks and results.score(name, tasks, CHOSEN_ON))
        ratios = {name: [100 * mean(results.ratios(name, ADAM[rate], CHOSEN_ON)) for rate in rates] for name in tasks}
        for values in ratios.values():
            axis.plot(rates, values, color=f"C{number}", alpha=0.3, linewidth=0.8)
        means = [mean(column) for column in zip(*ratios.values(), strict=True)]
        axis.plot(rates, means, "o-", color=f"C{number}", label=kind, markersize=4)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        xscale="log",
        xlabel="rate of the outer Adam",
        ylabel="test loss against that at 0.05, % (log ratio)",
        ylim=(LEFT, RIGHT),
    )
    axis.xaxis.set_major_locator(ticker.FixedLocator(sorted(ADAM)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.legend(frameon=False, title="constraint; thin lines are tasks")
    axis.grid(alpha=0.25)
