"""The small tasks of the studies: a data set in three parts, a model, and the losses that hoptim's recipes change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Examples in three parts, and a model of them. A batch is a vector with the indices of its examples.

    Attributes:
        x: the inputs.
        y: classes, or numbers of shape (N, 1).
        train: the training examples.
        val: the validation examples.
        test: the test examples.
        make: makes a new model.
        inner: makes the optimizer of a model.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor
    make: Callable[[], nn.Module]
    inner: Callable[[nn.Module], torch.optim.Optimizer]

    @property
    def has_classes(self) -> bool:
        """Whether it is a classification."""
        return not self.y.is_floating_point()

    def fit(self, z: Tensor, batch: Tensor) -> Tensor:
        """The cross-entropy of logits, or the squared error of predictions."""
        y = self.y[batch]
        return F.cross_entropy(z, y.flatten()) if self.has_classes else F.mse_loss(z, y)

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The loss of validation and test, in evaluation mode."""
        return self.fit(model.eval()(self.x[batch]), batch)

    @property
    def train_loss(self) -> hoptim.CompositeLoss:
        """The same with what ``hparams`` has: noise, dropout, smoothing, a decay and a lasso."""
        return hoptim.CompositeLoss(self.predict, self.criterion, penalty)

    def predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The model's outputs in training, with noise and dropout."""
        for name in ("dropout", "noise"):
            if name in hparams:
                model = Through(model, hparams[name])
        return model(self.x[batch])

    def criterion(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        """The loss of the outputs, with label smoothing."""
        if "smoothing" in hparams:
            return hparams["smoothing"].cross_entropy(z, self.y[batch])
        return self.fit(z, batch)


def penalty(model: Any, hparams: Any) -> Any:
    """The learned penalties of the weights."""
    return sum(hparams[name].penalty(model) for name in ("decay", "lasso") if name in hparams)


class Through:
    """A model whose layers get inputs that a recipe has changed. Another recipe can call it as it would the model."""

    def __init__(self, model: Any, recipe: Any) -> None:
        self.model, self.recipe = model, recipe

    def __call__(self, x: Tensor) -> Tensor:
        return self.recipe.call(self.model, x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    """SGD with momentum 0.9."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, **options)
