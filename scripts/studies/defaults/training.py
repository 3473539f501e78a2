"""The settings that are compared, each changing one factor of the default, and the training of a task with one of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from studies.defaults.tasks import Setup, Task
from tasks.loops import shuffled, train, with_loss
from torch import Tensor, nn

import hoptim
from hoptim import CG, EKFAC, MINRES, Exact, GaussNewton, Identity, Implicit, Neumann

DEFAULT = "MINRES 5, warm-up 0.25, Adam 0.05"
BY_CONSTRAINT, LEVELS = "rates by constraint", "levels"
PLAIN, JOINED, FIXED = "plain", "joined", "fixed "  # without learning
RATES = {"positive": 0.05, "unit interval": 0.3, "real": 0.1, "non-negative": 0.01}

Outer = Callable[[Task, nn.Module], torch.optim.Optimizer]


def on_leaves(_: Task, hparams: nn.Module, *, kind: Any = torch.optim.Adam, lr: float = 0.05) -> torch.optim.Optimizer:
    """An outer optimizer with one rate for all hyperparameters."""
    return kind(hparams.parameters(), lr=lr)


def by_constraint(task: Task, hparams: nn.Module) -> torch.optim.Optimizer:
    """Adam on each leaf by itself, at the rate of its constraint."""
    own, unit = RATES[task.constraint.split(",")[0]], dict.fromkeys(("noise", "smoothing"), RATES["unit interval"])
    named = hparams.named_parameters()
    return torch.optim.Adam([{"params": [leaf], "lr": unit.get(name.split(".")[0], own)} for name, leaf in named])


def levels(_: Task, hparams: nn.Module) -> torch.optim.Optimizer:
    """hoptim's own."""
    return hoptim.outer_adam(hparams)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How hyperparameters are learned.

    Attributes:
        method: the hypergradient.
        warmup: the share of the steps before the first hyperstep.
        outer: makes the outer optimizer.
        average: whether ``CrossValidated`` averages the leaves.
        shows_parts: whether hoptim sees the parts of the training loss; ``None`` leaves that to the task.
        differs: whether it changes anything in a task; where it does not, it is not run.
        factored: whether the method is preconditioned by the Kronecker factors of the model.
    """

    method: Any = Implicit(MINRES(terms=5))  # noqa: RUF009 (it is frozen)
    warmup: float = 0.25
    outer: Outer = on_leaves
    average: bool = True
    shows_parts: bool | None = None
    differs: Callable[[Task], bool] = lambda _: True
    factored: bool = False

    def method_on(self, model: nn.Module, setup: Setup) -> Any:
        """The hypergradient in a training of this model."""
        if not self.factored:
            return self.method
        batches = [(setup.x[setup.train], setup.y[setup.train])]
        return replace(self.method, preconditioner=EKFAC(model=model, criterion=nn.CrossEntropyLoss(), batches=batches))


def _solved(solver: hoptim.Solver, damping: float = 0.0) -> Setting:
    return Setting(method=Implicit(solver, damping=damping))


def _factored(solver: hoptim.Solver) -> Setting:
    return Setting(method=Implicit(solver), factored=True, differs=lambda task: task.has_factors)


def _curved(curvature: Any, *, where: bool) -> Setting:
    method, shows = Implicit(MINRES(terms=5), curvature=curvature), None if where else True
    return Setting(method=method, shows_parts=shows, differs=lambda task: task.shows_parts is where)


SETTINGS: dict[str, Setting] = {
    DEFAULT: Setting(),
    "Identity": _solved(Identity()),
    "Neumann 20": _solved(Neumann(terms=20)),
    **{f"MINRES {terms}": _solved(MINRES(terms=terms)) for terms in (3, 10, 20)},
    **{f"MINRES to {tolerance:g}": _solved(MINRES(terms=50, tolerance=tolerance)) for tolerance in (0.3, 0.1, 0.01)},
    **{f"CG {terms}": _solved(CG(terms=terms)) for terms in (5, 10, 20)},
    "CG 10, +0.1": _solved(CG(terms=10), 0.1),
    "CG to 0.03, +0.01": _solved(CG(terms=20, tolerance=0.03), 0.01),
    "EKFAC": _factored(Identity()),
    "EKFAC MINRES 3": _factored(MINRES(terms=3)),
    "exact Hessian": _curved(Exact(), where=True),
    "Gauss-Newton": _curved(GaussNewton(), where=False),
    **{f"warm-up {share:g}": Setting(warmup=share) for share in (0.0, 0.1, 0.5)},
    **{f"Adam {lr:g}": Setting(outer=partial(on_leaves, lr=lr)) for lr in (0.003, 0.01, 0.03, 0.1, 0.3, 1)},
    **{f"SGD {lr:g}": Setting(outer=partial(on_leaves, kind=torch.optim.SGD, lr=lr)) for lr in (1, 10)},
    BY_CONSTRAINT: Setting(outer=by_constraint),
    LEVELS: Setting(outer=levels, differs=lambda task: "positive" in task.constraint),
    "last leaves": Setting(average=False, differs=lambda task: task.folds is not None),
}


def references(task: Task) -> list[str]:
    """The names of the runs without learning: plain, joined (on validation data too) and with other fixed values."""
    joined = [] if task.folds else [JOINED]
    return [PLAIN, *joined, *(f"{FIXED}{value:g}" for value in task.grid if value != task.start)]


def run(task: Task, setting: str, seed: int, root: Path) -> dict[str, float]:
    """Train and test. The split, the first weights and the order of the batches depend on the seed alone.

    Returns:
        The test loss; the validation loss of the last weights, with ``CrossValidated`` the last mean over folds; how many
        hypersteps moved nothing, how many there were, and their products; processor time.
    """
    torch.manual_seed(1000 + seed)
    setup = task.setup(root)
    rows: list[dict[str, Any]] = []
    torch.manual_seed(seed)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failed solves warn, and are counted
        learns = setting not in references(task)
        model, val = _learned(task, setup, SETTINGS[setting], rows) if learns else _fixed(task, setup, setting)
    return {
        "test": _loss(setup, model, setup.test), "val": val, "skipped": sum(not row["moved"] for row in rows),
        "hypersteps": len(rows), "products": sum(row["products"] for row in rows), "seconds": time.process_time() - begun,
    }  # fmt: skip


@torch.no_grad()
def _loss(setup: Setup, model: nn.Module, examples: Tensor) -> float:
    found = float(setup.val_loss(model, None, examples))
    return found if found < float("inf") else float("inf")


def _loop(task: Task, model: nn.Module, optimizer: Any, examples: Tensor) -> None:
    train(model, optimizer, shuffled(examples, task.size or len(examples), task.steps))


def _learned(task: Task, setup: Setup, setting: Setting, rows: list[dict[str, Any]]) -> tuple[nn.Module, float]:
    own = torch.cat([setup.train, setup.val])
    given = replace(setup, x=setup.x[own], y=setup.y[own]) if task.folds else setup
    loss: Any = given.train_loss
    if not (task.shows_parts if setting.shows_parts is None else setting.shows_parts):
        parts, loss = loss, lambda model, hparams, batch: parts(model, hparams, batch)
    model = setup.make()
    method, hooks = setting.method_on(model, setup), [lambda record: rows.append(record.row())]
    shared: dict[str, Any] = {"hypergradient": method, "hooks": hooks}
    hparams = setup.hparams(model, task.start)
    outer = setting.outer(task, hparams)
    if task.folds:
        cv = hoptim.CrossValidated(
            setup.make, hparams, loss, given.val_loss, inner=setup.inner, outer=outer, examples=len(own), steps=task.steps,
            folds=task.folds, warmup=setting.warmup, hypersteps=task.hypersteps, average=setting.average, **shared,
        )  # fmt: skip
        found = cv.fit(lambda model, optimizer, examples: _loop(task, model, optimizer, examples))
        return found.model, rows[-1]["val_loss"]
    optimizer = hoptim.BilevelOptimizer(
        setup.inner(model), outer, hoptim.Problem(model, hparams, loss, setup.val_loss),
        val_batches=[setup.val], every=task.every, warmup=int(setting.warmup * task.steps), **shared,
    )  # fmt: skip
    _loop(task, model, optimizer, setup.train)
    return model, _loss(setup, model, setup.val)


def _fixed(task: Task, setup: Setup, setting: str) -> tuple[nn.Module, float]:
    start = float(setting.removeprefix(FIXED)) if setting.startswith(FIXED) else task.start
    both = torch.cat([setup.train, setup.val])

    def trained(examples: Tensor) -> nn.Module:
        model = setup.make()
        hparams, loss = setup.hparams(model, start).requires_grad_(False), setup.train_loss
        _loop(task, model, with_loss(setup.inner(model), lambda batch: loss(model, hparams, batch)), examples)
        return model

    if not task.folds:
        model = trained(both if setting == JOINED else setup.train)
        return model, _loss(setup, model, setup.val)
    seen = _loss(setup, trained(setup.train), setup.val)
    return trained(both), seen
