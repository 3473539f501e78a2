"""How well a method learns: digits with 40 % wrong labels, a weight for each example, small batches.

A cosine ignores lengths, but a single hypergradient that is fifty times too long upsets the outer optimizer for many steps.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import mean, median
from typing import Any

import torch
from studies.fidelity.methods import Entry
from tasks import data
from tasks.loops import in_epochs, train
from tasks.supervised import Supervised, sgd
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

import hoptim

TRAIN, VAL, EPOCHS = 600, 200, 200


def learned(name: str, entry: Entry | None, seeds: int) -> list[str]:
    """Train with the method on each seed, without learning if there is none; return its line in the table.

    The means of test loss and accuracy, the length of the longest hypergradient over the median length on the worst seed,
    how many hypersteps moved nothing, and CPU seconds.
    """
    begun = time.process_time()
    losses, accuracies, uneven, skipped = zip(*(run(entry, seed) for seed in range(seeds)), strict=True)
    seconds = (time.process_time() - begun) / seeds
    return [
        name,
        f"{mean(losses):.3f}",
        f"{mean(accuracies):.3f}",
        f"{max(uneven):.3g}",
        f"{sum(skipped)}",
        f"{seconds:.2f}",
    ]


def run(entry: Entry | None, seed: int) -> tuple[float, float, float, int]:
    """Test loss, accuracy, longest over median length, and how many hypersteps moved nothing."""
    torch.manual_seed(seed)
    x, y = data.table("digits")
    order = torch.randperm(len(x))
    x, y, wrong = x[order].to(torch.get_default_dtype()) / 16, y[order], torch.rand(TRAIN) < 0.4
    y[:TRAIN][wrong] = torch.randint(10, (int(wrong.sum()),))
    parts = dict(zip(("train", "val", "test"), torch.arange(len(x)).tensor_split([TRAIN, TRAIN + VAL]), strict=True))
    make, inner = lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), partial(sgd, weight_decay=1e-3)
    task = Supervised(x=x, y=y, **parts, make=make, inner=inner)

    def criterion(z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return (hparams["example_weight"][batch] * cross_entropy(z, y[batch], reduction="none")).mean()

    model, half = task.make(), torch.full((TRAIN,), 0.5)
    method = entry and entry.on(model, [(x[task.train], y[task.train])])
    hparams = hoptim.HyperParameters({"example_weight": half}, {"example_weight": constraints.unit_interval})
    rows: list[dict[str, Any]] = []
    optimizer = hoptim.BilevelOptimizer(
        task.inner(model), torch.optim.Adam(hparams.parameters(), lr=0.1),
        hoptim.Problem(model, hparams, hoptim.CompositeLoss(task.predict, criterion), task.val_loss),
        val_batches=[task.val], hypergradient=method, every=None if method is None else 10, warmup=60,
        hooks=[lambda record: rows.append(record.row())],
    )  # fmt: skip
    train(model, optimizer, in_epochs(task.train, 100, EPOCHS * TRAIN // 100))
    with torch.no_grad():
        z = model(x[task.test])
    lengths = [row["hypergradient_norm"] for row in rows if row["moved"]]
    uneven, skipped = max(lengths) / median(lengths) if lengths else 0.0, sum(not row["moved"] for row in rows)
    accuracy = float((z.argmax(1) == y[task.test]).float().mean())
    return float(task.fit(z, task.test)), accuracy, uneven, skipped
