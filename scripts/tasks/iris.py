"""Iris, with a weight decay for each weight: the experiment that hoptim started from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_iris
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim

Batch = tuple[Tensor, Tensor]
PARAMETERISATIONS = {"exp": constraints.positive, "clamp": constraints.nonnegative}


@dataclass(frozen=True, kw_only=True)
class Iris:
    """Iris, split 60 / 60 / 30 by class, and an MLP 4–h–h–3 with ReLU and dropout, without biases.

    L_T = cross-entropy + ½ Σ decay_i·w_i², with one decay for each weight, or one for all.

    Args:
        hidden: h; the model has 4h + h² + 3h weights: 17,280 at 128, 1,055,744 at 1024.
        dropout: probability of dropping a hidden unit.
        decay: initial value of every decay, ≥ 0.
        per_weight: one decay for each weight, or a single one.
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
        if self.parameterisation not in PARAMETERISATIONS:
            raise ValueError(f"parameterisation={self.parameterisation!r}: give one of {sorted(PARAMETERISATIONS)}")
        if self.parameterisation == "exp" and self.decay <= 0:
            raise ValueError(f"decay={self.decay}: exp needs a positive start; parameterisation=clamp may start at 0")

    def data(self, seed: int) -> dict[str, Batch]:
        """The three parts, standardised by mean and standard deviation of the training part."""
        x, y = load_iris(return_X_y=True)
        rest, test, y_rest, y_test = train_test_split(x, y, test_size=30, stratify=y, random_state=seed)
        train, val, y_train, y_val = train_test_split(rest, y_rest, test_size=60, stratify=y_rest, random_state=seed)
        mean, deviation = train.mean(0), train.std(0)
        parts = {"train": (train, y_train), "val": (val, y_val), "test": (test, y_test)}
        batches = {
            name: (torch.tensor((x - mean) / deviation, dtype=torch.float32), torch.tensor(y))
            for name, (x, y) in parts.items()
        }
        if self.join:
            pairs = zip(batches["train"], batches["val"], strict=True)
            batches["train"] = tuple(torch.cat(pair) for pair in pairs)
        return batches

    def problem(self) -> hoptim.Problem:
        """A newly initialised model, its decays and the two losses."""
        model = nn.Sequential(
            nn.Linear(4, self.hidden, bias=False), nn.ReLU(), nn.Dropout(self.dropout),
            nn.Linear(self.hidden, self.hidden, bias=False), nn.ReLU(), nn.Dropout(self.dropout),
            nn.Linear(self.hidden, 3, bias=False),
        )  # fmt: skip
        if self.per_weight:
            values = {name: torch.full_like(weight, self.decay) for name, weight in model.named_parameters()}
        else:
            values = {"decay": torch.tensor(self.decay)}
        hparams = hoptim.HyperParameters(values, dict.fromkeys(values, PARAMETERISATIONS[self.parameterisation]))
        train_loss = hoptim.CompositeLoss(
            lambda model, _, batch: model(batch[0]),
            lambda z, _, batch: F.cross_entropy(z, batch[1]),
            self.penalty,
        )
        return hoptim.Problem(model, hparams, train_loss, self.val_loss)

    def penalty(self, model: nn.Module, hparams: Any) -> Tensor:
        """½ Σ decay·w²."""
        return 0.5 * sum(
            (hparams[name if self.per_weight else "decay"] * weight.square()).sum()
            for name, weight in model.named_parameters()
        )

    def val_loss(self, model: nn.Module, hparams: Any, batch: Batch) -> Tensor:
        """Cross-entropy without dropout."""
        x, y = batch
        return F.cross_entropy(model.eval()(x), y)
