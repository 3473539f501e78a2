"""Pictures of a run and of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.pictures import plt, save
from matplotlib import ticker

from tasks.checkpoint import read_rows
from tasks.figures import QUANTILES
from tasks.run import Run

PARTS = {"train": "train", "val": "validation", "test": "test"}
Rows = Sequence[Mapping[str, Any]]


def of_run(run: Run, rows: Rows, folder: Path, retrained: float | None = None) -> list[Path]:
    """Draw the pictures of a finished run: its losses, its hyperparameters, and those of its task.

    Args:
        run: the run.
        rows: its rows of figures.
        folder: the folder of its files.
        retrained: the test loss of the retrained model, if there is one.
    """
    paths = [folder / "curves.png", folder / "hyperparameters.png"]
    plain = {label: read_rows(folder / "baselines" / label) for label in run.cfg.baselines}
    for label, changes in run.cfg.baselines.items():
        if (changes.get("task") or {}).get("join"):  # it trains on the validation part, so its loss there means nothing
            plain[label] = [{**row, "val_loss": math.nan} for row in plain[label]]
    groups = {run.cfg.name: [rows]} | {label: [own] for label, own in plain.items()}
    compared(groups, paths[0], run.task.loss_name, retrained)
    hyperparameters(rows, paths[1])
    return paths + run.task.draw(run.problem, folder)


def compared(
    groups: Mapping[str, Sequence[Rows]], path: Path, loss_name: str = "loss", retrained: float | None = None
) -> None:
    """The mean loss of each group of runs on each part of the data, with a band of one standard error.

    ``retrained``, the test loss of the first group's retrained model, is a dashed line. A panel is cut at three times its
    best final loss, so that a group that overfits does not flatten the others.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 5), sharex=True, layout="constrained")
    colours = plt.get_cmap("tab10" if len(groups) <= 10 else "tab20").colors
    for axis, part in zip(axes, PARTS, strict=True):
        last, highest = [], 0.0
        for (label, runs), colour in zip(groups.items(), colours * 3, strict=False):
            count = min(map(len, runs))
            steps = [row["outer_step"] for row in runs[0][:count]]
            losses = np.array([[row[f"{part}_loss"] for row in rows[:count]] for rows in runs])
            mean = losses.mean(0)
            axis.plot(steps, mean, color=colour, label=_short(label), linewidth=1.6)
            if len(runs) > 1:
                error = losses.std(0, ddof=1) / np.sqrt(len(runs))
                axis.fill_between(steps, mean - error, mean + error, color=colour, alpha=0.12, linewidth=0)
            if np.isfinite(mean[-1]):
                last.append(mean[-1])
                highest = max(highest, mean.max())
        if part == "test" and retrained is not None:
            axis.axhline(retrained, color=colours[0], linestyle="--", linewidth=1.2, label="retrained")
            last.append(retrained)
        axis.set(title=PARTS[part], xlabel="outer step")
        axis.grid(alpha=0.25, which="both" if part == "train" else "major")
        if len(groups) > 1 and part == "train":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        elif last and highest > 3 * min(last):
            axis.set_ylim(top=3 * min(last), bottom=0.8 * min(last))
    axes[0].set_ylabel(loss_name)
    if len(groups) > 1:
        handles, labels = axes[-1].get_legend_handles_labels()
        columns = max(1, min(len(labels), 150 // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    else:
        figure.suptitle(next(iter(groups)))
    save(figure, path)


def _short(label: str) -> str:
    """A label for the legend: ``hoptim.solver.terms=5`` becomes ``terms=5``; ``outer.lr=1`` stays as it is."""
    return re.sub(r"(?:hoptim\.\w+|task)\.(\w+=)", r"\1", label)


def hyperparameters(rows: Rows, path: Path) -> None:
    """The distribution of each hyperparameter over time, as its median and bands between quantiles; only the first 20."""
    names = list(rows[0]["hyperparameters"])[:20]
    across = min(len(names), 5)
    down = -(-len(names) // across)
    size = (1.5 + 4.5 * min(across, 3) if down == 1 else 16, 4.0 if down == 1 else 3.0 * down)
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    steps = [row["outer_step"] for row in rows]
    for axis, name in zip(axes.flat, names, strict=False):
        values = np.array([row["hyperparameters"][name]["quantiles"] for row in rows]).T
        count = len(QUANTILES) // 2
        for low in range(count):
            label = f"{QUANTILES[low]:.0%} to {QUANTILES[-1 - low]:.0%}"
            axis.fill_between(
                steps, values[low], values[-1 - low], color="C0", alpha=0.15 + 0.1 * low, linewidth=0, label=label
            )
        axis.plot(steps, values[count], color="C0", label="median")
        axis.set(title=name, xlabel="outer step")
        if (values > 0).all() and values.max() > 3 * values.min():
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    axes[0][0].set_ylabel("value")
    axes[0][0].legend(frameon=False, loc="best")
    save(figure, path)
