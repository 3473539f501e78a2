"""The interface of a task of scripts/train.py, its batches, and how its figures are measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim

WORDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "int | None": ((int, type(None)), "a whole number, or null"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "text"),
}
CHUNK = 1000  # how many examples are measured at once


class Task(ABC):
    """Data, a model with its hyperparameters, two losses, and the figures to measure.

    A task is a dataclass of its options. A batch is a vector with the indices of its examples, so that example weights,
    folds and a retraining on everything need no code of their own.
    """

    loss_name = "cross-entropy"  # the name of the loss in the pictures

    def __post_init__(self) -> None:
        for option in fields(self):
            kinds, value = WORDS.get(str(option.type)), getattr(self, option.name)
            if kinds and (not isinstance(value, kinds[0]) or (isinstance(value, bool) and bool not in kinds[0])):
                raise TypeError(f"task.{option.name}={value!r}: give {kinds[1]}")

    @abstractmethod
    def setup(self, seed: int) -> dict[str, Tensor]:
        """Read the data, split it by the seed, and return the indices of the examples in train, val and test."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A newly initialised model."""

    @abstractmethod
    def hparams(self, model: nn.Module) -> nn.Module:
        """The hyperparameters at their start."""

    @abstractmethod
    def train_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The training loss: a method, or a :class:`hoptim.CompositeLoss`."""

    @abstractmethod
    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The validation loss, which the hyperparameters minimise."""

    @abstractmethod
    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        """Means over a batch: ``loss``, and others that are of interest. The model is in evaluation mode."""

    def final_model(self, hparams: nn.Module) -> nn.Module:
        """The model that is trained at the end, with the learned hyperparameters. A search over models builds its result."""
        return self.model()

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The parts of the model that are gathered one after another where it is sharded: the items of its lists."""
        lists = [model] if isinstance(model, nn.Sequential) else list(model.children())
        items = [item for one in lists if isinstance(one, (nn.Sequential, nn.ModuleList)) for item in one]
        return [item for item in items if next(item.parameters(), None) is not None]

    def progress(self, hparams: nn.Module, share: float) -> None:  # noqa: B027 (a task may leave it as it is)
        """Change what depends on how far the training is, called when this share of its steps is done."""

    def of_means(self, means: Mapping[str, float]) -> dict[str, float]:
        """Figures that follow from the means over a whole part, such as a perplexity."""
        return {}

    def draw(self, problem: hoptim.Problem, folder: Path) -> list[Path]:
        """Draw pictures of what was learned, beside those of every task, and return their paths."""
        return []

    def problem(self) -> hoptim.Problem:
        """A new model, its hyperparameters and the two losses."""
        model = self.model()
        return hoptim.Problem(model, self.hparams(model), self.train_loss, self.val_loss)


def of_classes(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The figures of a classifier, from its logits and the classes: cross-entropy and accuracy."""
    return {"loss": F.cross_entropy(z, y), "accuracy": (z.argmax(1) == y).double().mean()}


@dataclass(frozen=True)
class Shuffled:
    """Batches of equal size, in a new random order at each pass; a last batch that is smaller is left out.

    >>> [len(batch) for batch in Shuffled(torch.arange(7), 3)]
    [3, 3]
    """

    examples: Tensor
    size: int

    def __iter__(self) -> Iterator[Tensor]:
        return self.shuffled(None)

    def shuffled(self, generator: torch.Generator | None) -> Iterator[Tensor]:
        """The batches of a pass, in an order drawn by this generator."""
        order = self.examples[torch.randperm(len(self.examples), generator=generator)]
        return iter(order.split(self.size)[: len(self)])

    def __len__(self) -> int:
        return len(self.examples) // self.size


def batches_of(examples: Tensor, size: int | None) -> Shuffled | list[Tensor]:
    """Batches of this size, or one batch of all examples if ``size`` is ``None`` or not below their number."""
    return [examples] if size is None or size >= len(examples) else Shuffled(examples, size)


class TrainingBatches:
    """Training batches without end, each pass in a new random order by its own generator. It can be resumed at any batch.

    Args:
        examples: their indices.
        size: of a batch; ``None``, or a size not below the number of examples: all of them are the batch.

    >>> batches = TrainingBatches(torch.arange(7), 3)
    >>> first, second = batches.draw(), batches.draw()
    >>> len(torch.cat([first, second]).unique())
    6
    """

    def __init__(self, examples: Tensor, size: int | None) -> None:
        self.passes = batches_of(examples, size)
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        self.drawn, self.state, self.rest = 0, self.generator.get_state(), iter(())

    def __len__(self) -> int:
        return len(self.passes)

    def draw(self) -> Tensor:
        """The next batch."""
        if isinstance(self.passes, list):
            return self.passes[0]
        if self.drawn % len(self) == 0:
            self._begin()
        self.drawn += 1
        return next(self.rest)

    def _begin(self) -> None:
        self.state = self.generator.get_state()
        self.rest = self.passes.shuffled(self.generator)

    def state_dict(self) -> dict[str, Any]:
        """How many batches were drawn, and the generator's state when the current pass began."""
        return {"drawn": self.drawn, "state": self.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the saved pass again and go to its position."""
        self.drawn = state["drawn"]
        self.generator.set_state(state["state"])
        if not isinstance(self.passes, list) and self.drawn:
            self._begin()
            for _ in range((self.drawn - 1) % len(self) + 1):
                next(self.rest)


@torch.no_grad()
def measure(task: Task, model: nn.Module, hparams: nn.Module, parts: Mapping[str, Tensor]) -> dict[str, float]:
    """The task's figures on each part of the data, such as ``test_loss``: means over its examples, and what follows."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    measured = {}
    for name, examples in parts.items():
        means: dict[str, float] = {}
        for batch in examples.split(CHUNK):
            for figure, value in task.figures(model, hparams, batch).items():
                means[figure] = means.get(figure, 0.0) + float(value) * (len(batch) / len(examples))
        measured |= {f"{name}_{figure}": value for figure, value in {**means, **task.of_means(means)}.items()}
    for part, mode in modes.items():
        part.training = mode
    return measured
