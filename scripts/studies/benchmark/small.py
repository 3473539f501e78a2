"""What hoptim costs where a step is short: a small net with three recipes, beside the same loss written by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import mlp, training
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay

SIZES, EXAMPLES, BATCH, STEPS = (64, 64, 10), 200, 50, 1500  # as digits in the study of cross-validation
HYPERSTEPS = (60, 30, 20)
DECAY, WIDTH, SMOOTHING = 1e-2, 0.05, 0.05
X, Y = torch.rand(EXAMPLES, SIZES[0]), torch.arange(EXAMPLES) % SIZES[-1]


def plain(model: Any, hparams: Any, batch: Any) -> Tensor:
    return cross_entropy(model(X[batch]), Y[batch])


def recipes(model: Any, hparams: Any, batch: Any) -> Tensor:
    fit = hparams["smoothing"].cross_entropy(hparams["noise"].call(model, X[batch]), Y[batch])
    return fit + hparams["decay"].penalty(model)


def by_hand(model: Any, hparams: Any, batch: Any) -> Tensor:
    """The loss of ``recipes`` as one would write it without hoptim."""
    z = X[batch]
    for layer in model:
        z = layer(z + WIDTH * torch.randn_like(z) if isinstance(layer, nn.Linear) else z)
    penalty = DECAY * model[0].weight.square().sum() + DECAY * model[2].weight.square().sum()
    return cross_entropy(z, Y[batch], label_smoothing=SMOOTHING) + 0.5 * penalty


def decays(model: Any, hparams: Any, batch: Any) -> Tensor:
    """A loss by hand that reads two decays."""
    penalty = hparams["0"] * model[0].weight.square().sum() + hparams["2"] * model[2].weight.square().sum()
    return plain(model, hparams, batch) + 0.5 * penalty


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def three_recipes() -> nn.ModuleDict:
    model = mlp(*SIZES)
    noise, smoothing = NoiseWidth(model, start=WIDTH), LabelSmoothing(start=SMOOTHING)
    return nn.ModuleDict({"decay": WeightDecay(model, start=DECAY), "noise": noise, "smoothing": smoothing})


def two_decays() -> hoptim.HyperParameters:
    names = ("0", "2")
    return hoptim.HyperParameters(dict.fromkeys(names, torch.tensor(DECAY)), dict.fromkeys(names, constraints.positive))


def bare_step(loss: Callable[..., Tensor], hparams: Any = None) -> Callable[[], None]:
    model = mlp(*SIZES)
    return training(sgd(model), partial(loss, model, hparams), torch.arange(BATCH))


def wrapped_step(loss: Callable[..., Tensor], hparams: nn.Module) -> Callable[[], None]:
    model, outer = mlp(*SIZES), torch.optim.Adam(hparams.parameters())
    problem, val_batches = hoptim.Problem(model, hparams, loss, plain), [torch.arange(BATCH)]
    optimizer = hoptim.BilevelOptimizer(sgd(model), outer, problem, val_batches=val_batches, every=10**9)
    return training(optimizer, optimizer.loss, torch.arange(BATCH))


def small(rounds: int) -> list[Row]:
    """A step of a small net with three recipes, over the same loss by hand; and what the wrapper alone adds, in µs."""
    calls: Calls = {
        "recipes": wrapped_step(recipes, three_recipes()),
        "by hand": bare_step(by_hand),
        "wrapped": wrapped_step(decays, two_decays()),
        "same loss": bare_step(decays, two_decays().requires_grad_(False)),
    }
    times = in_turn(calls, 4 * rounds)
    added = 1e6 * median(a - b for a, b in zip(times["wrapped"], times["same loss"], strict=True))
    figures = {"by hand, ms": 1e3 * median(times["by hand"]), "recipes over by hand": ratio(times, "recipes", "by hand")}
    goals = {"recipes over by hand": 1.3, "wrapper, µs": 60.0}
    return [Row("MLP 64-64-10", {"inner": "SGD"}, {**figures, "wrapper, µs": added}, goals)]


def train(model: Any, optimizer: Any, examples: Tensor) -> None:
    """A training of ``STEPS`` steps on batches of ``BATCH``, the last one of an epoch smaller."""
    steps = 0
    while steps < STEPS:
        for batch in examples[torch.randperm(len(examples))].split(BATCH)[: STEPS - steps]:
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()
            steps += 1


def alone() -> None:
    """One training by hand."""
    model = mlp(*SIZES)
    optimizer: Any = sgd(model)
    optimizer.loss = partial(by_hand, model, None)
    train(model, optimizer, torch.arange(EXAMPLES))


def fit(hypersteps: int) -> None:
    """Learn over three folds, and train on everything."""
    settings = {"inner": sgd, "examples": EXAMPLES, "steps": STEPS, "hypersteps": hypersteps}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "weight '.*' is at")  # the labels are noise, so that decays grow without end
        hoptim.CrossValidated(lambda: mlp(*SIZES), three_recipes(), recipes, plain, **settings).fit(train)


def folds(rounds: int) -> list[Row]:
    """`CrossValidated` on a small net with three recipes: trainings of 1,500 steps by hand that a fit takes the time of."""
    calls: Calls = {"by hand": alone, **{str(count): partial(fit, count) for count in HYPERSTEPS}}
    times = in_turn(calls, max(1, rounds // 5))
    found = {str(count): ratio(times, str(count), "by hand") for count in HYPERSTEPS}
    column = "trainings by hand"
    return [Row("MLP 64-64-10", {"hypersteps": name}, {column: cost}, {column: 6.0}) for name, cost in found.items()]
