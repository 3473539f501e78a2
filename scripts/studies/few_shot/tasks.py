"""Two kinds of few-shot tasks: sinusoids of any height and phase, and five classes of digits and garments at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tasks import data
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]  # inputs and targets, with a leading axis of tasks
CLASSES, QUERIES = 5, 15  # classes of a task, and query images of each of them
TRAINING = 12  # classes for meta-training, of twenty
CHANNELS = 16
FEATURES = 4 * CHANNELS  # what the last layer sees


def sinusoids(count: int, shots: int, queries: int, generator: torch.Generator) -> tuple[Batch, Batch]:
    """Support and query points of y = A sin(x − φ), as in section 5.1 of Finn, Abbeel and Levine 2017."""

    def uniform(low: float, high: float, points: int) -> Tensor:
        return low + (high - low) * torch.rand(count, points, 1, generator=generator)

    height, phase, x = uniform(0.1, 5.0, 1), uniform(0.0, torch.pi, 1), uniform(-5.0, 5.0, shots + queries)
    y = height * (x - phase).sin()
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def regressor() -> nn.Sequential:
    """The network of that section: two hidden layers of 40 units."""
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


@dataclass(frozen=True)
class Classes:
    """Classes of images, from which tasks are drawn.

    Attributes:
        images: of each class, of shape (classes, images, 1, 14, 14).
        rotated: whether an image class of a task is turned by 0, 90, 180 or 270 degrees, each time another.
    """

    images: Tensor
    rotated: bool

    def tasks(self, count: int, shots: int, generator: torch.Generator) -> tuple[Batch, Batch]:
        """Support and query images of ``count`` tasks, each of five classes; one class comes in one rotation alone."""
        classes, held, size = len(self.images), self.images.shape[1], shots + QUERIES
        drawn = torch.rand(count, classes, generator=generator).argsort(1)[:, :CLASSES, None]
        places = torch.randint(held, (count, CLASSES, size), generator=generator)
        turns = torch.randint(4 if self.rotated else 1, (count, CLASSES), generator=generator)
        x = self.images[drawn, places]
        x = torch.stack(
            [torch.stack([turned(*pair) for pair in zip(*both, strict=True)]) for both in zip(x, turns, strict=True)]
        )
        y = torch.arange(CLASSES)[:, None].expand(count, CLASSES, size)
        return _flat(x[:, :, :shots], y[:, :, :shots]), _flat(x[:, :, shots:], y[:, :, shots:])

    def examples(self, count: int, generator: torch.Generator) -> Batch:
        """Images for an ordinary classifier, in which each rotation of a class is a class of its own."""
        label, turn = (torch.randint(n, (count,), generator=generator) for n in (len(self.images), 4))
        x = self.images[label, torch.randint(self.images.shape[1], (count,), generator=generator)]
        return turned(x, turn), 4 * label + turn


def turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Images turned by so many right angles, for each entry of the leading axes."""
    images = images.clone()
    for number in (1, 2, 3):
        images[quarters == number] = images[quarters == number].rot90(number, (-2, -1))
    return images


def _flat(x: Tensor, y: Tensor) -> Batch:
    """The images of a task in one axis."""
    return x.flatten(1, 2), y.flatten(1, 2)


def split(seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the classes for training and for testing, six and four of the digits and as many garments.

    6 and 9 are never parted: turned by 180 degrees they look alike.
    """
    draw = random.Random(seed)
    while True:
        digits, garments = draw.sample(range(10), 10), draw.sample(range(10, 20), 10)
        if (6 in digits[:6]) == (9 in digits[:6]):
            return digits[:6] + garments[:6], digits[6:] + garments[6:]


def classes(root: Path, seed: int) -> tuple[Classes, Classes]:
    """The classes for meta-training, also turned, and those for testing, which are as they are."""
    images, (train, test) = _all_images(root), split(seed)
    return Classes(images[train], rotated=True), Classes(images[test], rotated=False)


@cache
def _all_images(root: Path) -> Tensor:
    """A thousand images of each of ten digits and ten garments, averaged to 14×14 pixels."""
    found: list[Tensor] = []
    for name in ("mnist", "fashion_mnist"):
        read = data.read(name, root)
        found += [read.x[: read.training][read.y[: read.training] == label][:1000] for label in range(10)]
    shape = (len(found), 1000, 1, 14, 14)
    return F.avg_pool2d(torch.cat(found).float() / 255, 2).reshape(shape)


def classifier(outputs: int = CLASSES) -> nn.Sequential:
    """Three blocks of a strided convolution, batch norm and ReLU, as the MAML paper has them for Omniglot, and a layer."""

    def block(inputs: int) -> nn.Sequential:
        norm = nn.BatchNorm2d(CHANNELS, track_running_stats=False)  # of each batch
        return nn.Sequential(nn.Conv2d(inputs, CHANNELS, 3, stride=2, padding=1), norm, nn.ReLU())

    return nn.Sequential(block(1), block(CHANNELS), block(CHANNELS), nn.Flatten(), nn.Linear(FEATURES, outputs))


def class_means(x: Tensor, y: Tensor, classes: Sequence[int] = range(CLASSES)) -> Tensor:
    """The mean of the rows of each class."""
    return torch.stack([x[y == label].mean(0) for label in classes])
