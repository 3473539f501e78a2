"""Count what a training costs. The unit is one plain training of the same model: as many steps, on batches of the same size.

Costs are counted in training gradients of one batch. A step is 1. A forward pass over n examples is n/(3·batch), since a
backward pass costs twice a forward pass. A hyperstep is

    n_val/batch + 1 + 2·(products + 1):

the gradient of the validation loss, the gradient of the training loss with its graph, and two gradients for each product
with the curvature and for the mixed product (a product with a Hessian is the gradient of a gradient). Seconds are processor
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common.batches import shuffled
from torch import Tensor, nn

from tuner_study.problems import Problem

WORST = 1e6  # stands for the loss of a training that diverged
PARTS = 8  # a search that prunes looks at the validation loss after each eighth of a training


@dataclass
class Meter:
    """Counts the training gradients that a method has spent on a problem."""

    problem: Problem
    gradients: float = 0.0

    @property
    def trainings(self) -> float:
        """The cost so far in plain trainings."""
        return self.gradients / self.problem.steps

    def step(self) -> None:
        """Charge for a step on one batch."""
        self.gradients += 1

    def forward(self, examples: int) -> None:
        """Charge for the loss of some examples, without its gradient."""
        self.gradients += examples / (3 * self.problem.batch)

    def hyperstep(self, products: int) -> None:
        """Charge for a hypergradient on one training batch and all validation examples."""
        self.gradients += len(self.problem.val) / self.problem.batch + 1 + 2 * (products + 1)


class Pruned(Exception):  # noqa: N818 (it is not an error)
    """Raised to stop a training that is not worth finishing."""


def loop(problem: Problem, model: nn.Module, optimizer: Any, examples: Tensor, *, after: Callable[[int], None]) -> None:
    """The training loop of every method: shuffled batches, and a learning rate that falls linearly to zero."""
    for step, batch in enumerate(shuffled(examples, problem.batch, problem.steps), start=1):
        for group in optimizer.param_groups:
            group["lr"] = problem.set.lr * (1 - (step - 1) / problem.steps)
        model.train()
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
        after(step)


def train(
    problem: Problem,
    hparams: nn.Module,
    examples: Tensor,
    meter: Meter,
    *,
    after: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """A plain training with fixed hyperparameters and without hoptim's optimizer; its random numbers come from the seed."""
    torch.manual_seed(problem.seed)
    model = problem.make()
    hparams.requires_grad_(False)
    optimizer: Any = problem.inner(model)
    optimizer.loss = lambda batch: problem.loss(model, hparams, batch)

    def charge(step: int) -> None:
        meter.step()
        if after is not None:
            after(step, model)

    loop(problem, model, optimizer, examples, after=charge)
    return model


@torch.no_grad()
def loss_of(problem: Problem, model: nn.Module, examples: Tensor, meter: Meter) -> float:
    """The mean loss of these examples, ``WORST`` if the training diverged."""
    meter.forward(len(examples))
    found = float(problem.val_loss(model, None, examples))
    return min(found, WORST) if math.isfinite(found) else WORST


def trial(
    problem: Problem, hparams: nn.Module, meter: Meter, report: Callable[[int, float], None] | None = None
) -> tuple[nn.Module, float]:
    """Train with these hyperparameters; return the model and its validation loss.

    Args:
        problem: what is trained.
        hparams: the hyperparameters.
        meter: is charged for every step and every validation loss.
        report: for a search that prunes: called with the validation loss after each eighth; it may raise ``Pruned``.
    """
    looks = {round(part * problem.steps / PARTS): part for part in range(1, PARTS)}

    def after(step: int, model: nn.Module) -> None:
        if report is not None and step in looks:
            report(looks[step], loss_of(problem, model, problem.val, meter))

    model = train(problem, hparams, problem.train, meter, after=after)
    return model, loss_of(problem, model, problem.val, meter)
