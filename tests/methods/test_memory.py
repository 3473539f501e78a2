"""How many vectors, as long as the weights, a hypergradient holds at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import vectors_held, wide_problem

from hoptim import Averaged, Exact, FiniteDifference, GaussNewton, Implicit

# g, five vectors of MINRES, the pieces of a product, and half a vector more, since a matrix is half of the model
HELD = {Exact(): 7.5, GaussNewton(): 8.0, Averaged(batches=1): 8.0, FiniteDifference(): 10.0}


@pytest.mark.parametrize("curvature", HELD, ids=str)
def test_a_solve_holds_g_its_own_vectors_and_one_product(curvature: Any) -> None:
    assert vectors_held(wide_problem(), Implicit(curvature=curvature, damping=0.1)) < HELD[curvature] + 0.15


def test_with_decay_of_the_optimizer_it_holds_the_decay_too() -> None:
    one = wide_problem()
    inner = torch.optim.SGD(one.model.parameters(), lr=0.1, weight_decay=0.1)
    assert vectors_held(one, Implicit(curvature=Exact()), inner) < 8.5 + 0.15
