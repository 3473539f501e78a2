"""The data sets, the model, and about 1, 3, 10, 100 or 10,000 hyperparameters with their ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from learning_tasks import data
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import Dropout, LabelSmoothing, NoiseWidth, WeightDecay

COUNTS = (1, 3, 10, 100, 10_000)
CONTEXT = 8  # letters from which the next one is predicted


@dataclass(frozen=True, kw_only=True)
class Range:
    """The range of a kind of hyperparameter, in which the searches look, and the start of every method."""

    low: float
    high: float
    start: float
    log: bool = False


RANGES = {
    "decay": Range(low=1e-5, high=1.0, start=1e-3, log=True),
    "lasso": Range(low=1e-6, high=1e-1, start=1e-4, log=True),
    "noise": Range(low=0.005, high=0.95, start=0.05),
    "dropout": Range(low=0.005, high=0.7, start=0.05),
    "smoothing": Range(low=0.001, high=0.4, start=0.02),
}


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set: how it is read and split, and how its model is trained.

    Attributes:
        title: its name in the tables and the picture.
        read: reads x and y from the folder of the data.
        train: how many examples the model trains on.
        val: how many validation examples there are; hyperparameters are tuned and models are chosen by their loss.
        test: how many test examples there are at most.
        hidden: the width of the hidden layer.
        lr: the first learning rate of SGD with momentum 0.9, which falls to zero; the same for all methods.
        steps: of one training.
        batch: examples in a step.
    """

    title: str
    read: Callable[[Path], tuple[Tensor, Tensor]]
    train: int
    val: int
    test: int
    hidden: int
    lr: float
    steps: int = 100
    batch: int = 50


@cache
def housing(root: Path) -> tuple[Tensor, Tensor]:
    """Boston housing with all squares and products of its features: 104 columns."""
    x, y = data.boston(root)
    x = (x - x.mean(0)) / x.std(0)
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    return torch.cat([x, torch.stack([x[:, i] * x[:, j] for i, j in pairs], 1)], 1), y


@cache
def garments(root: Path) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST, 14×14 pixels in a row."""
    x, y = data.fashion(root)
    return x.flatten(1), y


@cache
def letters(root: Path) -> tuple[Tensor, Tensor]:
    """8 letters of Moby-Dick, one-hot, and the letter that follows, at 12,000 places that do not overlap."""
    text = data.novel(root)
    stride = CONTEXT + 1
    rows = text[: len(text) // stride * stride].reshape(-1, stride)
    rows = rows[:: max(1, len(rows) // 12_000)]
    return F.one_hot(rows[:, :-1], len(data.LETTERS)).float().flatten(1), rows[:, -1]


SETS = {
    "housing": DataSet(
        title="Boston housing", read=housing, train=200, val=100, test=206, hidden=96, lr=0.01,
    ),
    "fashion": DataSet(
        title="Fashion-MNIST", read=garments, train=200, val=200, test=3000, hidden=50, lr=0.2,
    ),
    "letters": DataSet(
        title="letters of Moby-Dick", read=letters, train=400, val=300, test=4000, hidden=45, lr=0.25,
    ),
}  # fmt: skip


class Through:
    """A model with the changed inputs of one recipe, which another recipe can call."""

    def __init__(self, model: Any, inputs: Any) -> None:
        self.model, self.inputs = model, inputs

    def __call__(self, x: Tensor) -> Tensor:
        return self.inputs.call(self.model, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class Problem:
    """A data set, a number of hyperparameters and a seed. A batch is a tensor of indices."""

    def __init__(self, name: str, count: int, seed: int, root: Path) -> None:
        self.name, self.count, self.seed, self.set = name, count, seed, SETS[name]
        x, y = self.set.read(root)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        sizes = (self.set.train, self.set.val, self.set.test)
        self.train, self.val, self.test = order[: sum(sizes)].split([*sizes[:2], len(order[: sum(sizes)]) - sum(sizes[:2])])
        self.has_classes = not y.is_floating_point()
        self.x = data.standardised(x, self.train) if not self.has_classes else x
        self.y = y if self.has_classes else data.standardised(y, self.train)
        self.outputs = int(y.max()) + 1 if self.has_classes else 1
        self.loss = hoptim.CompositeLoss(self._predict, self._criterion, self._penalty)
        self.steps, self.batch = self.set.steps, self.set.batch

    def make(self) -> nn.Module:
        """A new MLP with one hidden layer; its linear layers are named "0" and "2"."""
        width = self.set.hidden
        return nn.Sequential(nn.Linear(self.x.shape[1], width), nn.ReLU(), nn.Linear(width, self.outputs))

    def inner(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.set.lr, momentum=0.9, fused=True)

    def hparams(self) -> nn.ModuleDict:
        """New hyperparameters at their starts.

        - 1: a decay;
        - 3: a decay, noise at the input, dropout at the hidden layer;
        - 10: a decay for each tensor, biases included, noise and dropout for each layer, a lasso and, for classes, label
          smoothing;
        - 100: a decay for each unit; 10,000: a decay for each weight.
        """
        model, count = self.make_quietly(), self.count
        start = {kind: one.start for kind, one in RANGES.items()}
        per: Any = {1: "global", 3: "global", 10: "tensor", 100: "channel", 10_000: "weight"}[count]
        parts: dict[str, nn.Module] = {"decay": WeightDecay(model, per=per, start=start["decay"])}
        if count in (3, 10):
            parts["noise"] = NoiseWidth(model, ["0"] if count == 3 else None, start=start["noise"])
            parts["dropout"] = Dropout(model, ["2"] if count == 3 else None, start=start["dropout"])
        if count == 10:
            parts["decay"] = WeightDecay(model, start=start["decay"], include=lambda *_: True)
            parts["lasso"] = WeightDecay(model, per="global", norm=1, start=start["lasso"])
        if count == 10 and self.has_classes:
            parts["smoothing"] = LabelSmoothing(start=start["smoothing"])
        return nn.ModuleDict(parts)

    def make_quietly(self) -> nn.Module:
        """A new model, made without advancing the random number generator."""
        with torch.random.fork_rng():
            return self.make()

    def _predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        if "noise" not in hparams:
            return model(self.x[batch])
        return hparams["noise"].call(Through(model, hparams["dropout"]), self.x[batch])

    def _criterion(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        if "smoothing" in hparams:
            return hparams["smoothing"].cross_entropy(z, self.y[batch])
        return self._fit(z, batch)

    def _penalty(self, model: Any, hparams: Any) -> Tensor:
        found = hparams["decay"].penalty(model)
        return found + hparams["lasso"].penalty(model) if "lasso" in hparams else found

    def _fit(self, z: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(z, self.y[batch]) if self.has_classes else F.mse_loss(z, self.y[batch])

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The loss of validation and test, in evaluation mode."""
        return self._fit(model.eval()(self.x[batch]), batch)


def entries(hparams: nn.ModuleDict) -> Iterator[tuple[str, Any, str]]:
    """For each tensor of hyperparameters: its kind, its recipe, and its name in the recipe."""
    for kind, recipe in hparams.items():
        for name in recipe:
            yield kind, recipe, name


def ranges_of(hparams: nn.ModuleDict) -> list[Range]:
    """The range of each single hyperparameter."""
    return [RANGES[kind] for kind, recipe, name in entries(hparams) for _ in range(recipe[name].numel())]


def fill(hparams: nn.ModuleDict, values: Tensor) -> nn.ModuleDict:
    """Set the natural values of all hyperparameters from a vector."""
    sizes = [recipe[name].numel() for _, recipe, name in entries(hparams)]
    for (_, recipe, name), part in zip(entries(hparams), values.split(sizes), strict=True):
        recipe[name] = part.reshape(recipe[name].shape)
    return hparams


def from_groups(problem: Problem, groups: Tensor) -> Tensor:
    """The decays of all weights from one decay for each tensor, for a search that cannot handle them all."""
    shapes = [recipe[name].numel() for _, recipe, name in entries(problem.hparams())]
    return torch.cat([value.expand(size) for value, size in zip(groups, shapes, strict=True)])
