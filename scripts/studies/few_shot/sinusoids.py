"""Sinusoids: the squared error on new ones after 0 to 10 gradient steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common.means import mean_and_error
from common.study import Row
from common.tables import markdown
from studies.few_shot import tasks
from studies.few_shot.ways import Learner, Tensors, Way, mse, predictions, pretrained
from torch import Tensor

from hoptim import CG, GaussNewton, Implicit, PerTask

SHOTS, STEPS, META_STEPS, META_BATCH = (10, 5), 10, 5000, 25
LEARNED = {
    "MAML": Way(method=PerTask(1), rate=0.01),
    "first-order MAML": Way(method=PerTask(1, first_order=True), rate=0.01),
    "ANIL": Way(method=PerTask(1), rate=0.01, last=True),
    "Meta-SGD": Way(method=PerTask(1), rate=0.01, rates=True),
    "implicit MAML": Way(method=PerTask(16, Implicit(CG(terms=5), curvature=GaussNewton())), rate=0.005, pull=2.0),
}
SIMPLE = ("pretrained on all", "random weights")
WAYS = ("MAML", "first-order MAML", "ANIL", "Meta-SGD", *SIMPLE, "implicit MAML")
ONCE = ("implicit MAML",)  # takes so long that it has the first seed alone
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)  # for the simple ways, chosen on 200 other sinusoids
SHOWN = ("MAML", "Meta-SGD", "pretrained on all")  # in the picture of one sinusoid
NEW, POINTS = 600, 100  # test tasks, and points of each on which the error is taken
DIVERGED = 10.0
GRID = torch.linspace(-5, 5, 81)[:, None]


def run(root: Path, way: str, shots: int, seed: int) -> dict[str, Any]:
    """The mean squared errors of the test tasks by the number of steps, their standard errors, and processor seconds."""
    torch.manual_seed(seed)
    generator, begun = torch.Generator().manual_seed(seed), time.process_time()

    def draw() -> tuple[tasks.Batch, tasks.Batch]:
        return tasks.sinusoids(META_BATCH, shots, shots, generator)

    def of_all() -> tasks.Batch:  # the points of all tasks in one batch
        (x, y), (x_val, y_val) = draw()
        return torch.cat([x, x_val]).reshape(-1, 1), torch.cat([y, y_val]).reshape(-1, 1)

    model = tasks.regressor()
    if way in LEARNED:
        learner = Learner(model, LEARNED[way], mse).train(draw, META_STEPS)
        if learner.skipped:
            print(f"{learner.skipped} hypergradients were not usable")
        start, rates, pull = learner.start(), learner.rates(), LEARNED[way].pull
        spent = time.process_time() - begun
    else:
        start, pull = pretrained(model, of_all, mse, META_STEPS if way == SIMPLE[0] else 0), 0.0
        spent = time.process_time() - begun
        rates = tuned(model, start, tasks.sinusoids(200, shots, POINTS, torch.Generator().manual_seed(1000 + seed)))
    support, (x, y) = tasks.sinusoids(NEW, max(SHOTS), POINTS, torch.Generator().manual_seed(10_000))
    support = support[0][:, :shots], support[1][:, :shots]
    errors = (predictions(model, start, rates, support, x, STEPS, mse, pull) - y[:, None]).square().mean((2, 3))
    shown = predictions(model, start, rates, (support[0][:1], support[1][:1]), GRID[None], STEPS, mse, pull)[0, :, :, 0]
    rate = max(rate.mean().item() for rate in rates.values())
    return {
        "seconds": spent, "rate": rate, "error": rounded(errors.mean(0)), "of mean": rounded(errors.std(0) / NEW**0.5),
        "curves": [rounded(shown[n]) for n in (0, 1, STEPS)] if way in SHOWN and (shots, seed) == (max(SHOTS), 0) else [],
    }  # fmt: skip


def rounded(values: Tensor) -> list[float | None]:
    """Four digits are enough for tables and pictures, and make short files; ``None`` where steps have diverged."""
    return [float(f"{value:.4g}") if abs(value) < DIVERGED else None for value in values.tolist()]


def drawn(values: Sequence[float | None]) -> list[float]:
    """With gaps where steps have diverged."""
    return [torch.nan if value is None else value for value in values]


def tuned(model: torch.nn.Module, start: Tensors, other: tuple[tasks.Batch, tasks.Batch]) -> Tensors:
    """The rate whose error after the last step is lowest, for each weight."""
    support, (x, y) = other

    def error(rate: float) -> float:
        found = predictions(model, start, dict.fromkeys(start, rate), support, x, STEPS, mse)[:, -1]
        return torch.nan_to_num((found - y).square().mean(), nan=torch.inf).item()

    return dict.fromkeys(start, torch.tensor(min(RATES, key=error)))


def by_steps(rows: Sequence[Row], way: str, shots: int) -> list[list[float | None]]:
    """The errors of each seed, for each number of steps."""
    found = [row["error"] for row in rows if (row["way"], row["shots"]) == (way, shots)]
    return [list(errors) for errors in zip(*found, strict=True)]


def show(rows: Sequence[Row]) -> Iterator[str]:
    """The errors after some steps, with standard errors over the seeds."""
    lines = []
    for shots in SHOTS:
        for way in WAYS:
            if found := by_steps(rows, way, shots):
                seconds = mean(row["seconds"] for row in rows if (row["way"], row["shots"]) == (way, shots))
                errors = [found[n] for n in (0, 1, 3, 10)]
                cells = ["diverged" if None in one else mean_and_error(one, ".2f") for one in errors]  # type: ignore[arg-type]
                lines.append([f"{way}, {shots} points", *cells, f"{seconds:.0f}"])
    yield markdown(["squared error after steps:", "0", "1", "3", "10", "seconds"], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The errors by steps; and one sinusoid, from three starts."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    for axis, shots in zip(axes, SHOTS, strict=True):
        for place, way in enumerate(WAYS):
            errors = [mean(drawn(one)) for one in by_steps(rows, way, shots)]
            style = "--" if way in SIMPLE else "-"
            if errors:
                axis.plot(range(len(errors)), errors, style, marker=".", color=f"C{place}", label=way)
        axis.set(title=f"{shots} points", xlabel="gradient steps", yscale="log", xticks=range(0, STEPS + 1, 2))
        axis.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        axis.minorticks_off()
        axis.set_ylim(0.15, 8)
    axes[0].set_ylabel("squared error on 600 new sinusoids")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    save(figure, folder / "curves.png")
    (x, y), (at, truth) = tasks.sinusoids(NEW, max(SHOTS), POINTS, torch.Generator().manual_seed(10_000))
    order = at[0, :, 0].argsort()
    names = [name for name in SHOWN if any(row["way"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(10, 3.2), layout="constrained", sharey=True, squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        (row,) = (row for row in rows if row["way"] == name and row["curves"])
        axis.plot(at[0, order, 0], truth[0, order, 0], color="black", label="truth")
        for curve, steps, colour in zip(row["curves"], (0, 1, STEPS), ("C7", "C0", "C3"), strict=True):
            axis.plot(GRID[:, 0], drawn(curve), color=colour, label=f"after {steps} step{'s' * (steps != 1)}")
        axis.plot(x[0, :, 0], y[0, :, 0], "^", color="black", label="the ten points")
        axis.set(title=name, xlabel="x", ylim=(-5.5, 5.5))
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    save(figure, folder / "sinusoid.png")
