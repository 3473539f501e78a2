"""The settings that are compared, each changing one factor of the default, and a solver that stops at the noise of g."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import hoptim
from hoptim import CG, MINRES, Exact, GaussNewton, Identity, Implicit, Neumann
from hoptim.curvature.linearization import Curvature
from hoptim.methods.method import Method, TrainingContext
from hoptim.problem.outer_adam import outer_adam, rates_of
from hoptim.solvers.solution import State
from learning_tasks.tasks import Task

Outer = Callable[[nn.Module], torch.optim.Optimizer]
DEFAULT = "MINRES 5, warm-up 0.25, Adam 0.05"
BY_CONSTRAINT, LEVELS = "rates by constraint", "levels"
JOINT = " & "


def on_leaves(hparams: nn.Module, *, kind: Any = torch.optim.Adam, lr: float = 0.05) -> torch.optim.Optimizer:
    """An outer optimizer with one rate for all hyperparameters."""
    return kind(hparams.parameters(), lr=lr)


def by_constraint(hparams: nn.Module) -> torch.optim.Optimizer:
    """Adam on each leaf by itself, at the rate of its constraint."""
    groups: dict[float, list[Tensor]] = {}
    for part in hparams.modules():
        if isinstance(part, hoptim.HyperParameters):
            for name, kind in part._constraints.items():
                groups.setdefault(rates_of(kind, part._transforms[name]).alone, []).append(part._leaf(name))
    return torch.optim.Adam([{"params": leaves, "lr": rate} for rate, leaves in groups.items()])


def _always(task: Task) -> bool:
    return True


@dataclass(frozen=True)
class ToNoise(Method):
    """MINRES that stops when the relative residual falls to the noise in g; solving further would fit that noise.

    The noise is the standard error of g over C chunks of the validation batch:
    tolerance = √(Σ_c ‖g_c − ḡ‖² / (C(C − 1))) / ‖ḡ‖.

    Args:
        chunks: C, the number of chunks of the validation batch, which is a tensor of indices.
        terms: the largest number of products.
        curvature: as in ``Implicit``.
    """

    chunks: int = 8
    terms: int = 50
    curvature: Curvature | None = None
    sees_options = False

    def _compute(
        self, problem: hoptim.Problem, train_batch: Any, val_batch: Any, state: State | None, loop: TrainingContext
    ) -> Any:
        tolerance = min(relative_noise(problem, val_batch.chunk(self.chunks)), 0.9)
        method = Implicit(MINRES(terms=self.terms, tolerance=tolerance), curvature=self.curvature)
        return method._compute(problem, train_batch, val_batch, state, loop)


def relative_noise(problem: hoptim.Problem, chunks: Iterable[Tensor]) -> float:
    """The standard error of the chunks' mean validation gradient, relative to the length of that mean."""
    model, rows = problem.model, []
    training = model.training
    weights = [w for w in model.parameters() if w.requires_grad]
    with problem.leave_no_trace():
        for chunk in chunks:
            found = torch.autograd.grad(problem.val_loss(model, problem.hparams, chunk), weights, allow_unused=True)
            rows.append(torch.cat([t.flatten() for t in found if t is not None]))
    model.train(training)
    g = torch.stack(rows)
    return float((g.var(0).sum() / len(g)).sqrt() / g.mean(0).norm())


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How hyperparameters are learned.

    Attributes:
        factor: which factor of the default it changes.
        solver: the hypergradient, without its curvature.
        curvature: the curvature of the hypergradient; ``None`` for hoptim's default.
        warmup: the share of the steps before the first hyperstep.
        outer: makes the outer optimizer.
        average: whether ``CrossValidated`` averages the leaves.
        shows_parts: whether hoptim sees the parts of the training loss; ``None`` leaves that to the task.
        differs: whether it changes anything in a task; where it does not, it is not run.
    """

    factor: str
    solver: Implicit | ToNoise = Implicit(MINRES(terms=5))  # noqa: RUF009 (it is frozen)
    curvature: Curvature | None = None
    warmup: float = 0.25
    outer: Outer = on_leaves
    average: bool = True
    shows_parts: bool | None = None
    differs: Callable[[Task], bool] = _always

    @property
    def method(self) -> Method:
        """The hypergradient."""
        return replace(self.solver, curvature=self.curvature)


def _solver(solver: hoptim.Solver, damping: float = 0.0) -> Setting:
    return Setting(factor="solver", solver=Implicit(solver, damping=damping))


def _outer(kind: Any, lr: float) -> Setting:
    return Setting(factor="outer", outer=partial(on_leaves, kind=kind, lr=lr))


SETTINGS: dict[str, Setting] = {
    DEFAULT: Setting(factor="default"),
    "Identity": _solver(Identity()),
    "Neumann 20": _solver(Neumann(terms=20)),
    **{f"MINRES {terms}": _solver(MINRES(terms=terms)) for terms in (3, 10, 20)},
    **{f"MINRES to {tolerance:g}": _solver(MINRES(terms=50, tolerance=tolerance)) for tolerance in (0.3, 0.1, 0.01)},
    "MINRES to the noise": Setting(factor="solver", solver=ToNoise()),
    **{f"CG {terms}": _solver(CG(terms=terms)) for terms in (5, 10, 20)},
    "CG 10, +0.1": _solver(CG(terms=10), 0.1),
    "CG to 0.03, +0.01": _solver(CG(terms=20, tolerance=0.03), 0.01),
    "exact Hessian": Setting(
        factor="curvature",
        curvature=Exact(),
        differs=lambda task: task.shows_parts,
    ),
    "Gauss-Newton": Setting(
        factor="curvature",
        curvature=GaussNewton(),
        shows_parts=True,
        differs=lambda task: not task.shows_parts,
    ),
    **{f"warm-up {share:g}": Setting(factor="warm-up", warmup=share) for share in (0.0, 0.1, 0.5)},
    **{f"Adam {lr:g}": _outer(torch.optim.Adam, lr) for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1)},
    **{f"SGD {lr:g}": _outer(torch.optim.SGD, lr) for lr in (1, 10)},
    BY_CONSTRAINT: Setting(factor="rates", outer=by_constraint),
    LEVELS: Setting(factor="rates", outer=outer_adam, differs=lambda task: "positive" in task.constraint),
    "last leaves": Setting(factor="average", average=False, differs=lambda task: task.folds is not None),
}


def setting_of(name: str) -> Setting:
    """The setting of that name; several names joined by `` & `` give the setting that has the changes of all of them."""
    if name in SETTINGS:
        return SETTINGS[name]
    found = SETTINGS[DEFAULT]
    for part in name.split(JOINT):
        own = SETTINGS[part]
        changed = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) != f.default}
        found = replace(found, **{**changed, "factor": "combination", "differs": _always})
    return found
