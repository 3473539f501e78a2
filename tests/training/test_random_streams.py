"""Hypersteps that move nothing leave no trace in a training: whatever draws random numbers, and from whichever generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cases import classes, cross_entropy_with_decay, evaluated_cross_entropy, noisy_model, same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

import hoptim
from hoptim import Averaged, Exact, Implicit, Sampled, Unrolled

PULLED: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
    "numpy": np.random.rand,
}


class Jittered(Dataset[Any]):
    """Rows to which a transform adds noise from one of the global generators."""

    def __init__(self, name: str) -> None:
        self.draw, (self.x, self.y) = PULLED[name], classes(12, 5)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + self.draw(), self.y[i]


def rows() -> TensorDataset:
    return TensorDataset(*classes(12, 5))


LOADERS: dict[str, Callable[[torch.Generator], Any]] = {
    "in order": lambda _: DataLoader(rows(), 4),
    "shuffled": lambda _: DataLoader(rows(), 4, shuffle=True),
    "with replacement": lambda _: DataLoader(rows(), 4, sampler=RandomSampler(rows(), replacement=True, num_samples=40)),
    "the training loader's generator": lambda shared: DataLoader(rows(), 4, shuffle=True, generator=shared),
    "a function that draws": lambda _: lambda: rows()[torch.randint(12, (4,))],
    "workers": lambda _: DataLoader(Jittered("torch"), 4, shuffle=True, num_workers=2, persistent_workers=True),
    **{f"noise from {name}": (lambda _, name=name: DataLoader(Jittered(name), 4, shuffle=True)) for name in PULLED},
}


def noisy(loss: Any) -> Any:
    """The loss, scaled by a number from each of the global generators."""
    return lambda *given: loss(*given) * (1 + 0.1 * sum(draw() for draw in PULLED.values()))


def trained(every: int | None, losses: Callable[[Any], Any] = lambda loss: loss, **options: Any) -> list[Any]:
    """Bits of a training that draws from all generators: of the weights, of each loss, and of what is drawn afterwards."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    model, shared = noisy_model(), torch.Generator().manual_seed(4)
    hparams = hoptim.HyperParameters({"decay": torch.tensor(0.01)})
    problem = hoptim.Problem(model, hparams, losses(cross_entropy_with_decay), losses(evaluated_cross_entropy))
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.05), torch.optim.SGD(hparams.parameters(), lr=0.0)
    sources = {key: value(shared) for key, value in options.items() if key.endswith("batches")}
    optimizer = hoptim.BilevelOptimizer(
        inner, outer, problem, every=every, **{"val_batches": [classes(8, 1)], **options, **sources}
    )
    values = []
    for _ in range(2):
        for batch in DataLoader(Jittered("numpy"), 4, shuffle=True, generator=shared):
            optimizer.zero_grad()
            loss = optimizer.loss(batch)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    assert optimizer.hyper_steps == (6 if every else 0)
    return [values, dict(model.state_dict()), shared.get_state(), *(draw() for draw in PULLED.values())]


@cache
def alone() -> list[Any]:
    """Those of the training without hypersteps and their batches."""
    return trained(None)


@pytest.mark.filterwarnings("ignore:hyperstep")
@pytest.mark.parametrize("name", LOADERS)
def test_validation_batches_leave_the_training_to_its_bits(name: str) -> None:
    assert same(trained(1, val_batches=LOADERS[name]), alone())


METHODS = {
    "Averaged": Implicit(curvature=Averaged(batches=2, curvature=Exact())),
    "Sampled": Implicit(curvature=Sampled()),
    "Unrolled": Unrolled(1),
}


@pytest.mark.filterwarnings("ignore:hyperstep")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["shuffled", "a function that draws", "noise from python", "the training loader's generator"]
)
def test_training_batches_leave_the_training_to_its_bits(name: str, method: str) -> None:
    assert same(trained(1, train_batches=LOADERS[name], hypergradient=METHODS[method]), alone())


@pytest.mark.filterwarnings("ignore:hyperstep")
def test_losses_that_draw_from_pythons_and_numpys_generators_leave_them_as_they_were() -> None:
    assert same(trained(1, noisy), trained(None, noisy))
