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
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay
from learning_tasks import data

Criterion = Callable[[Tensor, Any, Tensor], Tensor]
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A task on one seed. A batch is a tensor of indices.

    Attributes:
        make: makes a new model.
        hparams: ``hparams(model, start)`` makes the hyperparameters at their start.
        loss: the training loss, with its parts.
        val_loss: the loss of validation and test.
        inner: makes the optimizer of a model.
        train: the training examples.
        val: the validation examples.
        test: the test examples.
    """

    make: Callable[[], nn.Module]
    hparams: Callable[[nn.Module, float], nn.Module]
    loss: hoptim.CompositeLoss
    val_loss: Callable[[Any, Any, Tensor], Tensor]
    inner: Callable[[nn.Module], torch.optim.Optimizer]
    train: Tensor
    val: Tensor
    test: Tensor


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


def mlp(inputs: int, hidden: int, outputs: int, *, normed: bool = False) -> nn.Module:
    norm = [nn.BatchNorm1d(hidden)] if normed else []
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), *norm, nn.ReLU(), nn.Linear(hidden, outputs))


def sgd(model: nn.Module, lr: float = 0.1, weight_decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.01)


def predict(x: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda model, _, batch: model(x[batch])


def entropy(y: Tensor) -> Criterion:
    return lambda z, _, batch: F.cross_entropy(z, y[batch])


def squares(y: Tensor) -> Criterion:
    return lambda z, _, batch: F.mse_loss(z, y[batch])


def evaluated(x: Tensor, criterion: Criterion) -> Callable[[Any, Any, Tensor], Tensor]:
    """The loss of validation and test: the criterion, with the model in evaluation mode."""
    return lambda model, hparams, batch: criterion(model.eval()(x[batch]), hparams, batch)


def one(value: Tensor, constraint: Any, name: str) -> nn.Module:
    return hoptim.HyperParameters({name: value}, {name: constraint})


def decayed(
    read: Callable[[], tuple[Tensor, Tensor]], count: int, network: Callable[[], nn.Module], per: str, root: Path
) -> Setup:
    """Classification of a table with learned decays; as many examples for validation as for training."""
    x, y = read()
    train, val, test = data.split(len(x), count, count)
    x = data.standardised(x, train)
    return Setup(
        make=network,
        hparams=lambda model, start: WeightDecay(model, per=per, start=start),
        loss=hoptim.CompositeLoss(predict(x), entropy(y), lambda model, hparams: hparams.penalty(model)),
        val_loss=evaluated(x, entropy(y)),
        inner=sgd,
        train=train, val=val, test=test,
    )  # fmt: skip


def garments(root: Path) -> Setup:
    """A small CNN with BatchNorm, and a decay for each output channel."""
    x, y = data.fashion(root)
    train, val, test = (part[:1000] for part in data.split(len(x), 300, 300))

    def make() -> nn.Module:
        first = (nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        second = (nn.Conv2d(6, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2))
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(48, 10))

    return Setup(
        make=make,
        hparams=lambda model, start: WeightDecay(model, per="channel", start=start),
        loss=hoptim.CompositeLoss(predict(x), entropy(y), lambda model, hparams: hparams.penalty(model)),
        val_loss=evaluated(x, entropy(y)),
        inner=sgd,
        train=train, val=val, test=test,
    )  # fmt: skip


class Reader(nn.Module):
    """An LSTM that predicts the next letter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(len(data.LETTERS), 12), nn.LSTM(12, 32, batch_first=True)
        self.out = nn.Linear(32, len(data.LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(letters))[0]).flatten(0, 1)


def reading(root: Path) -> Setup:
    """The letters of a novel, with a decay for each tensor. Training, validation and test follow each other in the text."""
    text, width = data.novel(root), 12
    begin = int(torch.randint(len(text) - 12_000, ()))
    places = torch.arange(width)

    def letters(batch: Tensor) -> Tensor:
        return text[batch[:, None] + places]

    def criterion(z: Tensor, _: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(z, letters(batch + 1).flatten())

    return Setup(
        make=Reader,
        hparams=lambda model, start: WeightDecay(model, start=start),
        loss=hoptim.CompositeLoss(
            lambda model, _, batch: model(letters(batch)), criterion, lambda model, hparams: hparams.penalty(model)
        ),
        val_loss=lambda model, hparams, batch: criterion(model(letters(batch)), hparams, batch),
        inner=adam,
        train=begin + torch.arange(0, 2000, 4),
        val=begin + torch.arange(2020, 3520, width),
        test=begin + torch.arange(3540, 11_900, width),
    )


def folded(read: Callable[[], tuple[Tensor, Tensor]], count: int, hidden: int, lr: float, root: Path) -> Setup:
    """Decay and noise for each layer, and label smoothing where there are classes, for ``CrossValidated``."""
    x, y = read()
    train, val, test = data.split(len(x), count * 2 // 3, count - count * 2 // 3)
    own = torch.cat([train, val])
    has_classes = not y.is_floating_point()
    x, y = (x, y) if has_classes else (data.standardised(x, own), data.standardised(y, own))
    outputs = int(y.max()) + 1 if has_classes else 1
    plain = entropy(y) if has_classes else squares(y)

    def hparams(model: nn.Module, start: float) -> nn.Module:
        parts: dict[str, nn.Module] = {"decay": WeightDecay(model, start=start), "noise": NoiseWidth(model, start=0.05)}
        return nn.ModuleDict(parts | ({"smoothing": LabelSmoothing(start=0.05)} if has_classes else {}))

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return hparams["smoothing"].cross_entropy(z, y[batch]) if has_classes else plain(z, hparams, batch)

    loss = hoptim.CompositeLoss(
        lambda model, hparams, batch: hparams["noise"].call(model, x[batch]),
        criterion,
        lambda model, hparams: hparams["decay"].penalty(model),
    )
    return Setup(
        make=partial(mlp, x.shape[1], hidden, outputs), hparams=hparams, loss=loss, val_loss=evaluated(x, plain),
        inner=partial(sgd, lr=lr), train=train, val=val, test=test,
    )  # fmt: skip


def weighted(
    x: Tensor, y: Tensor, sizes: tuple[int, int], labels: Callable[[Tensor], Tensor], make: Callable[[], nn.Module]
) -> Setup:
    """A weight between 0 and 1 for each training example, some of which have wrong labels."""
    train, val, test = (part[:1200] for part in data.split(len(x), *sizes))
    seen = y.clone()
    seen[train] = labels(y[train])

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return (hparams["example_weight"][batch] * F.cross_entropy(z, seen[batch], reduction="none")).mean()

    return Setup(
        make=make,
        hparams=lambda _, start: one(torch.full((len(x),), start), constraints.unit_interval, "example_weight"),
        loss=hoptim.CompositeLoss(predict(x), criterion),
        val_loss=evaluated(x, entropy(y)),
        inner=partial(sgd, weight_decay=1e-3),
        train=train, val=val, test=test,
    )  # fmt: skip


def drawn(y: Tensor, share: float = 0.4) -> Tensor:
    """The labels, a share of them drawn at random."""
    return torch.where(torch.rand(len(y)) < share, torch.randint(10, (len(y),)), y)


def shifted(y: Tensor) -> Tensor:
    """The labels, 40 % of them replaced by the next class."""
    return torch.where(torch.rand(len(y)) < 0.4, (y + 1) % 10, y)


def any_label_wrong(root: Path) -> Setup:
    return weighted(*data.digits(), (600, 200), drawn, partial(mlp, 64, 48, 10))


def next_label_wrong(root: Path) -> Setup:
    return weighted(*data.fashion(root), (600, 200), shifted, partial(mlp, 196, 32, 10, normed=True))


def mixed_sources(root: Path) -> Setup:
    """Four sources of digits with more and more wrong labels. A real number for each; their softmax has the shares."""
    x, y = data.digits()
    train, val, test = data.split(len(x), 600, 150)
    source, seen = torch.arange(len(x)) % 4, y.clone()
    for number, share in enumerate((0.0, 0.3, 0.6, 0.9)):
        own = train[source[train] == number]
        seen[own] = drawn(y[own], share)

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        shares = 4 * hparams["source"].softmax(0)[source[batch]]
        return (shares * F.cross_entropy(z, seen[batch], reduction="none")).mean()

    return Setup(
        make=partial(mlp, 64, 48, 10),
        hparams=lambda _, start: one(torch.full((4,), start), constraints.real, "source"),
        loss=hoptim.CompositeLoss(predict(x), criterion),
        val_loss=evaluated(x, entropy(y)),
        inner=partial(sgd, weight_decay=1e-3),
        train=train, val=val, test=test,
    )  # fmt: skip


def rare_classes(root: Path) -> Setup:
    """Digits whose higher classes are rare in training but not in validation, and a shift of each logit in training.

    Source: Li et al. 2021, AutoBalance (arXiv 2201.01212), who learn such shifts.
    """
    x, y = data.digits()
    pool, val, test = data.split(len(x), 900, 150)
    kept = 0.7 ** y[pool].float()
    train = pool[torch.rand(len(pool)) < kept]

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(z + hparams["shift"], y[batch])

    return Setup(
        make=partial(mlp, 64, 48, 10),
        hparams=lambda _, start: one(torch.full((10,), start), constraints.real, "shift"),
        loss=hoptim.CompositeLoss(predict(x), criterion),
        val_loss=evaluated(x, entropy(y)),
        inner=partial(sgd, weight_decay=1e-3),
        train=train, val=val, test=test,
    )  # fmt: skip


def clamped(root: Path) -> Setup:
    """House values, with a decay for each weight that is clamped at zero, so that its leaf is the decay itself."""
    x, y = data.boston(root)
    train, val, test = data.split(len(x), 120, 120)
    x, y = data.standardised(x, train), data.standardised(y, train)

    def hparams(model: nn.Module, start: float) -> nn.Module:
        values = {name: torch.full_like(w, start) for name, w in model.named_parameters() if w.ndim > 1}
        return hoptim.HyperParameters(values, dict.fromkeys(values, constraints.nonnegative))

    def penalty(model: Any, hparams: Any) -> Tensor:
        return sum((hparams[name] * w.square()).sum() for name, w in model.named_parameters() if w.ndim > 1) / 2

    return Setup(
        make=partial(mlp, 13, 32, 1),
        hparams=hparams,
        loss=hoptim.CompositeLoss(predict(x), squares(y), penalty),
        val_loss=evaluated(x, squares(y)),
        inner=partial(sgd, lr=0.02),
        train=train, val=val, test=test,
    )  # fmt: skip


def side_tasks(root: Path) -> Setup:
    """Garments with three further losses: a smaller version of the image, its brightness, and labels drawn at random."""
    x, y = data.fashion(root)
    train, val, test = (part[:1200] for part in data.split(len(x), 200, 200))
    small, random = F.avg_pool2d(x, 2).flatten(1), drawn(y, 1.0)

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        labels, picture, noise, brightness = z.split([10, 49, 10, 1], 1)
        sides = [
            10 * F.mse_loss(picture, small[batch]),
            F.cross_entropy(noise, random[batch]),
            10 * F.mse_loss(brightness[:, 0], small[batch].mean(1)),
        ]
        return F.cross_entropy(labels, y[batch]) + (hparams["side"] * torch.stack(sides)).sum()

    return Setup(
        make=partial(mlp, 196, 32, 70),
        hparams=lambda _, start: one(torch.full((3,), start), constraints.nonnegative, "side"),
        loss=hoptim.CompositeLoss(predict(x), criterion),
        val_loss=lambda model, _, batch: F.cross_entropy(model(x[batch])[:, :10], y[batch]),
        inner=partial(sgd, lr=0.05, weight_decay=1e-3),
        train=train, val=val, test=test,
    )  # fmt: skip


PAIRS: list[tuple[str, str]] = [
    ("iris", "cancer"),  # a decay for each weight
    ("cnn", "lstm"),  # a decay for each channel or tensor
    ("digits-cv", "diabetes-cv"),  # CrossValidated
    ("any-label", "next-label"),  # a weight for each example
    ("sources", "rare"),  # real numbers
    ("clamped", "sides"),  # non-negative numbers
]
HALVES = {name: half for pair in PAIRS for name, half in zip(pair, "AB", strict=True)}

TASKS: dict[str, Task] = {
    "iris": Task(
        title="Iris, MLP: a decay for each weight", constraint="positive", start=1e-3, grid=DECAYS, shows_parts=True,
        setup=partial(decayed, data.iris, 40, partial(mlp, 4, 32, 3), "weight"),
    ),
    "cancer": Task(
        title="breast cancer, MLP: a decay for each weight", constraint="positive", start=1e-3, grid=DECAYS,
        setup=partial(decayed, data.breast_cancer, 100, partial(mlp, 30, 32, 2), "weight"), shows_parts=False, size=25,
    ),
    "cnn": Task(
        title="Fashion-MNIST, CNN with BatchNorm: a decay for each channel", constraint="positive", start=1e-4,
        grid=DECAYS, setup=garments, shows_parts=False, steps=320, size=50, every=8,
    ),
    "lstm": Task(
        title="letters of a novel, LSTM: a decay for each tensor", constraint="positive", start=1e-4, grid=DECAYS,
        setup=reading, shows_parts=True, steps=280, size=32, every=8,
    ),
    "digits-cv": Task(
        title="digits, three folds: decay, noise, smoothing", constraint="positive, unit interval", start=1e-2,
        grid=DECAYS, setup=partial(folded, data.digits, 200, 32, 0.1), shows_parts=True, steps=240, size=50, folds=3,
    ),
    "diabetes-cv": Task(
        title="diabetes, three folds: decay, noise", constraint="positive, unit interval", start=1e-2, grid=DECAYS,
        setup=partial(folded, data.diabetes, 220, 32, 0.01), shows_parts=False, steps=300, size=50, folds=3,
    ),
    "any-label": Task(
        title="digits, 40 % of labels drawn at random: example weights", constraint="unit interval", start=0.5,
        setup=any_label_wrong, shows_parts=False, size=100,
    ),
    "next-label": Task(
        title="Fashion-MNIST, BatchNorm, 40 % of labels those of the next class: example weights",
        constraint="unit interval", start=0.5, setup=next_label_wrong, shows_parts=True, size=100,
    ),
    "sources": Task(
        title="digits of four sources: logits of their shares", constraint="real", start=0.0, setup=mixed_sources,
        shows_parts=True, size=100,
    ),
    "rare": Task(
        title="digits, rare classes: shifts of the logits", constraint="real", start=0.0, setup=rare_classes,
        shows_parts=False, size=50,
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
