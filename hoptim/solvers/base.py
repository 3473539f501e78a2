"""What every solver of Aᵀx = g shares: its interface, checks of its options and its operator, a preconditioner around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hoptim.checks import is_finite, is_whole
from hoptim.linalg.operators import Operator, Root, Scaled
from hoptim.linalg.vectors import inverse
from hoptim.solvers.solution import Solution, State


class Solver(ABC):
    """A strategy for Aᵀx = g: a frozen dataclass that owns its options, sees no model and keeps no state."""

    @abstractmethod
    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Solve Aᵀx = g for one right-hand side, or for R at once.

        Args:
            A: the curvature.
            g: the right-hand side, of shape (n,), or R of them, (R, n). It is left as it is.
            state: the ``state`` of the last solution for a similar operator, if any; what does not fit is ignored.
        """


@dataclass(frozen=True, kw_only=True)
class Iterative(Solver):
    """A solver of at most ``terms`` products that stops at a relative residual of ``tolerance``."""

    terms: int = 20
    tolerance: float = 1e-5
    least_terms: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (is_whole(self.terms) and self.terms >= self.least_terms):
            raise ValueError(f"terms={self.terms!r}: give a whole number of products, {self.least_terms} or more")
        if not (is_finite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance={self.tolerance!r}: give a finite number, 0 or more")


def check_positive(name: str, value: float, or_else: str = "") -> None:
    """Raise ``ValueError`` unless it is a finite number above 0; ``or_else`` says what else there is."""
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{name}={value!r}: give a positive number{or_else}")


def check_operator(solver: Solver, A: Operator, *, symmetric: bool = True) -> None:
    """Raise ``TypeError`` for an operator that changes from product to product, or is not known to be symmetric.

    The answer would be silently wrong: a polynomial in several matrices solves no system.
    """
    name = type(solver).__name__
    if not A.is_fixed:
        raise TypeError(
            f"{name} needs the same curvature in each product, and this one changes, as with a fresh batch for each: take "
            "hoptim.Neumann, hoptim.SOBA or hoptim.Identity, or hoptim.Averaged for the curvature"
        )
    if symmetric and not A.is_symmetric:
        raise TypeError(
            f"{name} solves symmetric systems only, and this curvature is not known to be symmetric: take hoptim.GMRES, "
            "hoptim.Neumann or hoptim.Identity"
        )


def solve_scaled(solver: Solver, A: Operator, g: Tensor, scale: Tensor | Root, state: State | None = None) -> Solution:
    """Solve S Aᵀ S y = S g for x = S y, with S = D^(−1/2), or its diagonal of shape (n,), and a preconditioner D close to A.

    The residuals are those of the scaled system. The solution carried to the next call is x, not y, since S may have changed
    by then.

    Source: Saad, "Iterative Methods for Sparse Linear Systems", section 9.2 (split preconditioning).

    >>> from hoptim import Identity
    >>> from hoptim.linalg.operators import Symmetric
    >>> A, g = Symmetric(lambda v: torch.tensor([1.0, 4.0]) * v, like=torch.ones(2)), torch.ones(2)
    >>> solve_scaled(Identity(), A, g, scale=torch.tensor([1.0, 0.5])).value
    tensor([1.0000, 0.2500])
    """
    S = Root.diagonal(scale) if isinstance(scale, Tensor) else scale
    state = dict(state or {})
    if (x := carried(state, "solution", g)) is not None:
        state["solution"] = S.inverse @ x
    solution = solver.solve(Scaled(A, S), S @ g, state)
    state = {name: S @ vector if name == "solution" else vector for name, vector in solution.state.items()}
    return replace(solution, value=S @ solution.value, state=state)


def carried(state: State | None, name: str, like: Tensor | Operator) -> Tensor | None:
    """The vector of that name in ``state``, if it has the shape, type and device of ``like``: the model may have changed.

    >>> carried({"direction": torch.ones(2)}, "direction", torch.zeros(2))
    tensor([1., 1.])
    >>> carried({"direction": torch.ones(2)}, "direction", torch.zeros(3))
    """
    found = (state or {}).get(name)
    if not isinstance(found, Tensor):
        return None
    shape = torch.Size([like.size]) if isinstance(like, Operator) else like.shape
    return found if (found.shape, found.dtype, found.device) == (shape, like.dtype, like.device) else None


def rayleigh(A: Operator, v: Tensor, product: Tensor) -> Tensor:
    """⟨v, A v⟩ / ⟨v, v⟩, the curvature along v: zero where v is zero."""
    over = inverse(A.norm(v))
    return A.dot(v, product) * over * over
