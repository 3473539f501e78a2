"""How many vectors, as long as the weights, a hypergradient holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import Peak, vectors_held, wide_problem

from hoptim import (
    CG,
    Averaged,
    Exact,
    FiniteDifference,
    GaussNewton,
    Implicit,
    PerTask,
    Problem,
    Unrolled,
    hypergradient,
)
from hoptim.recipes import Initialization

# g, five vectors of MINRES, the pieces of a product, and half a vector more, since a matrix is half of the model
HELD = {Exact(): 7.5, GaussNewton(): 8.0, Averaged(batches=1): 8.0, FiniteDifference(): 10.0}


@pytest.mark.parametrize("curvature", HELD, ids=str)
def test_a_solve_holds_g_its_own_vectors_and_one_product(curvature: Any) -> None:
    assert vectors_held(wide_problem(), Implicit(curvature=curvature, damping=0.1)) < HELD[curvature] + 0.15


def test_with_decay_of_the_optimizer_it_holds_the_decay_too() -> None:
    one = wide_problem()
    inner = torch.optim.SGD(one.model.parameters(), lr=0.1, weight_decay=0.1)
    assert vectors_held(one, Implicit(curvature=Exact()), inner) < 8.5 + 0.15


def peak_of_tasks(steps: int, method: Any, **options: Any) -> int:
    """The most memory of a hypergradient of four tasks."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 16))

    def loss(model: Any, hparams: Any, x: Any) -> Any:
        return model(x).square().mean() + hparams.penalty(model, 0.1)

    problem, x = Problem(model, Initialization(model), loss, loss), torch.randn(4, 8, 16)
    inner, how = torch.optim.SGD(model.parameters(), lr=0.1), PerTask(steps, method, **options)
    hypergradient(problem, x, x, how, inner=inner)  # checks what is checked once
    with Peak() as peak:
        hypergradient(problem, x, x, how, inner=inner)
    return peak.bytes


def test_the_memory_of_implicit_maml_does_not_grow_with_the_steps() -> None:
    for chunk_size in (None, 1):
        few, many = (peak_of_tasks(steps, Implicit(CG(terms=3)), chunk_size=chunk_size) for steps in (4, 20))
        assert many < 1.02 * few
    few, many = (peak_of_tasks(steps, None) for steps in (4, 20))
    assert many > 3 * few
    few, many = (peak_of_tasks(steps, Unrolled(steps, checkpoint=True)) for steps in (4, 16))
    assert many < 2.5 * few  # √(16/4) = 2
