"""The five problems of the benchmark, with the hypergradients written by hand that hoptim is compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import hoptim

PROBLEMS = ("Iris MLP", "784 MLP", "small CNN", "logistic", "transformer")
DECAY = 1e-3
SEED = 1


@dataclass(frozen=True)
class Case:
    """A problem with its batches. The random seed is set before each call, so that dropout masks are always the same.

    ``unfused`` is the context that code written by hand needs, since fused attention has no second derivative.
    """

    name: str
    problem: hoptim.Problem
    batch: tuple[Tensor, Tensor]
    val_batch: tuple[Tensor, Tensor]
    unfused: Callable[[], AbstractContextManager[Any]] = nullcontext

    def gradient(self) -> tuple[Tensor, ...]:
        """A training gradient, the unit of times and peaks."""
        torch.default_generator.manual_seed(SEED)
        return torch.autograd.grad(self.problem.loss(self.batch), list(self.problem.weights().values()))

    def implicit(self, method: hoptim.Implicit, state: Any = None) -> hoptim.Hypergradient:
        """The hypergradient by hoptim. A failed solve is an error, since it may be cheap only because it stopped early."""
        torch.default_generator.manual_seed(SEED)
        result = method(self.problem, self.batch, self.val_batch, state)
        if not result.solution.status.ok:
            raise RuntimeError(f"{self.name}: {result.solution.status.name}: {result.solution.detail}")
        return result

    def by_hand(self, terms: int, step: float) -> list[Tensor]:
        """The same hypergradient, as one would write it for a single experiment: no checks, no norms, no status."""
        torch.default_generator.manual_seed(SEED)
        model, hparams = self.problem.model, self.problem.hparams
        weights, leaves = list(model.parameters()), list(hparams.parameters())
        with self.unfused():
            val_loss = self.problem.val_loss(model, hparams, self.val_batch)
            found = torch.autograd.grad(val_loss, [*weights, *leaves], allow_unused=True)
            g, direct = list(found[: len(weights)]), found[len(weights) :]
            model.train()
            loss = self.problem.train_loss(model, hparams, self.batch)
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            x = [value.clone() for value in g]
            for _ in range(terms):
                product = torch.autograd.grad(gradient, weights, g, retain_graph=True)
                torch._foreach_add_(g, product, alpha=-step)
                torch._foreach_add_(x, g)
            mixed = torch.autograd.grad(gradient, leaves, x)
        return [-step * m if d is None else d - step * m for d, m in zip(direct, mixed, strict=True)]

    def unrolled(self, steps: int, step: float) -> list[Tensor]:
        """Differentiate by hand through ``steps`` steps of gradient descent from the current weights."""
        weights = tuple(self.problem.model.parameters())
        leaves = tuple(self.problem.hparams.parameters())
        train, validate = self.function("train_loss"), self.function("val_loss")
        with self.unfused():
            for _ in range(steps):
                gradient = torch.autograd.grad(train(weights, leaves), weights, create_graph=True)
                weights = tuple(torch._foreach_sub(weights, torch._foreach_mul(gradient, step)))
            return list(torch.autograd.grad(validate(weights, leaves), leaves))

    def function(self, name: str) -> Callable[[Any, Any], Tensor]:
        """The named loss as a function of (weights, leaves), two tuples in the order of ``parameters()``."""
        model, hparams = self.problem.model, self.problem.hparams
        loss, batch = getattr(self.problem, name), self.batch if name == "train_loss" else self.val_batch
        both = nn.ModuleDict({"model": model, "hparams": hparams})
        both.forward = lambda: loss(model, hparams, batch)
        names = [name for name, _ in both.named_parameters()]

        def call(weights: Any, leaves: Any) -> Tensor:
            model.train()
            return functional_call(both, dict(zip(names, [*weights, *leaves], strict=True)))

        return call

    def composite(self) -> Case:
        """The same problem with its loss as a ``CompositeLoss``, which Gauss-Newton needs."""
        parts = self.problem
        loss = hoptim.CompositeLoss(predict, parts.train_loss.keywords["criterion"], parts.train_loss.keywords["penalty"])
        return replace(self, problem=hoptim.Problem(parts.model, parts.hparams, loss, parts.val_loss))

    def in_float64(self) -> Case:
        """A copy in float64, in which rounding does not flip a ReLU."""
        problem = self.problem
        model, hparams = copy.deepcopy(problem.model).double(), copy.deepcopy(problem.hparams).double()
        wide = hoptim.Problem(model, hparams, problem.train_loss, problem.val_loss)
        batches = [(x.double(), y) for x, y in (self.batch, self.val_batch)]
        return replace(self, problem=wide, batch=batches[0], val_batch=batches[1])


def predict(model: Any, _: Any, batch: Any) -> Tensor:
    return model(batch[0])


def train_loss(model: Any, hparams: Any, batch: Any, *, criterion: Any, penalty: Any) -> Tensor:
    return criterion(model(batch[0]), hparams, batch) + penalty(model, hparams)


def plain(z: Tensor, _: Any, batch: Any) -> Tensor:
    return cross_entropy(z, batch[1])


def weighted(z: Tensor, hparams: Any, batch: Any) -> Tensor:
    return (hparams["example"] * cross_entropy(z, batch[1], reduction="none")).mean()


def learned_decay(model: Any, hparams: Any) -> Tensor:
    return 0.5 * sum((hparams[name] * weight.square()).sum() for name, weight in model.named_parameters())


def fixed_decay(model: Any, _: Any) -> Tensor:
    return 0.5 * DECAY * sum(weight.square().sum() for weight in model.parameters())


def validation(model: Any, _: Any, batch: Any) -> Tensor:
    model.eval()
    return cross_entropy(model(batch[0]), batch[1])


class Encoder(nn.Module):
    """One transformer layer and a linear classifier on the mean over the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def network(name: str, dropout: float) -> tuple[nn.Module, int, tuple[int, ...], int]:
    """A model, its batch size, its input shape, and its number of classes."""
    if name == "Iris MLP":
        drop = [nn.Dropout(dropout)] if dropout else []
        layers = [nn.Linear(4, 128, bias=False), nn.ReLU(), *drop, nn.Linear(128, 128, bias=False), nn.ReLU(), *drop]
        return nn.Sequential(*layers, nn.Linear(128, 3, bias=False)), 60, (4,), 3
    if name == "784 MLP":
        return mlp(784, 256, 256, 10), 128, (784,), 10
    if name == "small CNN":
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, 10)), 64, (1, 28, 28), 10
    if name == "logistic":
        return nn.Sequential(nn.Linear(784, 10)), 5000, (784,), 10
    return Encoder(), 16, (32, 64), 10


def mlp(*sizes: int) -> nn.Module:
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers[:-1] for part in (layer, nn.ReLU())], layers[-1])


def make(name: str, each: str = "weight", *, dropout: float = 0.5, steps: int = 100) -> Case:
    """Classification of clusters with a fifth of the labels wrong, after ``steps`` steps of SGD (ten times that for Iris).

    The hyperparameters are a decay for each weight or each tensor, kept positive by exp; for "logistic" a weight for each
    of 5,000 examples, with a fixed decay. Only the Iris MLP has dropout.
    """
    model, size, shape, classes = network(name, dropout)
    return make_case(name, model, size, shape, classes, each, steps)


def make_case(
    name: str, model: nn.Module, size: int, shape: tuple[int, ...], classes: int, each: str = "weight", steps: int = 100
) -> Case:
    """The problem of :func:`make` for any model."""
    clusters = torch.arange(size) % classes
    inputs = torch.randn(size, *shape) + torch.randn(classes, *shape)[clusters]
    labels = torch.where(torch.rand(size) < 0.2, torch.randint(classes, (size,)), clusters)
    criterion, penalty = (weighted, fixed_decay) if name == "logistic" else (plain, learned_decay)
    if name == "logistic":
        values, kind, label = {"example": torch.ones(size)}, constraints.nonnegative, "logistic, 5,000 example weights"
    else:
        values = {n: torch.full_like(p if each == "weight" else p.mean(), DECAY) for n, p in model.named_parameters()}
        kind, label = constraints.positive, f"{name}, decay a {each}"
    hparams = hoptim.HyperParameters(values, dict.fromkeys(values, kind))
    problem = hoptim.Problem(model, hparams, partial(train_loss, criterion=criterion, penalty=penalty), validation)
    unfused = partial(sdpa_kernel, SDPBackend.MATH) if name == "transformer" else nullcontext
    case = Case(label, problem, (inputs, labels), (inputs + 0.5 * torch.randn_like(inputs), clusters), unfused)
    step = training(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), problem.loss, case.batch)
    for _ in range(10 * steps if name == "Iris MLP" else steps):  # hypersteps do not happen at the initial weights
        step()
    model.zero_grad()
    return case


def training(optimizer: torch.optim.Optimizer, loss: Callable[[Any], Tensor], batch: Any) -> Callable[[], None]:
    """One training step, as a function without arguments."""

    def step() -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def difference(ours: list[Tensor], theirs: list[Tensor], who: str, at_most: float = 1e-4) -> float:
    """The relative distance of two answers. Above ``at_most`` it is an error: comparing times would make no sense."""
    a, b = (torch.cat([value.flatten() for value in values]) for values in (ours, theirs))
    error = float((a - b).norm() / b.norm())
    if not error <= at_most:
        raise RuntimeError(f"{who}: the answers differ by {error:.2g}, more than {at_most:g}")
    return error
