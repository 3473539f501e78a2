"""The problems of the fidelity study: data, model, losses and training, made from a seed and a data type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from studies.fidelity.truth import Tensors, Trained, Training, trained
from tasks import data, models
from tasks.iris import Iris
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

import hoptim

Batch = tuple[Tensor, ...]
LAG = 100  # training steps between two hypersteps


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A problem with its data; ``closed`` computes the true hypergradient in closed form, if there is one."""

    problem: hoptim.Problem
    train: Batch
    val: Batch
    closed: Callable[[], Tensors] | None = None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A problem of the study: how to make it from (seed, dtype, data root), and how to train it."""

    title: str
    make: Callable[[int, torch.dtype, Path], Setup]
    training: Training
    version: int = 1  # raise it when ``make`` changes, so that stored results are computed again

    @property
    def lag(self) -> int:
        """Training steps since the last hyperstep."""
        return min(LAG, self.training.steps // 2)

    def batches(self, setup: Setup, seed: int) -> Callable[[int], Batch]:
        """A function from a step to its batch: the whole training set, or shuffled batches that depend on the seed alone."""
        size, count = self.training.size, len(setup.train[0])
        if size is None:
            return lambda _: setup.train
        generator = torch.Generator().manual_seed(seed)
        epochs = math.ceil(self.training.steps / (count // size))
        order = [part for _ in range(epochs) for part in torch.randperm(count, generator=generator).split(size)]
        order = [part for part in order if len(part) == size]
        return lambda step: tuple(part[order[step]] for part in setup.train)

    def trained(self, seed: int, root: Path) -> Trained:
        """Train in float64, and compute the true hypergradient through the run or in closed form."""
        setup = self.make(seed, torch.float64, root)
        batches = self.batches(setup, seed)
        return trained(setup.problem, batches, setup.val, self.training, closed=setup.closed, lag=self.lag)


def decays(model: nn.Module, value: float, dtype: torch.dtype) -> hoptim.HyperParameters:
    """A positive decay for each weight."""
    values = {name: torch.full_like(p, value, dtype=dtype) for name, p in model.named_parameters()}
    return hoptim.HyperParameters(values, dict.fromkeys(values, constraints.positive))


def example_weights(count: int, dtype: torch.dtype) -> hoptim.HyperParameters:
    """A weight in (0, 1) for each training example, initially ½."""
    half = torch.full((count,), 0.5, dtype=dtype)
    return hoptim.HyperParameters({"example": half}, {"example": constraints.unit_interval})


def decayed(model: nn.Module, hparams: Any) -> Tensor:
    """½ Σ decay·w²."""
    return 0.5 * sum((hparams[name] * p.square()).sum() for name, p in model.named_parameters())


def constant_decay(value: float) -> Callable[[nn.Module, Any], Tensor]:
    """½·value·‖w‖², a penalty without hyperparameters."""
    return lambda model, _: 0.5 * value * sum(p.square().sum() for p in model.parameters())


def predict(model: nn.Module, hparams: nn.Module, batch: Batch) -> Tensor:
    return model(batch[0])


def plain_criterion(z: Tensor, hparams: Any, batch: Batch) -> Tensor:
    return cross_entropy(z, batch[1])


def weighted_criterion(z: Tensor, hparams: Any, batch: Batch) -> Tensor:
    """The mean of the examples' losses times their weights; the third part of a batch has the indices of the examples."""
    return (hparams["example"][batch[2]] * cross_entropy(z, batch[1], reduction="none")).mean()


def classification(model: nn.Module, hparams: nn.Module, criterion: Any, penalty: Any) -> hoptim.Problem:
    return hoptim.Problem(
        model,
        hparams,
        hoptim.CompositeLoss(predict, criterion, penalty),
        lambda model, _, batch: cross_entropy(model(batch[0]), batch[1]),
    )


def seeded(make: Callable[[], nn.Module], seed: int, dtype: torch.dtype) -> nn.Module:
    """The model, initialised in float32 and then converted, so that it starts at the same weights in float32 and float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return make().to(dtype)
    finally:
        torch.set_default_dtype(before)


def mislabelled(y: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """The labels, with ``share`` of them replaced by another class."""
    generator = torch.Generator().manual_seed(seed + 1000)
    wrong = torch.rand(len(y), generator=generator) < share
    shift = torch.randint(1, classes, (len(y),), generator=generator)
    return torch.where(wrong, (y + shift) % classes, y)


def ridge(seed: int, dtype: torch.dtype, root: Path, *, features: int = 30, count: int = 60) -> Setup:
    """Linear regression on features of decreasing scale, with a log decay for each: w* = (XᵀX/n + Λ)⁻¹ Xᵀy/n."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -1.5, features, dtype=torch.float64)
    x = torch.randn(2 * count, features, generator=generator, dtype=torch.float64) * scale
    truth = torch.randn(features, generator=generator, dtype=torch.float64)
    y = x @ truth + torch.randn(2 * count, generator=generator, dtype=torch.float64)
    train, val = [(x[part].to(dtype), y[part].to(dtype)) for part in (slice(count), slice(count, None))]
    model = seeded(lambda: nn.Linear(features, 1, bias=False), seed, dtype)
    hparams = decays(model, 1e-2, dtype)

    def squared(z: Tensor, hparams: Any, batch: Batch) -> Tensor:
        return 0.5 * (z[:, 0] - batch[1]).square().mean()

    def closed() -> Tensors:
        decay, (leaf,) = hparams["weight"][0], hparams.parameters()
        w = torch.linalg.solve(train[0].T @ train[0] / count + torch.diag(decay), train[0].T @ train[1] / count)
        (gradient,) = torch.autograd.grad(0.5 * (val[0] @ w - val[1]).square().mean(), [leaf])
        return {name: gradient for name, _ in hparams.named_parameters()}

    def validate(model: nn.Module, hparams: Any, batch: Batch) -> Tensor:
        return squared(model(batch[0]), hparams, batch)

    problem = hoptim.Problem(model, hparams, hoptim.CompositeLoss(predict, squared, decayed), validate)
    return Setup(problem=problem, train=train, val=val, closed=closed)


def iris(activation: type[nn.Module], *, wrong: float = 0.0, hidden: int = 128) -> Any:
    """The MLP of the Iris experiment without dropout, with a log decay for each weight."""

    def make(seed: int, dtype: torch.dtype, root: Path) -> Setup:
        task = Iris()
        parts = {name: (task.x[part].to(dtype), task.y[part]) for name, part in task.setup(seed).items()}
        x, y = parts["train"]

        def layers() -> nn.Module:
            first, second, last = (nn.Linear(*shape, bias=False) for shape in ((4, hidden), (hidden, hidden), (hidden, 3)))
            return nn.Sequential(first, activation(), second, activation(), last)

        model = seeded(layers, seed, dtype)
        problem = classification(model, decays(model, 0.01, dtype), plain_criterion, decayed)
        return Setup(problem=problem, train=(x, mislabelled(y, wrong, 3, seed) if wrong else y), val=parts["val"])

    return make


def digits(hidden: int | None, *, count: int = 200) -> Any:
    """Digits, 40 % of them with a wrong label, and a weight for each training example.

    The model is logistic regression with a fixed decay, which has a unique minimum, or an MLP with one hidden layer and
    without decay, which is stopped early.
    """

    def make(seed: int, dtype: torch.dtype, root: Path) -> Setup:
        x, y = data.table("digits")
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, val = order[:count], order[count : 2 * count]
        x = x.to(dtype) / 16

        def layers() -> nn.Module:
            if hidden is None:
                return nn.Linear(64, 10)
            return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

        model = seeded(layers, seed, dtype)
        penalty = constant_decay(1e-2) if hidden is None else None
        problem = classification(model, example_weights(count, dtype), weighted_criterion, penalty)
        labels = mislabelled(y[train], 0.4, 10, seed)
        return Setup(problem=problem, train=(x[train], labels, torch.arange(count)), val=(x[val], y[val]))

    return make


def cnn(*, count: int = 200) -> Any:
    """Two convolutions on a few hundred images of Fashion-MNIST, averaged to 14×14; 4,002 weights, a log decay for each."""

    def make(seed: int, dtype: torch.dtype, root: Path) -> Setup:
        x, y = data.fashion(root)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: 2 * count]
        x = nn.functional.avg_pool2d(x[order][:, None].to(dtype) / 255, 2)
        x, y = (x - 0.286) / 0.33, y[order]

        def layers() -> nn.Module:
            first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 24, 3, padding=1)
            return models.convolutions(first, second, features=216, pooled=True)

        model = seeded(layers, seed, dtype)
        problem = classification(model, decays(model, 3e-3, dtype), plain_criterion, decayed)
        return Setup(problem=problem, train=(x[:count], y[:count]), val=(x[count:], y[count:]))

    return make


LONG, SHORT = Training(steps=2000, lr=0.01), Training(steps=300, lr=0.02)
PROBLEMS = {
    "ridge": Spec(title="ridge, 30 log decays", make=ridge, training=Training(steps=3000, lr=0.1)),
    "logistic": Spec(
        title="logistic, 200 example weights, 40 % wrong", make=digits(None), training=Training(steps=1000, lr=0.2)
    ),
    "digits-mlp": Spec(
        title="digits MLP, 200 example weights, 40 % wrong", make=digits(32), training=Training(steps=200, lr=0.05)
    ),
    "iris-relu": Spec(title="Iris MLP, ReLU, 2,000 steps", make=iris(nn.ReLU), training=LONG),
    "iris-tanh": Spec(title="Iris MLP, tanh, 2,000 steps", make=iris(nn.Tanh), training=LONG),
    "iris-relu-100": Spec(title="Iris MLP, ReLU, 100 steps", make=iris(nn.ReLU), training=replace(SHORT, steps=100)),
    "iris-relu-300": Spec(title="Iris MLP, ReLU, 300 steps", make=iris(nn.ReLU), training=SHORT),
    "iris-tanh-300": Spec(title="Iris MLP, tanh, 300 steps", make=iris(nn.Tanh), training=SHORT),
    "iris-wrong": Spec(
        title="Iris MLP, ReLU, 40 % wrong, 500 steps", make=iris(nn.ReLU, wrong=0.4), training=replace(LONG, steps=500)
    ),
    "iris-wrong-16": Spec(
        title="Iris MLP, ReLU, 40 % wrong, batches of 16",
        make=iris(nn.ReLU, wrong=0.4),
        training=replace(LONG, steps=500, size=16),
    ),
    "cnn": Spec(title="CNN, Fashion-MNIST, 4,002 log decays", make=cnn(), training=Training(steps=500, lr=0.05)),
}
