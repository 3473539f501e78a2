"""The data sets of all tasks: how they are read, split, standardised and given wrong labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor
from torch.nn import functional as F

IMAGES = ("mnist", "fashion_mnist", "cifar10")
TABLES = {
    "digits": datasets.load_digits,  # 1,797 images of 8×8 pixels from 0 to 16, in rows
    "iris": datasets.load_iris,  # 150 flowers, 4 features, 3 classes
    "wine": datasets.load_wine,  # 178 wines, 13 features, 3 classes
    "breast_cancer": datasets.load_breast_cancer,  # 569 tumours, 30 features, 2 classes
    "diabetes": datasets.load_diabetes,  # 442 patients, 10 features, a number
}
SMALL = ("digits", "iris", "wine", "breast_cancer")
LETTERS = " abcdefghijklmnopqrstuvwxyz"


@cache
def table(name: str, root: Path = Path("data")) -> tuple[Tensor, Tensor]:
    """The rows of a small data set and what to predict, as they are read: those of ``TABLES``, and Boston housing.

    That has 506 tracts, 13 features and the median house value, and is read from boston/boston.csv in the folder ``root``.
    """
    if name != "boston":
        x, y = TABLES[name](return_X_y=True)
        return torch.tensor(x), torch.tensor(y)
    path = root / "boston" / "boston.csv"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: write the 506 rows of Boston housing there as CSV, with a header, 13 features and then "
            "medv; scikit-learn's fetch_openml('boston', version=1) has them"
        )
    rows = torch.tensor(np.genfromtxt(path, delimiter=",", skip_header=1), dtype=torch.float64)
    return rows[:, :-1], rows[:, -1]


@cache
def fashion(root: Path, train: bool = True) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST: images of 28×28 bytes, and their classes; torchvision downloads it to ``root`` if necessary."""
    from torchvision.datasets import FashionMNIST

    found = FashionMNIST(str(root), train=train, download=True)
    return found.data, found.targets


@cache
def small_fashion(root: Path) -> tuple[Tensor, Tensor]:
    """The first 6,000 training images of Fashion-MNIST, averaged to 14×14 pixels, of shape (N, 1, 14, 14)."""
    x, y = fashion(root)
    return F.avg_pool2d(x[:6000, None].float() / 255, 2), y[:6000]


@cache
def novel(root: Path) -> Tensor:
    """Moby-Dick as numbers of lower-case letters; whatever stands between two words becomes one space."""
    path = root / "text" / "moby_dick.txt"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: write the novel there as plain text, for example from Project Gutenberg")
    words = re.sub("[^a-z]+", " ", path.read_text().lower())
    return torch.tensor([LETTERS.index(letter) for letter in words])


@dataclass(frozen=True)
class Labelled:
    """Examples and their classes. The first ``training`` examples are for training and validation, the others for tests.

    Images are kept as bytes, and only those that are used are divided by ``scale``: as floats CIFAR-10 would take 740 MB.
    """

    x: Tensor
    y: Tensor
    training: int
    scale: float = 1.0


@lru_cache(maxsize=1)  # so that the jobs of a sweep read it once
def read(name: str, root: str | Path) -> Labelled:
    """A data set by name. Those of torchvision are in the folder ``root``, or are downloaded to it."""
    if name in IMAGES:
        parts = [_images(name, Path(root), train) for train in (True, False)]
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        return Labelled(x, y, len(parts[0][0]), scale=255.0)
    if name not in SMALL:
        raise ValueError(f"data={name!r}: give one of {', '.join((*IMAGES, *SMALL))}")
    x, y = table(name)
    x = x.float().reshape(-1, 1, 8, 8) / 16 if name == "digits" else x.float()
    return Labelled(x, y, len(y))


def _images(name: str, root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images as bytes, of shape (N, C, H, W), and their classes."""
    from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

    if name == "cifar10":
        if (arrays := _cifar10_arrays(root, train)) is None:
            found = CIFAR10(root, train, download=True)
            arrays = found.data, found.targets
        return torch.as_tensor(arrays[0]).movedim(3, 1), torch.as_tensor(arrays[1])
    found = {"mnist": MNIST, "fashion_mnist": FashionMNIST}[name](root, train, download=True)
    return found.data[:, None], found.targets


def _cifar10_arrays(root: Path, train: bool) -> tuple[Any, Any] | None:
    """CIFAR-10 from arrays in the file cifar10/cifar10.npz, for machines that cannot download the original."""
    path, part = root / "cifar10" / "cifar10.npz", "train" if train else "test"
    if not path.is_file():
        return None
    with np.load(path) as arrays:
        return arrays[f"{part}_images"], arrays[f"{part}_labels"]


def split(data: Labelled, train: int, val: int, test: int | None, seed: int, balanced: bool = False) -> dict[str, Tensor]:
    """Indices of examples, drawn at random: train and val from the training part of the data, test from the other part.

    A data set without a test part is split in three. ``balanced``: each class has the same number of training examples.

    >>> data = Labelled(torch.zeros(10, 1), torch.zeros(10), training=10)
    >>> [len(part) for part in split(data, 4, 3, None, seed=0).values()]
    [4, 3, 3]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(data.training, generator=generator)
    if balanced:
        order = as_many_of_each_class_first(order, data.y, train)
    others = torch.arange(data.training, len(data.y))
    rest = order[train + val :] if len(others) == 0 else others[torch.randperm(len(others), generator=generator)]
    parts = {"train": order[:train], "val": order[train : train + val], "test": rest[:test]}
    wanted = {"train": train, "val": val, "test": len(rest) if test is None else test}
    for name, count in wanted.items():
        if count < 1 or len(parts[name]) < count:
            raise ValueError(f"{name}={count}: the data have {len(parts[name])} examples left for it, and 1 is needed")
    return parts


def as_many_of_each_class_first(order: Tensor, y: Tensor, count: int) -> Tensor:
    """The order, changed so that its first ``count`` examples have the same number of each class.

    >>> as_many_of_each_class_first(torch.tensor([3, 1, 0, 2]), torch.tensor([0, 1, 0, 1]), 2)
    tensor([0, 3, 1, 2])
    """
    classes = y.unique().tolist()
    if count % len(classes):
        raise ValueError(f"train={count}, balanced: give a multiple of the {len(classes)} classes")
    first = torch.cat([order[y[order] == label][: count // len(classes)] for label in classes])
    if len(first) < count:
        raise ValueError(f"train={count}, balanced: a class has fewer than {count // len(classes)} examples; give fewer")
    return torch.cat([first, order[~torch.isin(order, first)]])


def standardised(x: Tensor, part: Tensor) -> Tensor:
    """x with mean 0 and standard deviation 1 in the given part, for each column of a table or each channel of images."""
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean, deviation = x[part].mean(axes, keepdim=True), x[part].std(axes, keepdim=True)
    return (x - mean) / deviation.clamp(min=1e-6)


def with_wrong_labels(y: Tensor, examples: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """The labels, with this share of the given examples moved to another class, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    chosen = examples[torch.randperm(len(examples), generator=generator)[: round(share * len(examples))]]
    y = y.clone()
    y[chosen] = (y[chosen] + torch.randint(1, classes, chosen.shape, generator=generator)) % classes
    return y
