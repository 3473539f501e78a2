"""The data sets of the learning tasks, each read once, and how they are split."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fidelity_problems import boston as housing
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris
from tasks.data import standardised as standardised
from torch import Tensor
from torch.nn import functional as F

LETTERS = " abcdefghijklmnopqrstuvwxyz"


def _read(load: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    x, y = (torch.tensor(part) for part in load(return_X_y=True))
    return x.float(), y


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 8×8 pixels between 0 and 1, and their classes."""
    x, y = _read(load_digits)
    return x / 16, y


@cache
def iris() -> tuple[Tensor, Tensor]:
    """150 flowers, 4 features, 3 classes."""
    return _read(load_iris)


@cache
def breast_cancer() -> tuple[Tensor, Tensor]:
    """569 tumours, 30 features, 2 classes."""
    return _read(load_breast_cancer)


@cache
def diabetes() -> tuple[Tensor, Tensor]:
    """442 patients, 10 features, and a number to predict, of shape (N, 1)."""
    x, y = _read(load_diabetes)
    return x, y.float()[:, None]


@cache
def boston(root: Path) -> tuple[Tensor, Tensor]:
    """506 tracts of Boston, 13 features, and the house value to predict, of shape (N, 1)."""
    x, y = housing.read(root)
    return x.float(), y.float()[:, None]


@cache
def fashion(root: Path) -> tuple[Tensor, Tensor]:
    """The first 6,000 training images of Fashion-MNIST, averaged to 14×14 pixels, of shape (N, 1, 14, 14)."""
    from torchvision.datasets import FashionMNIST

    found = FashionMNIST(root, download=True)
    return F.avg_pool2d(found.data[:6000, None].float() / 255, 2), found.targets[:6000]


@cache
def novel(root: Path) -> Tensor:
    """Moby-Dick as numbers of lower-case letters; whatever stands between two words becomes one space."""
    path = root / "text" / "moby_dick.txt"
    if not path.is_file():
        raise SystemExit(f"{path} is missing: write the novel there as plain text, for example from Project Gutenberg")
    words = re.sub("[^a-z]+", " ", path.read_text().lower())
    return torch.tensor([LETTERS.index(letter) for letter in words])


def split(total: int, *sizes: int) -> list[Tensor]:
    """Indices from 0 in random order, split into parts of the given sizes and the rest."""
    return list(torch.randperm(total).split([*sizes, total - sum(sizes)]))
