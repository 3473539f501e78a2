"""The ways to tune, and what each costs: fixed values, random search, two samplers of Optuna, and hoptim.

All begin at the same values, have the same training and validation examples, and are generators that are asked for the next
result until their budget is spent. A result is the model with the lowest validation loss among those trained so far.

The unit of cost is a plain training of the same model: as many steps, on batches of the same size. It is counted in training
gradients of one batch. A step is 1. A forward pass over n examples is n/(3·batch), since a backward pass costs twice a
forward pass. A hyperstep is

    n_val/batch + 1 + 2·(products + 1):

the gradient of the validation loss, the gradient of the training loss with its graph, and two gradients for each product
with the curvature and for the mixed product (a product with a Hessian is the gradient of a gradient). Seconds are processor
time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common.search import gp_sampler, study_from, tpe_sampler
from studies.tuners.problems import RANGES, Problem, Range, entries, fill, from_groups, ranges_of
from tasks.loops import shuffled, train, with_loss
from torch import Tensor, nn

import hoptim

WORST = 1e6  # stands for the loss of a training that diverged
PARTS = 8  # a search that prunes looks at the validation loss after each eighth of a training
FACTOR, SINGLE = 3.0, 9.0  # times hoptim's rates: of levels and single leaves, and of entries that have a level
FALL = 0.85  # of these rates from one of hoptim's trainings to the next
FIXED = "fixed"
GOOD: dict[tuple[str, int], dict[str, float]] = {  # the best on other splits
    ("housing", 1): {"decay": 0.1},
    ("housing", 3): {"decay": 0.1},
    ("housing", 10): {"decay": 0.03},
    ("fashion", 1): {"decay": 0.01},
    ("fashion", 3): {"decay": 0.001, "noise": 0.3},
    ("fashion", 10): {"decay": 0.003},
    ("letters", 1): {"decay": 0.01},
    ("letters", 3): {"decay": 0.01, "dropout": 0.3},
    ("letters", 10): {"decay": 0.01},
}


@dataclass
class Meter:
    """Counts the training gradients that a method has spent on a problem."""

    problem: Problem
    gradients: float = 0.0

    @property
    def trainings(self) -> float:
        """The cost so far in plain trainings."""
        return self.gradients / self.problem.steps

    def step(self, _: int = 0) -> None:
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


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a method would return now.

    Attributes:
        model: the trained model.
        trainings: what has been spent so far, in plain trainings.
        val: the validation loss by which it was chosen.
        dropped: 1 for a trial that was pruned; for hoptim, how many hypersteps failed.
    """

    model: nn.Module
    trainings: float
    val: float
    dropped: int = 0


Method = Callable[[Problem, Meter], Iterator[Found]]


def loop(problem: Problem, model: nn.Module, optimizer: Any, after: Callable[[int], None]) -> None:
    """The training loop of every method."""
    batches = shuffled(problem.train, problem.batch, problem.steps)
    train(model, optimizer, batches, falling=problem.steps, after=after)


@torch.no_grad()
def loss_of(problem: Problem, model: nn.Module, examples: Tensor, meter: Meter) -> float:
    """The mean loss of these examples, ``WORST`` if the training diverged."""
    meter.forward(len(examples))
    found = float(problem.val_loss(model, None, examples))
    return min(found, WORST) if math.isfinite(found) else WORST


def trial(
    problem: Problem, hparams: nn.Module, meter: Meter, report: Callable[[int, float], None] | None = None
) -> tuple[nn.Module, float]:
    """Train with these hyperparameters fixed and without hoptim's optimizer; return the model and its validation loss.

    Args:
        problem: what is trained.
        hparams: the hyperparameters.
        meter: is charged for every step and every validation loss.
        report: for a search that prunes: called with the validation loss after each eighth; it may raise ``Pruned``.
    """
    torch.manual_seed(problem.seed)
    model, loss = problem.make(), problem.train_loss
    hparams.requires_grad_(False)
    looks = {round(part * problem.steps / PARTS): part for part in range(1, PARTS)}

    def after(step: int) -> None:
        meter.step()
        if report is not None and step in looks:
            report(looks[step], loss_of(problem, model, problem.val, meter))

    loop(problem, model, with_loss(problem.inner(model), lambda batch: loss(model, hparams, batch)), after)
    return model, loss_of(problem, model, problem.val, meter)


def fixed_values(problem: Problem) -> nn.ModuleDict:
    """The hyperparameters at the values that were good on other splits, the same value for all of a kind."""
    kinds, hparams = GOOD[problem.name, problem.count if problem.count <= 10 else 1], problem.hparams()
    for kind, recipe, name in entries(hparams):
        recipe[name] = torch.full_like(recipe[name].detach(), kinds.get(kind, RANGES[kind].start))
    return hparams


def drawn(ranges: list[Range], generator: np.random.Generator) -> Tensor:
    """One number from each range, uniform or log-uniform."""
    low, high = (
        np.array([math.log(getattr(r, end)) if r.log else getattr(r, end) for r in ranges]) for end in ("low", "high")
    )
    values = generator.uniform(low, high)
    return torch.tensor(np.where([r.log for r in ranges], np.exp(values), values), dtype=torch.float32)


def random_search(problem: Problem, meter: Meter) -> Iterator[Found]:
    """Try the starting values, then independent draws of all hyperparameters."""
    generator = np.random.default_rng(problem.seed)
    candidate = problem.hparams()
    ranges = ranges_of(candidate)
    best, lowest = trial(problem, candidate, meter)
    while True:
        yield Found(model=best, trainings=meter.trainings, val=lowest)
        model, val = trial(problem, fill(problem.hparams(), drawn(ranges, generator)), meter)
        if val < lowest:
            best, lowest = model, val


def optuna_search(problem: Problem, meter: Meter, *, sampler: Callable[[int], Any], prunes: bool = True) -> Iterator[Found]:
    """Optuna with the sampler that ``sampler(seed)`` makes. Its first trial is the starting values.

    In place of 10,000 decays it searches one for each tensor. With ``prunes`` it has the median pruner.
    """
    import optuna

    grouped = problem.count > 1000
    tensors = len(list(entries(problem.hparams())))
    ranges = [RANGES["decay"]] * tensors if grouped else ranges_of(problem.hparams())
    names = [f"h{number}" for number in range(len(ranges))]
    start = {name: one.start for name, one in zip(names, ranges, strict=True)}
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2) if prunes else optuna.pruners.NopPruner()
    study = study_from(start, sampler(problem.seed), pruner)
    best, lowest = problem.make_quietly(), math.inf
    while True:
        asked = study.ask()
        values = [asked.suggest_float(name, r.low, r.high, log=r.log) for name, r in zip(names, ranges, strict=True)]
        vector, candidate = torch.tensor(values, dtype=torch.float32), problem.hparams()
        candidate = fill(candidate, from_groups(candidate, vector) if grouped else vector)
        try:
            model, val = trial(problem, candidate, meter, _pruning(asked) if prunes else None)
        except Pruned:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            yield Found(model=best, trainings=meter.trainings, val=lowest, dropped=1)
            continue
        study.tell(asked, val)
        if val < lowest:
            best, lowest = model, val
        yield Found(model=best, trainings=meter.trainings, val=lowest)


def _pruning(asked: Any) -> Callable[[int, float], None]:
    """A function that reports a validation loss to Optuna's trial, and stops the training if its pruner says so."""

    def report(part: int, val: float) -> None:
        asked.report(val, part)
        if asked.should_prune():
            raise Pruned

    return report


def learned(problem: Problem, meter: Meter) -> Iterator[Found]:
    """hoptim: whole trainings with fixed hyperparameters, and one hyperstep after each.

    The rates are ``FACTOR`` times those for the many hypersteps of one training, of entries that share a level ``SINGLE``
    times, and fall. From values whose training ended worse than the first, or diverged, the hyperparameters go half-way
    back to the best.
    """
    hparams = problem.hparams()
    leaves, outer = list(hparams.parameters()), hoptim.outer_adam(hparams, validation=len(problem.val))
    for group in outer.param_groups:
        group["lr"] *= SINGLE if "pull" in group else FACTOR
    falling = torch.optim.lr_scheduler.ExponentialLR(outer, FALL)
    best, kept, losses, failed = problem.make_quietly(), leaves, [math.inf], 0
    while True:
        torch.manual_seed(problem.seed)  # as in every trial of the other methods
        model, tried = problem.make(), [leaf.detach().clone() for leaf in leaves]
        stated = hoptim.Problem(model, hparams, problem.train_loss, problem.val_loss)
        optimizer = hoptim.BilevelOptimizer(problem.inner(model), outer, stated, val_batches=[problem.val], every=None)
        loop(problem, model, optimizer, meter.step)
        val = loss_of(problem, model, problem.val, meter)
        if val < min(losses):
            best, kept = model, tried
        losses.append(val)
        yield Found(model=best, trainings=meter.trainings, val=min(losses), dropped=failed)
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a solve fails if the training diverged
            record = optimizer.hyperstep()
        failed = int(not record.moved)
        meter.hyperstep(record.result.solution.products)
        falling.step()
        if val > losses[1]:
            with torch.no_grad():
                for leaf, good, bad in zip(leaves, kept, tried, strict=True):
                    leaf.copy_((good + bad) / 2)


METHODS: dict[str, Method] = {
    "random": random_search,
    "optuna": partial(optuna_search, sampler=tpe_sampler),
    "gp": partial(optuna_search, sampler=partial(gp_sampler, n_startup_trials=4), prunes=False),
    "hoptim": learned,
}
