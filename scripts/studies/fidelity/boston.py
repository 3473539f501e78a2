"""The paper's comparison on Boston housing: linear regression, 14 log decays, Neumann and CG against the exact inverse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from studies.fidelity.problems import Batch, decayed, decays, predict
from tasks import data
from torch import Tensor, nn

import hoptim

LR = 0.1  # the learning rate of the inner steps, and the step size of the series, as in the paper
APPROXIMATIONS = {
    **{f"Neumann {terms}": hoptim.Neumann(terms=terms, step_size=LR) for terms in (0, 1, 5, 20)},
    **{f"CG {terms}": hoptim.CG(terms=terms) for terms in (5, 20)},
}


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A linear model with a bias on standardised features, with squared error and a log decay for each weight."""

    problem: hoptim.Problem
    train: Batch
    val: Batch

    def exact(self) -> Tensor:
        """dL_V/d log λ = −λ ∘ w ∘ x with (XᵀX/n + diag λ) x = ∂L_V/∂w at the current weights, by a dense solve."""
        (w,), (decay,) = self.problem.weights().values(), (self.problem.hparams[name] for name in self.problem.hparams)
        w, decay = w.detach()[0], decay.detach()[0]
        (x, _), (x_val, y_val) = self.train, self.val
        H = x.T @ x / len(x) + torch.diag(decay)
        g = x_val.T @ (x_val @ w - y_val) / len(x_val)
        return -decay * w * torch.linalg.solve(H, g)

    def approximate(self, solver: hoptim.Solver) -> Tensor:
        """The same hypergradient, by hoptim with the given solver."""
        found = hoptim.hypergradient(self.problem, self.train, self.val, hoptim.Implicit(solver, curvature=hoptim.Exact()))
        (value,) = found.grads.values()
        return value[0]


def regression(x: Tensor, y: Tensor, seed: int, decay: float = 1e-2) -> Regression:
    """The problem with half of the rows for training and half for validation."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)[order]
    y, half = y[order], len(x) // 2
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)

    def squared(z: Tensor, hparams: Any, batch: Batch) -> Tensor:
        return 0.5 * (z[:, 0] - batch[1]).square().mean()

    problem = hoptim.Problem(
        model,
        decays(model, decay, torch.float64),
        hoptim.CompositeLoss(predict, squared, decayed),
        lambda model, hparams, batch: squared(model(batch[0]), hparams, batch),
    )
    return Regression(problem=problem, train=(x[:half], y[:half]), val=(x[half:], y[half:]))


def compared(case: Regression, outer_steps: int = 100, inner_steps: int = 20, rate: float = 0.03) -> list[dict[str, Any]]:
    """Cosine and relative L2 distance of each approximation to the exact one, while weights and decays train in turn."""
    inner = torch.optim.SGD(case.problem.model.parameters(), lr=LR)
    outer = torch.optim.Adam(case.problem.hparams.parameters(), lr=rate)
    (leaf,) = case.problem.hparams.parameters()
    rows = []
    for _ in range(outer_steps):
        for _ in range(inner_steps):
            inner.zero_grad()
            case.problem.loss(case.train).backward()
            inner.step()
        exact = case.exact()
        row = {}
        for name, solver in APPROXIMATIONS.items():
            found = case.approximate(solver)
            cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
            row[name] = {"cosine": float(cosine), "distance": float((found - exact).norm()) / float(exact.norm())}
        rows.append(row)
        leaf.grad = exact[None].clone()
        outer.step()
    return rows


def study(seeds: Iterable[int], root: Path, path: Path) -> dict[str, dict[str, float]]:
    """Compare on several splits, draw cosines and distances over the outer steps, and return the figures of the page.

    Over runs and outer steps: the median and worst cosine, and the median distance relative to the exact length.
    """
    from common.pictures import plt, save

    runs = [compared(regression(*data.table("boston", root), seed)) for seed in seeds]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for colour, name in enumerate(APPROXIMATIONS):
        for axis, key, label in zip(axes, ("cosine", "distance"), ("cosine", "relative L2 distance"), strict=True):
            means = [np.mean([row[name][key] for row in each]) for each in zip(*runs, strict=True)]
            axis.plot(means, "--" if name.startswith("CG") else "-", color=f"C{colour}", label=name)
            axis.set(xlabel="outer step", ylabel=f"{label} to the exact inverse")
            axis.grid(alpha=0.25)
    axes[1].set_yscale("log")
    axes[1].set_ylim(bottom=max(1e-3, axes[1].get_ylim()[0]))  # smaller distances would squeeze the rest
    axes[0].legend(frameon=False)
    save(figure, path, dpi=85)
    return summary(runs)


def summary(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """The figures of the page."""
    found = {}
    for name in APPROXIMATIONS:
        rows = [row[name] for run in runs for row in run]
        middle = {key: float(np.median([row[key] for row in rows])) for key in ("cosine", "distance")}
        figures = {"cosine": middle["cosine"], "worst": min(row["cosine"] for row in rows), "distance": middle["distance"]}
        found[name] = {key: round(value, 4) for key, value in figures.items()}
    return found
