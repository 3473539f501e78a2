"""What every solver of Aᵀx = g shares: its interface, and the checks of its options and its operator."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.solvers.solution import Solution, State
from hoptim.validation import is_finite, is_whole


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

    def __post_init__(self) -> None:
        check_terms(self.terms, least=1)
        check_tolerance(self.tolerance)


def check_terms(terms: int, least: int) -> None:
    """Raise ``ValueError`` unless it is a whole number, ``least`` or more."""
    if not (is_whole(terms) and terms >= least):
        raise ValueError(f"terms={terms!r}: give a whole number of products, {least} or more")


def check_tolerance(tolerance: float) -> None:
    """Raise ``ValueError`` unless it is a finite number, 0 or more."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance={tolerance!r}: give a finite number, 0 or more")


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


def inverse(a: Tensor) -> Tensor:
    """1 / a for a length a, finite even if a is zero, so that a zero vector divided by its length stays zero.

    >>> 0 * inverse(torch.tensor(0.0))
    tensor(0.)
    """
    return a.clamp(min=torch.finfo(a.dtype).tiny).reciprocal()
