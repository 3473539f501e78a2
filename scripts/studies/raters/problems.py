"""Three sets of training examples of several kinds, most of them of little use, and a model for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tasks import data
from torch import Tensor, nn
from torch.nn import functional as F

LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789.,;'-"
LENGTH, CONTEXT = 64, 8  # letters of a text, and how many of them the model sees


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Examples in parts, with what they are, and a model of them. A batch is a vector of indices of examples.

    Attributes:
        x: the inputs.
        y: the targets.
        features: what a rater and a classifier see of each example, shape (N, F).
        kinds: the names of the kinds of training examples, by number.
        kind: the kind of each example of ``train`` and ``following``.
        useful: the kinds that were made to be kept.
        train: the training examples.
        following: as many others like them, for the next training; for the table none.
        val: the validation examples, which are like the test examples.
        test: the test examples.
        make: makes a new model.
        inner: makes the optimizer of a model, for training examples that count once.
        losses: ``losses(z, x, y)``, the loss of each example by what the model returns.
        steps: of a training.
        batch: examples of a step.
        drawn: training examples of a hyperstep.
        asked: validation examples of a hyperstep.
        every: steps from one hyperstep to the next.
        rate: the outer rate of the rater.
    """

    x: Tensor
    y: Tensor
    features: Tensor
    kinds: tuple[str, ...]
    kind: Tensor
    useful: tuple[str, ...]
    train: Tensor
    following: Tensor
    val: Tensor
    test: Tensor
    make: Callable[[], nn.Module]
    inner: Callable[[nn.Module], torch.optim.Optimizer]
    losses: Callable[[Tensor, Tensor, Tensor], Tensor]
    steps: int
    batch: int
    drawn: int
    asked: int
    every: int
    rate: float

    def each(self, model: Any, batch: Tensor) -> Tensor:
        """The loss of each example of the batch."""
        return self.losses(model(self.x[batch]), self.x[batch], self.y[batch])

    @property
    def is_useful(self) -> Tensor:
        """Whether each example of ``train`` and ``following`` is of a kind that was made to be kept."""
        return torch.tensor([kind in self.useful for kind in self.kinds])[self.kind]


def parts(**sizes: int) -> dict[str, Tensor]:
    """The numbers of the examples of each part, in this order."""
    return dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))


def numbered(sizes: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))


def adam(model: nn.Module, lr: float, decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)


# Texts: the speeches of presidents, and what a crawl would bring along


class NextLetter(nn.Module):
    """The logits of each letter of texts, from the eight before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 12)
        self.layers = nn.Sequential(nn.Linear(12 * CONTEXT, 128), nn.ReLU(), nn.Linear(128, len(LETTERS)))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.embedding(x).unfold(1, CONTEXT, 1)[:, :-1]
        return self.layers(seen.flatten(2))


def of_letters(z: Tensor, x: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), x[:, CONTEXT:], reduction="none").mean(1)


SOURCES = {"speeches": "train.txt", "novel": "moby_dick.txt", "shuffled": "train.txt"}
SIZES = {"speeches": 1200, "novel": 2000, "repeated": 1600, "shuffled": 1200, "noise": 1000, "numbers": 1000}


@cache
def letters(path: Path) -> Tensor:
    text = re.sub(f"[^{LETTERS}]+", " ", path.read_text().lower())
    return torch.tensor([LETTERS.index(letter) for letter in text])


def bigrams(x: Tensor) -> Tensor:
    """How often each pair of letters is in a text, times 8."""
    pairs = x[:, :-1] * len(LETTERS) + x[:, 1:]
    return 8 / LENGTH * torch.zeros(len(x), len(LETTERS) ** 2).scatter_add_(1, pairs, torch.ones(pairs.shape))


def text(root: Path, seed: int) -> Pool:
    """Speeches; the novel Moby-Dick; the same few lines again and again; letters in a wrong order; noise; numbers."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(name: str, count: int) -> Tensor:
        source = letters(root / "text" / name)
        return torch.stack([source[i : i + LENGTH] for i in torch.randint(len(source) - LENGTH, (count,), generator=draw)])

    found = {name: drawn(file, SIZES[name]) for name, file in SOURCES.items()}
    lines = drawn("train.txt", 8)[torch.randint(8, (SIZES["repeated"],), generator=draw)]
    others = torch.randint(1, 27, lines.shape, generator=draw)
    found["repeated"] = torch.where(torch.rand(lines.shape, generator=draw) < 0.03, others, lines)
    found["shuffled"] = found["shuffled"].gather(1, torch.rand(found["shuffled"].shape, generator=draw).argsort(1))
    found["noise"] = torch.randint(len(LETTERS), (SIZES["noise"], LENGTH), generator=draw)
    digits, gaps = (torch.rand(SIZES["numbers"], LENGTH, generator=draw) for _ in range(2))
    found["numbers"] = (27 + 10 * digits).long()
    found["numbers"][gaps < 0.35] = LETTERS.index(".")
    found["numbers"][gaps < 0.25] = LETTERS.index(" ")
    kind, mixed = numbered(list(SIZES.values())), torch.randperm(8000, generator=draw)
    x = torch.cat([torch.cat([found[name] for name in SIZES])[mixed], drawn("valid.txt", 200), drawn("test.txt", 2000)])
    return Pool(
        x=x, y=x, features=bigrams(x), kinds=tuple(SIZES), kind=kind[mixed], useful=("speeches", "novel"),
        make=NextLetter, inner=partial(adam, lr=3e-3, decay=0.01), losses=of_letters, steps=300, batch=50,
        drawn=100, asked=50, every=2, rate=0.01, **parts(train=4000, following=4000, val=200, test=2000),
    )  # fmt: skip


# Images: wrong labels, and the same few images again and again


def of_classes(z: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, reduction="none")


def garments(root: Path, seed: int) -> Pool:
    """Clothes: right labels; wrong labels, the next class; copies of a few images of three classes, each a bit noisy."""
    draw = torch.Generator().manual_seed(seed)
    (x, y), (x_test, y_test) = (data.fashion(root, train=part) for part in (True, False))
    order = torch.randperm(len(x), generator=draw)[:5300]
    x, y = torch.cat([x[order], x_test[:4000]]), torch.cat([y[order], y_test[:4000]])
    x = (F.avg_pool2d(x[:, None].float() / 255, 2).flatten(1) - 0.286) / 0.33
    right, wrong, rest = x[:2600], x[2600:5000], x[5000:]
    few = torch.nonzero(y[:2600] % 3 == 0)[:15, 0][torch.randint(15, (3000,), generator=draw)]
    copied = x[few] + 0.1 * torch.randn(3000, 196, generator=draw)
    kind, mixed = numbered([2600, 2400, 3000]), torch.randperm(8000, generator=draw)
    x = torch.cat([torch.cat([right, wrong, copied])[mixed], rest])
    y = torch.cat([torch.cat([y[:2600], (y[2600:5000] + 1) % 10, y[few]])[mixed], y[5000:]])
    return Pool(
        x=x, y=y, features=torch.cat([x, 2.0 * F.one_hot(y, 10)], 1), kinds=("right", "wrong", "copied"), kind=kind[mixed],
        useful=("right",), make=partial(mlp, 196, 10), inner=partial(adam, lr=2e-3, decay=0.05), losses=of_classes,
        steps=600, batch=100, drawn=1000, asked=300, every=2, rate=0.003,
        **parts(train=4000, following=4000, val=300, test=4000),
    )  # fmt: skip


def mlp(inputs: int, outputs: int, hidden: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


# A table: rows that were read wrongly


def squares(z: Tensor, _: Tensor, y: Tensor) -> Tensor:
    return (z[:, 0] - y).square()


def table(root: Path, seed: int) -> Pool:
    """House values: right rows; rows with the value of another; rows whose columns are moved by one; a wrong unit."""
    draw = torch.Generator().manual_seed(seed)
    x, y = (part.float() for part in data.table("boston", root))
    order = torch.randperm(len(x), generator=draw)
    x, y = x[order], y[order]
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    kind = numbered([140, 60, 60, 40])
    other, moved, unit = (torch.nonzero(kind == number)[:, 0] for number in (1, 2, 3))
    y[other] = y[other[torch.randperm(len(other), generator=draw)]]
    x[moved] = x[moved].roll(1, 1)
    x[unit, 5], x[unit, 12] = x[unit, 5] * -3, x[unit, 12] * -3
    return Pool(
        x=x, y=y, features=torch.cat([x, y[:, None]], 1), kinds=("right", "other value", "moved", "unit"), kind=kind,
        useful=("right",), make=partial(mlp, 13, 1, 32), inner=partial(adam, lr=1e-2, decay=0.1), losses=squares,
        steps=400, batch=50, drawn=300, asked=60, every=2, rate=0.003,
        **parts(train=300, following=0, val=60, test=146),
    )  # fmt: skip


PROBLEMS: Mapping[str, Callable[[Path, int], Pool]] = {"text": text, "garments": garments, "table": table}
