"""The picture of test loss against budget: a row for each data set, a column for each number of hyperparameters."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common.pictures import plt, save
from matplotlib import ticker

from tuner_study.curves import Curves, Estimate, estimate
from tuner_study.methods import FIXED
from tuner_study.problems import COUNTS, SETS

STYLES: dict[str, tuple[str, str, Any, float]] = {  # label, colour, dashes, width
    FIXED: ("good fixed values", "#222222", (0, (4, 2)), 1.2),
    "random": ("random search", "#8a8f98", "solid", 1.4),
    "optuna": ("Optuna, TPE", "#d9722b", "solid", 2.0),
    "gp": ("Optuna, GP", "#c9a227", "solid", 1.6),
    "hoptim": ("hoptim", "#1f5fb4", "solid", 2.4),
}
TITLES = {
    1: "1 hyperparameter",
    3: "3 hyperparameters",
    10: "9 or 10",
    100: "60 to 97, one a unit",
    10_000: "10,000, one a weight",
}
STEPS = 48  # points along the axis of budgets


def grid(curves: Curves) -> np.ndarray:
    """Budgets at equal distances on a logarithmic axis."""
    return np.geomspace(1, curves.budgets[-1], STEPS + 1)


def gains(curves: Curves, name: str, count: int, method: str, in_seconds: bool) -> list[Estimate]:
    """The change of the test loss against the untuned training of the same seed, in per cent (log ratio), at each budget."""
    found = []
    start = curves.losses(name, count, "hoptim" if curves.seeds(name, count, "hoptim") else method, 1)
    for budget in grid(curves):
        now = curves.losses(name, count, method, budget, in_seconds)
        found.append(estimate([100 * math.log(now[seed] / start[seed]) for seed in sorted(now.keys() & start.keys())]))
    return found


def draw(curves: Curves, path: Path, in_seconds: bool = False) -> None:
    """Write the picture. A bar at the bottom shows where hoptim is ahead of both of Optuna's samplers, or behind one."""
    names = [name for name in SETS if any(curves.seeds(name, count, "hoptim") for count in COUNTS)]
    shape = {"nrows": max(1, len(names)), "ncols": len(COUNTS)}
    figure, axes = plt.subplots(
        **shape, figsize=(13.5, 2.6 * shape["nrows"] + 0.9), sharex=True, sharey="row", squeeze=False
    )
    for name, row in zip(names, axes, strict=False):
        for count, axis in zip(COUNTS, row, strict=True):
            _panel(axis, curves, name, count, in_seconds)
        row[0].set_ylabel(f"{SETS[name].title}\ntest loss against untuned, %")
        _labels(row[-1], curves.budgets[-1], {m: gains(curves, name, COUNTS[-1], m, in_seconds)[-1].mean for m in STYLES
                          if curves.seeds(name, COUNTS[-1], m)})  # fmt: skip
    for count, axis in zip(COUNTS, axes[0], strict=True):
        axis.set_title(TITLES[count], fontsize=11)
    unit = "processor seconds of one" if in_seconds else "training gradients"
    figure.supxlabel(
        f"budget in plain trainings, by {unit}; lines are means, bands standard errors of the paired differences, and\n"
        "bars below mark where hoptim is ahead of both TPE and GP (blue), or behind one (orange), by two standard errors",
        fontsize=9.5,
    )
    figure.tight_layout(rect=(0, 0, 0.915, 1))
    save(figure, path, dpi=85)


def draw_by_budget(curves: Curves, path: Path, name: str = "fashion", counts: tuple[int, ...] = (1, 10_000)) -> None:
    """Write the README's picture: the test losses themselves, on one data set, with few hyperparameters and with many."""
    shown = [method for method in STYLES if method != "random"]
    if not all(curves.seeds(name, count, *shown) for count in counts):
        return
    figure, axes = plt.subplots(1, len(counts), figsize=(9.2, 3.4), sharey=True)
    for count, axis, title in zip(counts, axes, ("One weight decay", "A weight decay for each weight"), strict=True):
        ends = {}
        for method in shown:
            _, colour, dashes, width = STYLES[method]
            found = [estimate(list(curves.losses(name, count, method, budget).values())) for budget in grid(curves)]
            middle, error = (np.array(part) for part in zip(*found, strict=True))
            axis.plot(grid(curves), middle, color=colour, linestyle=dashes, linewidth=width, drawstyle="steps-post")
            axis.fill_between(
                grid(curves), middle - error, middle + error, color=colour, alpha=0.12, linewidth=0, step="post"
            )
            ends[method] = middle[-1]
        _budgets(axis, curves)
        axis.set_title(title, fontsize=12)
        axis.set_xlabel("cost, in trainings")
    axes[0].set_ylabel("test loss")
    _labels(axes[-1], curves.budgets[-1], ends)
    figure.tight_layout(w_pad=2)
    save(figure, path)


def _panel(axis: Any, curves: Curves, name: str, count: int, in_seconds: bool) -> None:
    for method, (_, colour, dashes, width) in STYLES.items():
        if not curves.seeds(name, count, method):
            continue
        found = gains(curves, name, count, method, in_seconds)
        middle, error = (np.array(part) for part in zip(*found, strict=True))
        axis.plot(grid(curves), middle, color=colour, linestyle=dashes, linewidth=width, drawstyle="steps-post")
        alpha = 0.08 if method == FIXED else 0.16
        axis.fill_between(grid(curves), middle - error, middle + error, color=colour, alpha=alpha, linewidth=0, step="post")
    _shade(axis, curves, name, count, in_seconds)
    axis.axhline(0, color="black", linewidth=0.6, alpha=0.5)
    _budgets(axis, curves)


def _budgets(axis: Any, curves: Curves) -> None:
    """Put the budgets on a logarithmic axis, and leave out lines that say nothing."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(ticker.FixedLocator(curves.budgets))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.set_xlim(1, 1.04 * curves.budgets[-1])
    axis.grid(axis="y", alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)


def _shade(axis: Any, curves: Curves, name: str, count: int, in_seconds: bool) -> None:
    others = [method for method in ("optuna", "gp") if curves.seeds(name, count, "hoptim", method)]
    for left, right in pairwise(grid(curves)):
        found = [curves.difference(name, count, "hoptim", other, left, in_seconds) for other in others]
        ahead = [one.is_clear and one.mean < 0 for one in found]
        behind = [one.is_clear and one.mean > 0 for one in found]
        if any(behind) or (ahead and all(ahead)):
            colour = STYLES["optuna" if any(behind) else "hoptim"][1]
            axis.axvspan(left, right, ymin=0, ymax=0.035, color=colour, alpha=0.85, linewidth=0)


def _labels(axis: Any, right: float, ends: dict[str, float]) -> None:
    """Write the methods' names at the ends of their curves, moved apart where they would overlap."""
    bottom, top = axis.get_ylim()
    names = sorted(ends, key=lambda method: ends[method])
    places = apart([ends[method] for method in names], gap=0.1 * (top - bottom))
    for method, place in zip(names, places, strict=True):
        label, colour, _, _ = STYLES[method]
        axis.annotate(label, (right, place), xytext=(6, 0), textcoords="offset points", color=colour, va="center",
                      annotation_clip=False, fontsize=9.5)  # fmt: skip


def apart(places: list[float], gap: float) -> list[float]:
    """Ascending places, moved as little as possible so that neighbours differ by at least the gap.

    >>> apart([0.0, 0.2, 5.0], gap=1.0)
    [-0.4, 0.6, 5.0]
    """
    blocks: list[list[float]] = []  # places minus their gaps; they have to ascend, so those that do not are pooled
    for number, place in enumerate(places):
        blocks.append([place - number * gap])
        while len(blocks) > 1 and mean(blocks[-2]) > mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    shifted = [mean(block) for block in blocks for _ in block]
    return [round(place + number * gap, 6) for number, place in enumerate(shifted)]
