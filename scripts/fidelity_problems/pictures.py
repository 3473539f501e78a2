"""The pictures of the study: cosine against cost with a panel for each problem, and the figure of the paper."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common.pictures import plt, save
from matplotlib import ticker

from fidelity_problems.methods import METHODS
from fidelity_problems.problems import PROBLEMS


def curves(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A curve for each family that is shown, with a point for each number of terms: medians over seeds, and quartiles.

    Each solver has a colour; lines are solid on the exact curvature and dashed on Gauss-Newton.
    """
    problems = list(dict.fromkeys(one["problem"] for one in records))
    columns = min(4, len(problems))
    lines = math.ceil(len(problems) / columns)
    size = (1.5 + 4.2 * columns, 1 + 3.5 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    drawn = [one for one in records if METHODS[one["method"]].shown]
    solvers = list(dict.fromkeys(METHODS[one["method"]].family.split(", ")[0] for one in drawn))
    colours = dict(zip(solvers, plt.get_cmap("tab10").colors * 3, strict=False))
    for axis, problem in zip(axes.flat, problems, strict=False):
        for family, points in _families(drawn, problem).items():
            colour = colours[family.split(", ")[0]]
            alone = len(points) == 1
            style = {"marker": "*" if alone else "o", "markersize": 9 if alone else 3.5, "linewidth": 1.3}
            x, y, low, high = (np.array([one[key] for one in points]) for key in ("cost", "cosine", "low", "high"))
            dashes = "--" if ", GN" in family else "-"
            axis.plot(x, y, color=colour, linestyle=dashes, label=family, **style)
            if not alone:
                axis.fill_between(x, low, high, color=colour, alpha=0.07, linewidth=0)
        axis.set(title=PROBLEMS[problem].title, xscale="log")
        axis.title.set_size(10)
        axis.set_ylim(top=1.02)
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.grid(alpha=0.25)
    for axis in list(axes.flat)[len(problems) :]:
        axis.set_axis_off()
    for axis in axes.flat[max(0, len(problems) - columns) : len(problems)]:
        axis.set_xlabel("cost in training gradients")
    for axis in axes[:, 0]:
        axis.set_ylabel("cosine to the truth")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5), frameon=False)
    save(figure, path, dpi=85)


def _families(records: Sequence[Mapping[str, Any]], problem: str) -> dict[str, list[Mapping[str, Any]]]:
    found = defaultdict(list)
    for one in records:
        if one["problem"] == problem:
            found[METHODS[one["method"]].family].append(one)
    return {family: sorted(points, key=lambda one: METHODS[one["method"]].terms) for family, points in found.items()}


def approximations(runs: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str], path: Path) -> None:
    """Cosine and relative L2 distance to the exact inverse over the outer steps: means over splits, and standard errors."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = [row["outer_step"] for row in runs[0]]
    for axis, key, label in zip(axes, ("cosine", "distance"), ("cosine", "relative L2 distance"), strict=True):
        for colour, name in enumerate(names):
            values = np.array(
                [[row[name][key] / (row["length"] if key == "distance" else 1) for row in run] for run in runs]
            )
            mean = values.mean(0)
            error = values.std(0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else np.zeros_like(mean)
            style = {"linestyle": "--" if name.startswith("CG") else "-", "color": f"C{colour}", "linewidth": 1.6}
            axis.plot(steps, mean, label=name, **style)
            axis.fill_between(steps, mean - error, mean + error, color=f"C{colour}", alpha=0.12, linewidth=0)
        axis.set(xlabel="outer step", ylabel=f"{label} to the exact inverse")
        axis.grid(alpha=0.25)
    axes[1].set_yscale("log")
    axes[1].set_ylim(bottom=max(1e-3, axes[1].get_ylim()[0]))  # smaller distances would squeeze the rest
    axes[0].legend(frameon=False)
    figure.suptitle("Boston housing, linear regression, 14 log decays")
    save(figure, path, dpi=85)
