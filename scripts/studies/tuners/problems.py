"""The data sets, the model, and about 1, 3, 10, 100 or 10,000 hyperparameters with their ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import torch
from tasks import data
from tasks.supervised import Supervised, sgd
from torch import Tensor, nn
from torch.nn import functional as F

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


@cache
def housing(root: Path) -> tuple[Tensor, Tensor]:
    """Boston housing with all squares and products of its features: 104 columns."""
    x, y = (part.float() for part in data.table("boston", root))
    x = (x - x.mean(0)) / x.std(0)
    pairs = combinations_with_replacement(range(x.shape[1]), 2)
    return torch.cat([x, torch.stack([x[:, i] * x[:, j] for i, j in pairs], 1)], 1), y[:, None]


def garments(root: Path) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST, 14×14 pixels in a row."""
    x, y = data.small_fashion(root)
    return x.flatten(1), y


@cache
def letters(root: Path) -> tuple[Tensor, Tensor]:
    """8 letters of Moby-Dick, one-hot, and the letter that follows, at 12,000 places that do not overlap."""
    text = data.novel(root)
    stride = CONTEXT + 1
    rows = text[: len(text) // stride * stride].reshape(-1, stride)
    rows = rows[:: max(1, len(rows) // 12_000)]
    return F.one_hot(rows[:, :-1], len(data.LETTERS)).float().flatten(1), rows[:, -1]


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """How many examples a data set has in each part, the width of the hidden layer, and the first learning rate."""

    title: str
    read: Callable[[Path], tuple[Tensor, Tensor]]
    sizes: tuple[int, int, int]
    hidden: int
    lr: float


SETS = {
    "housing": DataSet(title="Boston housing", read=housing, sizes=(200, 100, 206), hidden=96, lr=0.01),
    "fashion": DataSet(title="Fashion-MNIST", read=garments, sizes=(200, 200, 3000), hidden=50, lr=0.2),
    "letters": DataSet(title="letters of Moby-Dick", read=letters, sizes=(400, 300, 4000), hidden=45, lr=0.25),
}


@dataclass(frozen=True, kw_only=True)
class Problem(Supervised):
    """A data set, a number of hyperparameters and a seed; ``steps`` of a training on batches of ``batch`` examples."""

    name: str
    count: int
    seed: int
    steps: int = 100
    batch: int = 50

    @classmethod
    def of(cls, name: str, count: int, seed: int, root: Path) -> Problem:
        """Read the data and split them by the seed. The model is an MLP, whose linear layers are named "0" and "2"."""
        own = SETS[name]
        x, y = own.read(root)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: sum(own.sizes)]
        train, val, test = order.split(list(own.sizes))
        if y.is_floating_point():
            x, y = data.standardised(x, train), data.standardised(y, train)
        outputs = 1 if y.is_floating_point() else int(y.max()) + 1

        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(x.shape[1], own.hidden), nn.ReLU(), nn.Linear(own.hidden, outputs))

        inner = partial(sgd, lr=own.lr, fused=True)
        return cls(x=x, y=y, train=train, val=val, test=test, make=make, inner=inner, name=name, count=count, seed=seed)

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


def from_groups(hparams: nn.ModuleDict, groups: Tensor) -> Tensor:
    """The decays of all weights from one decay for each tensor, for a search that cannot handle them all."""
    sizes = [recipe[name].numel() for _, recipe, name in entries(hparams)]
    return torch.cat([value.expand(size) for value, size in zip(groups, sizes, strict=True)])
