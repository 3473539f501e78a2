"""Iris with a weight decay for each weight: the main experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim
from hoptim.problem.sharding import whole
from tasks.task import Task, of_classes

PARAMETERISATIONS = {"exp": constraints.positive, "clamp": constraints.nonnegative}


@dataclass(kw_only=True)
class Iris(Task):
    """Iris, split 60 / 60 / 30 by class, and an MLP 4–h–h–3 with ReLU and dropout, without biases.

    L_T = cross-entropy + ½ Σ decay_i·w_i², with one decay for each weight, or one for all.

    Args:
        hidden: h; the model has 4h + h² + 3h weights: 17,280 at 128, 1,055,744 at 1024.
        dropout: probability of dropping a hidden unit.
        decay: initial value of every decay, ≥ 0.
        per_weight: whether each weight has its own decay, or all share one.
        parameterisation: ``exp`` (the leaf is log decay) or ``clamp`` (the leaf is the decay, clamped at zero).
        join: train on the training and the validation set together; validation figures then mean nothing.
    """

    hidden: int = 128
    dropout: float = 0.5
    decay: float = 0.01
    per_weight: bool = True
    parameterisation: str = "exp"
    join: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parameterisation not in PARAMETERISATIONS:
            raise ValueError(f"parameterisation={self.parameterisation!r}: give one of {sorted(PARAMETERISATIONS)}")
        if self.parameterisation == "exp" and self.decay <= 0:
            raise ValueError(f"decay={self.decay}: exp needs a positive start; parameterisation=clamp may start at 0")

    def setup(self, seed: int) -> dict[str, Tensor]:
        """Split by class, and standardise by the mean and standard deviation of the training part."""
        x, y = load_iris(return_X_y=True)
        rest, test = train_test_split(np.arange(len(x)), test_size=30, stratify=y, random_state=seed)
        train, val = train_test_split(rest, test_size=60, stratify=y[rest], random_state=seed)
        self.x = torch.tensor((x - x[train].mean(0)) / x[train].std(0), dtype=torch.float32)
        self.y = torch.tensor(y)
        parts = {name: torch.from_numpy(part) for name, part in (("train", train), ("val", val), ("test", test))}
        if self.join:
            parts["train"] = torch.cat([parts["train"], parts["val"]])
        return parts

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(4, self.hidden, bias=False), nn.ReLU(), nn.Dropout(self.dropout),
            nn.Linear(self.hidden, self.hidden, bias=False), nn.ReLU(), nn.Dropout(self.dropout),
            nn.Linear(self.hidden, 3, bias=False),
        )  # fmt: skip

    def hparams(self, model: nn.Module) -> nn.Module:
        if self.per_weight:
            values = {name: torch.full_like(weight, self.decay) for name, weight in model.named_parameters()}
        else:
            values = {"decay": torch.tensor(self.decay)}
        return hoptim.HyperParameters(values, dict.fromkeys(values, PARAMETERISATIONS[self.parameterisation]))

    @property
    def train_loss(self) -> hoptim.CompositeLoss:
        return hoptim.CompositeLoss(
            lambda model, _, batch: model(self.x[batch]), lambda z, _, batch: F.cross_entropy(z, self.y[batch]), self.penalty
        )

    def penalty(self, model: nn.Module, hparams: Any) -> Tensor:
        """½ Σ decay·w²."""
        return 0.5 * sum(
            (hparams[name if self.per_weight else "decay"] * whole(weight).square()).sum()
            for name, weight in model.named_parameters()
        )

    def val_loss(self, model: nn.Module, hparams: Any, batch: Tensor) -> Tensor:
        """Cross-entropy without dropout."""
        return F.cross_entropy(model.eval()(self.x[batch]), self.y[batch])

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, without dropout and penalty."""
        return of_classes(model(self.x[batch]), self.y[batch])
