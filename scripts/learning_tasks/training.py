"""Train a task once, with a setting or without learning, and test it."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.batches import shuffled
from torch import Tensor, nn

import hoptim
from learning_tasks.settings import Setting, setting_of
from learning_tasks.tasks import Setup, Task

PLAIN, JOINED, FIXED = "plain", "joined", "fixed "


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of one run; its losses are infinite if they are not finite numbers.

    Attributes:
        test: the test loss.
        val: the validation loss of the last weights; with ``CrossValidated``, the last mean over the folds.
        skipped: how many hypersteps moved nothing.
        hypersteps: how many hypersteps there were.
        products: products with the curvature, over all hypersteps.
        seconds: processor time.
    """

    task: str
    setting: str
    seed: int
    test: float
    val: float
    skipped: int = 0
    hypersteps: int = 0
    products: int = 0
    seconds: float = 0.0


def references(task: Task) -> list[str]:
    """The names of the runs without learning: plain, joined (on validation data too) and with other fixed values."""
    joined = [] if task.folds else [JOINED]
    return [PLAIN, *joined, *(f"{FIXED}{value:g}" for value in task.grid if value != task.start)]


def run(name: str, task: Task, setting: str, seed: int, root: Path) -> Row:
    """Train and test. The split, the first weights and the order of the batches depend on the seed alone."""
    torch.manual_seed(1000 + seed)
    setup = task.setup(root)
    rows: list[dict[str, Any]] = []
    torch.manual_seed(seed)
    begun = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # failed solves warn, and are counted
        if setting in references(task):
            model, val = _fixed(task, setup, setting)
        else:
            model, val = _learned(task, setup, setting_of(setting), rows)
    seconds = time.process_time() - begun
    return Row(
        task=name, setting=setting, seed=seed, test=_loss(setup, model, setup.test), val=val,
        skipped=sum(not row["moved"] for row in rows), hypersteps=len(rows),
        products=sum(row["products"] for row in rows), seconds=round(seconds, 3),
    )  # fmt: skip


def _loss(setup: Setup, model: nn.Module, examples: Tensor) -> float:
    with torch.no_grad():
        found = float(setup.val_loss(model, None, examples))
    return found if found < float("inf") else float("inf")


def _loop(task: Task, model: nn.Module, optimizer: Any, examples: Tensor) -> None:
    """The training loop: shuffled batches, for as many steps as the task has."""
    for batch in shuffled(examples, task.size or len(examples), task.steps):
        model.train()
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()


def _train_loss(setup: Setup, shows_parts: bool) -> Any:
    """The loss with its parts, or as a function that hides them."""
    return setup.loss if shows_parts else lambda model, hparams, batch: setup.loss(model, hparams, batch)


def _learned(task: Task, setup: Setup, setting: Setting, rows: list[dict[str, Any]]) -> tuple[nn.Module, float]:
    loss = _train_loss(setup, task.shows_parts if setting.shows_parts is None else setting.shows_parts)
    shared: dict[str, Any] = {"hypergradient": setting.method, "hooks": [lambda record: rows.append(record.row())]}
    if task.folds:
        own = torch.cat([setup.train, setup.val])
        hparams = setup.hparams(setup.make(), task.start)
        cv = hoptim.CrossValidated(
            setup.make, hparams, _of(own, loss), _of(own, setup.val_loss), inner=setup.inner,
            outer=setting.outer(hparams), examples=len(own), steps=task.steps, folds=task.folds,
            warmup=setting.warmup, hypersteps=task.hypersteps, average=setting.average, **shared,
        )  # fmt: skip
        found = cv.fit(lambda model, optimizer, examples: _loop(task, model, optimizer, examples))
        return found.model, rows[-1]["val_loss"]
    model = setup.make()
    hparams = setup.hparams(model, task.start)
    optimizer = hoptim.BilevelOptimizer(
        setup.inner(model), setting.outer(hparams), hoptim.Problem(model, hparams, loss, setup.val_loss),
        val_batches=[setup.val], every=task.every, warmup=int(setting.warmup * task.steps), **shared,
    )  # fmt: skip
    _loop(task, model, optimizer, setup.train)
    return model, _loss(setup, model, setup.val)


def _of(own: Tensor, loss: Any) -> Any:
    """The same loss, for batches that are indices into ``own``."""
    if isinstance(loss, hoptim.CompositeLoss):
        return hoptim.CompositeLoss(_of(own, loss.predict), _of(own, loss.criterion), loss.penalty)
    return lambda first, hparams, batch: loss(first, hparams, own[batch])


def _fixed(task: Task, setup: Setup, setting: str) -> tuple[nn.Module, float]:
    start = float(setting.removeprefix(FIXED)) if setting.startswith(FIXED) else task.start
    both = torch.cat([setup.train, setup.val])

    def trained(examples: Tensor) -> nn.Module:
        model = setup.make()
        hparams = setup.hparams(model, start)
        problem = hoptim.Problem(model, hparams, setup.loss, setup.val_loss)
        outer = torch.optim.SGD(hparams.parameters(), lr=0.1)
        optimizer = hoptim.BilevelOptimizer(setup.inner(model), outer, problem, val_batches=[setup.val], every=None)
        _loop(task, model, optimizer, examples)
        return model

    if not task.folds:
        model = trained(both if setting == JOINED else setup.train)
        return model, _loss(setup, model, setup.val)
    seen = _loss(setup, trained(setup.train), setup.val)
    return trained(both), seen
