"""The ways to tune: fixed values, random search, two samplers of Optuna, and hoptim. Each is a generator of results.

All begin at the same values, have the same training and validation examples, and are asked for the next result until their
budget is spent. A result is the model with the lowest validation loss among those trained so far.
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
from torch import Tensor, nn

import hoptim
from tuner_study.costs import Meter, Pruned, loop, loss_of, trial
from tuner_study.problems import RANGES, Problem, Range, entries, fill, from_groups, ranges_of

FACTOR, SINGLE = (
    3.0,
    9.0,
)  # times the rates of hparams.optimizer(): of levels and single leaves, and of entries that have one
FALL = 0.85  # of these rates from one of hoptim's trainings to the next


@dataclass(frozen=True, kw_only=True)
class Found:
    """A result: what a method would return now.

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


FIXED = "fixed"
GOOD: dict[tuple[str, int], dict[str, float]] = {  # chosen by choose.py
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

Method = Callable[[Problem, Meter], Iterator[Found]]


def fixed_values(problem: Problem) -> nn.ModuleDict:
    """The hyperparameters at the values that were good on other splits, the same value for all of a kind."""
    return at(problem, GOOD[problem.name, problem.count if problem.count <= 10 else 1])


def at(problem: Problem, kinds: dict[str, float]) -> nn.ModuleDict:
    """The hyperparameters, all of a kind at the given value, and the other kinds at their start."""
    hparams = problem.hparams()
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
        vector = torch.tensor(values, dtype=torch.float32)
        candidate = fill(problem.hparams(), from_groups(problem, vector) if grouped else vector)
        try:
            model, val = trial(problem, candidate, meter, pruning(asked) if prunes else None)
        except Pruned:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            yield Found(model=best, trainings=meter.trainings, val=lowest, dropped=1)
            continue
        study.tell(asked, val)
        if val < lowest:
            best, lowest = model, val
        yield Found(model=best, trainings=meter.trainings, val=lowest)


def pruning(asked: Any) -> Callable[[int, float], None]:
    """A function that reports a validation loss to Optuna's trial, and stops the training if its pruner says so."""

    def report(part: int, val: float) -> None:
        asked.report(val, part)
        if asked.should_prune():
            raise Pruned

    return report


def learned(
    problem: Problem, meter: Meter, *, factor: float = FACTOR, single: float = SINGLE, fall: float = FALL
) -> Iterator[Found]:
    """hoptim: whole trainings with fixed hyperparameters, and one hyperstep after each.

    The rates are ``factor`` times those for the many hypersteps of one training, of entries that share a level ``single``
    times, and fall. From values whose training ended worse than the first, or diverged, the hyperparameters go half-way
    back to the best.
    """
    hparams = problem.hparams()
    leaves, outer = list(hparams.parameters()), hoptim.outer_adam(hparams, validation=len(problem.val))
    for group in outer.param_groups:
        group["lr"] *= single if "pull" in group else factor
    falling = torch.optim.lr_scheduler.ExponentialLR(outer, fall)
    best, kept, losses, failed = problem.make_quietly(), leaves, [math.inf], 0
    while True:
        torch.manual_seed(problem.seed)  # as in every trial of the other methods
        model, tried = problem.make(), [leaf.detach().clone() for leaf in leaves]
        stated = hoptim.Problem(model, hparams, problem.loss, problem.val_loss)
        optimizer = hoptim.BilevelOptimizer(problem.inner(model), outer, stated, val_batches=[problem.val], every=None)
        loop(problem, model, optimizer, problem.train, after=lambda _: meter.step())
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
