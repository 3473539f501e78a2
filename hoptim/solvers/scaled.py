"""A solve with a diagonal preconditioner."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from hoptim.linalg.operators import Operator, Scaled
from hoptim.solvers.base import Solver, carried
from hoptim.solvers.solution import Solution, State


def solve_scaled(solver: Solver, A: Operator, g: Tensor, scale: Tensor, state: State | None = None) -> Solution:
    """Solve S Aᵀ S y = S g for x = S y, with a diagonal S = D^(−1/2) of shape (n,) and D close to A.

    The residuals are those of the scaled system. The solution carried to the next call is x, not y, since S may have changed
    by then.

    Source: Saad, "Iterative Methods for Sparse Linear Systems", section 9.2 (split preconditioning).

    >>> import torch
    >>> from hoptim import Identity
    >>> from hoptim.linalg.operators import Symmetric
    >>> A, g = Symmetric(lambda v: torch.tensor([1.0, 4.0]) * v, like=torch.ones(2)), torch.ones(2)
    >>> solve_scaled(Identity(), A, g, scale=torch.tensor([1.0, 0.5])).value
    tensor([1.0000, 0.2500])
    """
    state = dict(state or {})
    if (x := carried(state, "solution", g)) is not None:
        state["solution"] = x / scale
    solution = solver.solve(Scaled(A, scale), scale * g, state)
    state = {name: scale * vector if name == "solution" else vector for name, vector in solution.state.items()}
    return replace(solution, value=scale * solution.value, state=state)
