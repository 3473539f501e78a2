"""How often the host waits for a device in one hypergradient: once for each 16 products and twice more."""

from __future__ import annotations

import pytest
import torch
from cases import classes, noisy_problem
from reads import elsewhere

from hoptim import CG, GMRES, MINRES, Chebyshev, Exact, Identity, Implicit, Neumann, Nystrom, Solver, hypergradient

SOLVERS: dict[str, Solver | None] = {
    "the default": None,
    "Identity": Identity(),
    "Neumann, step given": Neumann(terms=32, step_size=1e-3),
    "Neumann": Neumann(terms=32),
    "Chebyshev": Chebyshev(terms=32),
    "CG": CG(terms=32, tolerance=0.0),
    "MINRES": MINRES(terms=32, tolerance=0.0),
    "GMRES": GMRES(terms=32, tolerance=0.0),
    "Nystrom": Nystrom(rank=32),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_host_reads_once_for_sixteen_products_and_twice_more(name: str) -> None:
    problem = noisy_problem()
    method = Implicit(SOLVERS[name], curvature=Exact(), damping=10.0)
    hypergradient(problem, classes(8, 0), classes(8, 1), method)  # the first looks at the losses themselves
    with elsewhere() as counter:
        result = hypergradient(problem, classes(8, 0), classes(8, 1), method)
    assert result.solution.status.ok
    assert 1 <= counter.reads <= result.solution.products // 16 + 2


def test_a_read_is_counted() -> None:
    with elsewhere() as counter:
        value = torch.ones(3)
        assert float(value.sum()) == 3.0
    assert counter.reads == 1
