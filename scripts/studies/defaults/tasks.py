"""Twelve learning tasks in six pairs of one kind; ``PAIRS`` has the task of half A first and that of half B second.

The halves were fixed before the study's first run. Decays start low, as they would if nothing were known about them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tasks import data, models
from tasks.supervised import Supervised, penalty, sgd
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay

DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class Setup(Supervised):
    """A task on one seed.

    Attributes:
        hparams: ``hparams(model, start)`` makes the hyperparameters at their start.
        weighed: the criterion of the training loss; ``None`` for that of the recipes.
        penalty: of the training loss.
        outputs: how many outputs count in validation and test; ``None`` for all.
    """

    hparams: Callable[[nn.Module, float], nn.Module]
    weighed: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    penalty: Callable[[Any, Any], Any] | None = None
    outputs: int | None = None

    @property
    def train_loss(self) -> hoptim.CompositeLoss:
        return hoptim.CompositeLoss(self.predict, self.weighed or self.criterion, self.penalty)

    def fit(self, z: Tensor, batch: Tensor) -> Tensor:
        return super().fit(z[:, : self.outputs], batch)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, what is learned in it, and for how long.

    Attributes:
        title: what it is, in a few words.
        constraint: the constraint of its hyperparameters.
        setup: makes it from the folder of the data, after the seed has been set.
        start: the value that the hyperparameters start from; the training "plain" keeps it.
        grid: other fixed values, for the training "best fixed"; empty where none makes sense.
        shows_parts: whether hoptim sees the parts of the training loss, and so takes Gauss-Newton by default.
        steps: inner steps.
        every: inner steps between hypersteps.
        size: of a batch; ``None`` for all examples.
        folds: of ``CrossValidated``, which learns on training and validation data together; ``None`` without it.
        hypersteps: of ``CrossValidated``.
        has_factors: whether it is a classifier of linear layers and convolutions, trained without folds.
    """

    title: str
    constraint: str
    setup: Callable[[Path], Setup]
    start: float
    shows_parts: bool
    grid: tuple[float, ...] = ()
    steps: int = 480
    every: int = 10
    size: int | None = None
    folds: int | None = None
    hypersteps: int = 40
    has_factors: bool = False


def split(total: int, *sizes: int, most: int | None = None) -> dict[str, Tensor]:
    """Indices in random order: train and val of the given sizes, and the rest, or the first ``most`` of it."""
    train, val, rest = torch.randperm(total).split([*sizes, total - sum(sizes)])
    return {"train": train, "val": val, "test": rest[:most]}


def mlp(inputs: int, hidden: int, outputs: int) -> Callable[[], nn.Module]:
    return partial(models.mlp, (inputs,), outputs, [hidden])


def one(name: str, constraint: Any, *shape: int) -> Callable[[nn.Module, float], nn.Module]:
    """Hyperparameters of one tensor."""
    return lambda _, start: hoptim.HyperParameters({name: torch.full(shape, start)}, {name: constraint})


def own_penalty(model: Any, hparams: Any) -> Tensor:
    return hparams.penalty(model)


def decays(per: Any) -> Callable[[nn.Module, float], nn.Module]:
    return lambda model, start: WeightDecay(model, per=per, start=start)


def numbers(name: str, root: Path = Path("data")) -> tuple[Tensor, Tensor]:
    """A table in float32, with numbers to predict in a column of their own."""
    x, y = data.table(name, root)
    return x.float(), y.float()[:, None] if y.is_floating_point() else y


def of_table(name: str, count: int, hidden: int, root: Path) -> Setup:
    """Classification of a table with a decay for each weight; as many examples for validation as for training."""
    x, y = numbers(name)
    parts = split(len(x), count, count)
    make = mlp(x.shape[1], hidden, int(y.max()) + 1)
    x = data.standardised(x, parts["train"])
    return Setup(x=x, y=y, **parts, make=make, inner=sgd, hparams=decays("weight"), penalty=own_penalty)


def garments(root: Path) -> Setup:
    """A small CNN with BatchNorm, and a decay for each output channel."""
    x, y = data.small_fashion(root)

    def make() -> nn.Module:
        layers = (nn.Conv2d(a, b, 3, bias=False) for a, b in ((1, 6), (6, 12)))
        return models.convolutions(*layers, features=48, normed=True, pooled=True)

    parts = split(len(x), 300, 300, most=1000)
    return Setup(x=x, y=y, **parts, make=make, inner=sgd, hparams=decays("channel"), penalty=own_penalty)


def reading(root: Path) -> Setup:
    """The letters of a novel, with a decay for each tensor. Training, validation and test follow each other in the text."""
    text, width = data.novel(root), 12
    begin = int(torch.randint(len(text) - 12_000, ()))
    ranges = {"train": (0, 2000, 4), "val": (2020, 3520, width), "test": (3540, 11_900, width)}
    return Setup(
        x=text[:-1].unfold(0, width, 1), y=text[1:].unfold(0, width, 1), make=models.Reader,
        inner=lambda model: torch.optim.Adam(model.parameters(), lr=0.01), hparams=decays("tensor"), penalty=own_penalty,
        **{part: begin + torch.arange(*places) for part, places in ranges.items()},
    )  # fmt: skip


def folded(name: str, count: int, lr: float, root: Path) -> Setup:
    """Decay and noise for each layer, and label smoothing where there are classes, for ``CrossValidated``."""
    x, y = numbers(name)
    parts = split(len(x), count * 2 // 3, count - count * 2 // 3)
    own = torch.cat([parts["train"], parts["val"]])
    has_classes = not y.is_floating_point()
    x, y = (x / 16, y) if has_classes else (data.standardised(x, own), data.standardised(y, own))

    def hparams(model: nn.Module, start: float) -> nn.Module:
        found: dict[str, nn.Module] = {"decay": WeightDecay(model, start=start), "noise": NoiseWidth(model, start=0.05)}
        return nn.ModuleDict(found | ({"smoothing": LabelSmoothing(start=0.05)} if has_classes else {}))

    make = mlp(x.shape[1], 32, int(y.max()) + 1 if has_classes else 1)
    return Setup(x=x, y=y, **parts, make=make, inner=partial(sgd, lr=lr), hparams=hparams, penalty=penalty)


def drawn(y: Tensor, share: float = 0.4) -> Tensor:
    """The labels, a share of them drawn at random."""
    return torch.where(torch.rand(len(y)) < share, torch.randint(10, (len(y),)), y)


def shifted(y: Tensor) -> Tensor:
    """The labels, 40 % of them replaced by the next class."""
    return torch.where(torch.rand(len(y)) < 0.4, (y + 1) % 10, y)


def weighted(
    x: Tensor, y: Tensor, parts: dict[str, Tensor], wrong: Callable[[Tensor], Tensor], make: Callable[[], nn.Module]
) -> Setup:
    """A weight between 0 and 1 for each training example, some of which have wrong labels."""
    seen = y.clone()
    seen[parts["train"]] = wrong(y[parts["train"]])

    def weighed(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return (hparams["example_weight"][batch] * F.cross_entropy(z, seen[batch], reduction="none")).mean()

    hparams = one("example_weight", constraints.unit_interval, len(x))
    return Setup(x=x, y=y, **parts, make=make, inner=partial(sgd, weight_decay=1e-3), hparams=hparams, weighed=weighed)


def digits() -> tuple[Tensor, Tensor]:
    x, y = numbers("digits")
    return x / 16, y


def any_label_wrong(root: Path) -> Setup:
    return weighted(*digits(), split(1797, 600, 200, most=1200), drawn, mlp(64, 48, 10))


def next_label_wrong(root: Path) -> Setup:
    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(196, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))

    x, y = data.small_fashion(root)
    return weighted(x, y, split(len(x), 600, 200, most=1200), shifted, make)


def mixed_sources(root: Path) -> Setup:
    """Four sources of digits with more and more wrong labels. A real number for each; their softmax has the shares."""
    x, y = digits()
    parts = split(len(x), 600, 150)
    source, seen = torch.arange(len(x)) % 4, y.clone()
    for number, share in enumerate((0.0, 0.3, 0.6, 0.9)):
        own = parts["train"][source[parts["train"]] == number]
        seen[own] = drawn(y[own], share)

    def weighed(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        shares = 4 * hparams["source"].softmax(0)[source[batch]]
        return (shares * F.cross_entropy(z, seen[batch], reduction="none")).mean()

    own_sgd = partial(sgd, weight_decay=1e-3)
    hparams = one("source", constraints.real, 4)
    return Setup(x=x, y=y, **parts, make=mlp(64, 48, 10), inner=own_sgd, hparams=hparams, weighed=weighed)


def rare_classes(root: Path) -> Setup:
    """Digits whose higher classes are rare in training but not in validation, and a shift of each logit in training.

    Source: Li et al. 2021, AutoBalance (arXiv 2201.01212), who learn such shifts.
    """
    x, y = digits()
    parts = split(len(x), 900, 150)
    parts["train"] = parts["train"][torch.rand(900) < 0.7 ** y[parts["train"]].float()]

    def weighed(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(z + hparams["shift"], y[batch])

    own_sgd, hparams = partial(sgd, weight_decay=1e-3), one("shift", constraints.real, 10)
    return Setup(x=x, y=y, **parts, make=mlp(64, 48, 10), inner=own_sgd, hparams=hparams, weighed=weighed)


def clamped(root: Path) -> Setup:
    """House values, with a decay for each weight that is clamped at zero, so that its leaf is the decay itself."""
    x, y = numbers("boston", root)
    parts = split(len(x), 120, 120)
    x, y = data.standardised(x, parts["train"]), data.standardised(y, parts["train"])

    def hparams(model: nn.Module, start: float) -> nn.Module:
        values = {name: torch.full_like(w, start) for name, w in model.named_parameters() if w.ndim > 1}
        return hoptim.HyperParameters(values, dict.fromkeys(values, constraints.nonnegative))

    def decay(model: Any, hparams: Any) -> Tensor:
        return sum((hparams[name] * w.square()).sum() for name, w in model.named_parameters() if w.ndim > 1) / 2

    own_sgd = partial(sgd, lr=0.02)
    return Setup(x=x, y=y, **parts, make=mlp(13, 32, 1), inner=own_sgd, hparams=hparams, penalty=decay)


def side_tasks(root: Path) -> Setup:
    """Garments with three further losses: a smaller version of the image, its brightness, and labels drawn at random."""
    x, y = data.small_fashion(root)
    parts = split(len(x), 200, 200, most=1200)
    small, random = F.avg_pool2d(x, 2).flatten(1), drawn(y, 1.0)

    def weighed(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        labels, picture, noise, brightness = z.split([10, 49, 10, 1], 1)
        sides = [
            10 * F.mse_loss(picture, small[batch]),
            F.cross_entropy(noise, random[batch]),
            10 * F.mse_loss(brightness[:, 0], small[batch].mean(1)),
        ]
        return F.cross_entropy(labels, y[batch]) + (hparams["side"] * torch.stack(sides)).sum()

    return Setup(
        x=x, y=y, **parts, make=mlp(196, 32, 70), inner=partial(sgd, lr=0.05, weight_decay=1e-3),
        hparams=one("side", constraints.nonnegative, 3), weighed=weighed, outputs=10,
    )  # fmt: skip


TASKS: dict[str, Task] = {
    "iris": Task(
        title="Iris, MLP: a decay for each weight", constraint="positive", start=1e-3, grid=DECAYS, shows_parts=True,
        setup=partial(of_table, "iris", 40, 32), has_factors=True,
    ),
    "cancer": Task(
        title="breast cancer, MLP: a decay for each weight", constraint="positive", start=1e-3, grid=DECAYS,
        setup=partial(of_table, "breast_cancer", 100, 32), shows_parts=False, size=25,
        has_factors=True,
    ),
    "cnn": Task(
        title="Fashion-MNIST, CNN with BatchNorm: a decay for each channel", constraint="positive", start=1e-4,
        grid=DECAYS, setup=garments, shows_parts=False, steps=320, size=50, every=8,
        has_factors=True,
    ),
    "lstm": Task(
        title="letters of a novel, LSTM: a decay for each tensor", constraint="positive", start=1e-4, grid=DECAYS,
        setup=reading, shows_parts=True, steps=280, size=32, every=8,
    ),
    "digits-cv": Task(
        title="digits, three folds: decay, noise, smoothing", constraint="positive, unit interval", start=1e-2,
        grid=DECAYS, setup=partial(folded, "digits", 200, 0.1), shows_parts=True, steps=240, size=50, folds=3,
    ),
    "diabetes-cv": Task(
        title="diabetes, three folds: decay, noise", constraint="positive, unit interval", start=1e-2, grid=DECAYS,
        setup=partial(folded, "diabetes", 220, 0.01), shows_parts=False, steps=300, size=50, folds=3,
    ),
    "any-label": Task(
        title="digits, 40 % of labels drawn at random: example weights", constraint="unit interval", start=0.5,
        setup=any_label_wrong, shows_parts=False, size=100, has_factors=True,
    ),
    "next-label": Task(
        title="Fashion-MNIST, BatchNorm, 40 % of labels those of the next class: example weights",
        constraint="unit interval", start=0.5, setup=next_label_wrong, shows_parts=True, size=100,
        has_factors=True,
    ),
    "sources": Task(
        title="digits of four sources: logits of their shares", constraint="real", start=0.0, setup=mixed_sources,
        shows_parts=True, size=100, has_factors=True,
    ),
    "rare": Task(
        title="digits, rare classes: shifts of the logits", constraint="real", start=0.0, setup=rare_classes,
        shows_parts=False, size=50, has_factors=True,
    ),
    "clamped": Task(
        title="Boston housing, MLP: a clamped decay for each weight", constraint="non-negative", start=1e-2, grid=DECAYS,
        setup=clamped, shows_parts=False,
    ),
    "sides": Task(
        title="Fashion-MNIST: weights of three further losses", constraint="non-negative", start=0.3,
        grid=(0.01, 0.1, 1.0), setup=side_tasks, shows_parts=True, size=50,
    ),
}  # fmt: skip
HALVES = {name: "AB"[number % 2] for number, name in enumerate(TASKS)}  # one of each pair of a kind
