"""Small classifiers whose training can be repeated on many halves of the data, to see what each example does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from studies.example_influence.sentences import last_layer, sentences
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

DECAY = 1e-3  # of all weights, in the training loss


@dataclass(frozen=True)
class Task:
    """A data set, a network and how it is trained.

    Attributes:
        source: all inputs and labels, from the folder of the data sets.
        network: makes it, from the same folder.
        train, queries: how many examples of each there are.
        wrong: the share of training labels that are replaced by another class.
    """

    title: str
    source: Callable[[Path], tuple[Tensor, Tensor]]
    network: Callable[[Path], nn.Module]
    train: int
    queries: int
    wrong: float
    epochs: int
    batch: int
    lr: float

    def data(self, root: Path, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x and y for training, x and y of the queries, and which training labels are wrong."""
        x, y = self.source(root)
        draw = torch.Generator().manual_seed(1000 + seed)
        train, queries = torch.randperm(len(x), generator=draw)[: self.train + self.queries].split(
            [self.train, self.queries]
        )
        labels = y[train].clone()
        wrong = torch.randperm(self.train, generator=draw)[: round(self.wrong * self.train)]
        classes = int(y.max()) + 1
        labels[wrong] = (labels[wrong] + torch.randint(1, classes, (len(wrong),), generator=draw)) % classes
        return x[train], labels, x[queries], y[queries], torch.zeros(self.train, dtype=torch.bool).index_fill(0, wrong, True)

    def trained(self, root: Path, x: Tensor, y: Tensor, seed: int) -> nn.Module:
        """A network trained on these examples, by SGD with momentum and a rate that falls to zero."""
        torch.manual_seed(seed)
        model = self.network(root)
        steps = self.epochs * -(-len(x) // self.batch)
        optimizer = torch.optim.SGD(model.parameters(), self.lr, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(self.epochs):
            for index in torch.randperm(len(x)).split(self.batch):
                optimizer.zero_grad()
                loss_of(model, x[index], y[index]).backward()
                optimizer.step()
                schedule.step()
        return model


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each example."""
    return F.cross_entropy(model(x), y, reduction="none")


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Their mean and the decay."""
    return losses_of(model, x, y).mean() + 0.5 * DECAY * sum(p.square().sum() for p in model.parameters())


@cache
def digits(root: Path) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


@cache
def garments(root: Path) -> tuple[Tensor, Tensor]:
    found = FashionMNIST(root, download=True)
    return (found.data[:, None] / 255 - 0.286) / 0.353, found.targets


def mlp(inputs: int) -> Callable[[Path], nn.Module]:
    return lambda _: nn.Sequential(nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 10))


def cnn(root: Path) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


TASKS = {
    "digits": Task("digits", digits, mlp(64), 400, 60, 0.0, 150, 400, 0.5),
    "garments": Task("garments, MLP", garments, mlp(784), 1000, 40, 0.1, 30, 100, 0.03),
    "cnn": Task("garments, CNN", garments, cnn, 1000, 40, 0.1, 40, 50, 0.05),
    "sentences": Task("sentences, MiniLM", sentences, last_layer, 300, 20, 0.1, 10, 25, 0.01),
}
