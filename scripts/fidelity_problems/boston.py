"""The paper's comparison on Boston housing: linear regression, 14 log decays, Neumann and CG against the exact inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import hoptim
from fidelity_problems.problems import Batch, decayed, decays, predict

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


def read(root: Path) -> tuple[Tensor, Tensor]:
    """The 13 features of 506 tracts, and their median house values."""
    path = root / "boston" / "boston.csv"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: write the 506 rows of Boston housing there as CSV, with a header, 13 features and then "
            "medv; scikit-learn's fetch_openml('boston', version=1) has them"
        )
    rows = torch.tensor(np.genfromtxt(path, delimiter=",", skip_header=1), dtype=torch.float64)
    return rows[:, :-1], rows[:, -1]


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
    """Cosine and L2 distance of each approximation to the exact hypergradient, while weights and decays train in turn."""
    inner = torch.optim.SGD(case.problem.model.parameters(), lr=LR)
    outer = torch.optim.Adam(case.problem.hparams.parameters(), lr=rate)
    (leaf,) = case.problem.hparams.parameters()
    rows = []
    for step in range(outer_steps):
        for _ in range(inner_steps):
            inner.zero_grad()
            case.problem.loss(case.train).backward()
            inner.step()
        exact = case.exact()
        row: dict[str, Any] = {"outer_step": step + 1, "length": float(exact.norm())}
        for name, solver in APPROXIMATIONS.items():
            found = case.approximate(solver)
            cosine = torch.nn.functional.cosine_similarity(found, exact, dim=0)
            row[name] = {"cosine": float(cosine), "distance": float((found - exact).norm())}
        rows.append(row)
        leaf.grad = exact[None].clone()
        outer.step()
    return rows


def summary(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Over runs and outer steps: the median and worst cosine, and the median distance relative to the exact length."""
    flat = [row for run in runs for row in run]
    return {
        name: {
            "cosine": round(float(np.median([row[name]["cosine"] for row in flat])), 4),
            "worst": round(min(row[name]["cosine"] for row in flat), 4),
            "distance": round(float(np.median([row[name]["distance"] / row["length"] for row in flat])), 4),
        }
        for name in APPROXIMATIONS
    }
