"""How well a method learns: digits with 40 % wrong labels, a weight for each example, small batches.

A cosine ignores lengths, but a single hypergradient that is fifty times too long upsets the outer optimizer for many steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

import hoptim

TRAIN, VAL, EPOCHS = 600, 200, 200


@dataclass(frozen=True, kw_only=True)
class Learned:
    """Means over seeds; ``uneven`` is the length of the longest hypergradient over the median length, on the worst seed."""

    method: str
    loss: float
    accuracy: float
    uneven: float
    skipped: int
    seconds: float


def learned(name: str, method: Any, seeds: int) -> Learned:
    """Train with the method on each seed, and test; without learning if it is ``None``."""
    begun = time.process_time()
    runs = [_run(method, seed) for seed in range(seeds)]
    losses, accuracies, uneven, skipped = zip(*runs, strict=True)
    return Learned(
        method=name,
        loss=mean(losses),
        accuracy=mean(accuracies),
        uneven=max(uneven),
        skipped=sum(skipped),
        seconds=(time.process_time() - begun) / seeds,
    )


def _run(method: Any, seed: int) -> tuple[float, float, float, int]:
    torch.manual_seed(seed)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x, order = x.to(torch.get_default_dtype()) / 16, torch.randperm(len(x))
    train, val, test = order[:TRAIN], order[TRAIN : TRAIN + VAL], order[TRAIN + VAL :]
    wrong = torch.rand(TRAIN) < 0.4
    y[train[wrong]] = torch.randint(10, (int(wrong.sum()),))

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        losses = cross_entropy(z, y[train][batch], reduction="none")
        return (hparams["example_weight"][batch] * losses).mean()

    def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return cross_entropy(model(x[batch]), y[batch])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    half = torch.full((TRAIN,), 0.5)
    hparams = hoptim.HyperParameters({"example_weight": half}, {"example_weight": constraints.unit_interval})
    train_loss = hoptim.CompositeLoss(lambda model, _, batch: model(x[train][batch]), criterion)
    rows: list[dict[str, Any]] = []
    optimizer = hoptim.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3),
        torch.optim.Adam(hparams.parameters(), lr=0.1),
        hoptim.Problem(model, hparams, train_loss, val_loss),
        val_batches=[val],
        hypergradient=method,
        every=None if method is None else 10,
        warmup=60,
        hooks=[lambda record: rows.append(record.row())],
    )
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN).split(100):
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()
    with torch.no_grad():
        z = model(x[test])
    lengths = [row["hypergradient_norm"] for row in rows if row["moved"]]
    uneven = max(lengths) / median(lengths) if lengths else 0.0
    skipped = sum(not row["moved"] for row in rows)
    return float(cross_entropy(z, y[test])), float((z.argmax(1) == y[test]).float().mean()), uneven, skipped
