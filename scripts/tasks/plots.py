"""Pictures of a run and of a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker

PARTS = {"train": "train", "val": "validation", "test": "test"}
Rows = Sequence[Mapping[str, Any]]


def curves(rows: Rows, title: str, path: Path, baselines: Mapping[str, Rows]) -> None:
    """Cross-entropy of one run on train, validation and test data against outer steps, beside plain trainings."""
    compared({title: [rows]} | {label: [plain] for label, plain in baselines.items()}, path)


def compared(groups: Mapping[str, Sequence[Rows]], path: Path) -> None:
    """Cross-entropy of several groups of runs: the mean over a group, with a band of one standard error.

    A panel is cut at three times its best final loss, so that a group that overfits does not flatten the others.
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
            last.append(mean[-1])
            highest = max(highest, mean.max())
        axis.set(title=PARTS[part], xlabel="outer step")
        axis.grid(alpha=0.25, which="both" if part == "train" else "major")
        if len(groups) > 1 and part == "train":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        elif highest > 3 * min(last):
            axis.set_ylim(top=3 * min(last), bottom=0.8 * min(last))
    axes[0].set_ylabel("cross-entropy")
    if len(groups) > 1:
        handles, labels = axes[0].get_legend_handles_labels()
        columns = max(1, min(len(labels), 150 // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    else:
        figure.suptitle(next(iter(groups)))
    _save(figure, path)


def _short(label: str) -> str:
    """A label for the legend: ``hoptim.solver.terms=5`` becomes ``terms=5``; ``outer.lr`` and ``inner.lr`` stay."""
    return re.sub(r"(?:hoptim\.\w+|task)\.(\w+=)", r"\1", label)


def hyperparameters(rows: Rows, quantiles: Sequence[float], path: Path) -> None:
    """The distribution of each hyperparameter over time: its median, and bands between quantiles."""
    names = list(rows[0]["hyperparameters"])
    figure, axes = plt.subplots(1, len(names), figsize=(1.5 + 4.5 * len(names), 4), squeeze=False, layout="constrained")
    steps = [row["outer_step"] for row in rows]
    for axis, name in zip(axes[0], names, strict=True):
        values = np.array([row["hyperparameters"][name]["quantiles"] for row in rows]).T
        count = len(quantiles) // 2
        for low in range(count):
            label = f"{quantiles[low]:.0%} to {quantiles[-1 - low]:.0%}"
            axis.fill_between(
                steps, values[low], values[-1 - low], color="C0", alpha=0.15 + 0.1 * low, linewidth=0, label=label
            )
        axis.plot(steps, values[count], color="C0", label="median")
        axis.set(title=name, xlabel="outer step")
        if (values > 0).all():
            axis.set_yscale("log")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("value")
    axes[0][0].legend(frameon=False, loc="best")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
