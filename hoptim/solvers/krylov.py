"""Solvers that build a Krylov space: conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim import trees
from hoptim.operators import Operator
from hoptim.solvers.base import Solution, Solver, Status
from hoptim.solvers.stationary import READ_EVERY
from hoptim.trees import Tree


@dataclass(frozen=True, kw_only=True)
class CG(Solver):
    """Conjugate gradients for a symmetric positive definite curvature: the best x of the Krylov space in A's own norm.

    It stops *before* a direction of negative curvature and returns the iterate reached till then; where already the first
    direction, g itself, curves downward with ρ = gᵀAg / gᵀg < 0, that is x = g / |ρ|, one step down the gradient. Each of
    several right-hand sides stops for itself.

    Args:
        terms: the most products, ≥ 1, default 20. Stopping early is also a regulariser.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.

    Source: Hestenes and Stiefel 1952; the stop at negative curvature: Dembo and Steihaug 1983, "Truncated-Newton algorithms
    for large-scale unconstrained optimization".

    >>> from hoptim.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = CG().solve(A, {"w": torch.ones(2)})
    >>> solution.value, solution.status.name, solution.products
    ({'w': tensor([0.5000, 0.2500])}, 'CONVERGED', 2)
    """

    terms: int = 20
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if not (trees.is_whole(self.terms) and self.terms >= 1):
            raise ValueError(f"terms={self.terms!r}: give a whole number of products, 1 or more")
        if not (trees.is_finite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance={self.tolerance!r}: give a finite number, 0 or more")

    def solve(self, A: Operator, g: Tree, state: Tree | None = None) -> Solution:
        """Iterate from x = 0; what has stopped is frozen by coefficients of zero, so that the host need not look."""
        batched = A.is_batched(g)
        x, r, p = trees.zeros_like(g), trees.clone(g), trees.clone(g)
        square = start = trees.dot(g, g, batched=batched)
        goal = start * self.tolerance**2
        active = square > goal
        flat = downward = torch.zeros_like(active)
        lowest, residuals = torch.zeros_like(square), []
        for term in range(1, self.terms + 1):
            product = A @ p
            along = trees.dot(p, product, batched=batched)
            turned = active & (along <= 0)
            downward, active = downward | turned, active & ~turned
            lowest = torch.where(turned, along / trees.dot(p, p, batched=batched), lowest)
            step = torch.where(active, square / along, 0.0)
            if term == 1:
                flat = turned & (along == 0)
                step = torch.where(turned & (along < 0), start / along.abs(), step)
            trees.axpy_(x, p, step)
            trees.axpy_(r, product, -step)
            before, square = square, trees.dot(r, r, batched=batched)
            residuals.append((square / torch.where(start > 0, start, 1.0)).sqrt())
            active = active & (square > goal)
            trees.xpay_(p, r, torch.where(active, square / before, 0.0))
            if _time_to_look(term, self.terms, square) and not bool(active.any()):
                break
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~square.isfinite(),
            Status.NO_CURVATURE: flat,
            Status.NEGATIVE_CURVATURE: downward,
            Status.FINISHED: square > goal,
        }
        status, detail = _ended(flags, lowest, len(residuals))
        history = torch.stack(residuals)
        return Solution(value=x, status=status, detail=detail, residuals=history, products=len(history), state={})


def _time_to_look(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU a look costs nothing; elsewhere the device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % READ_EVERY == 0)


def _ended(flags: dict[Status, Tensor], lowest: Tensor, terms: int) -> tuple[Status, str]:
    """The first status that holds for any right-hand side; the host looks at the device once."""
    *held, curvature = torch.stack([*(flag.any().double() for flag in flags.values()), lowest.amin().double()]).tolist()
    status = next((status for status, holds in zip(flags, held, strict=True) if holds), Status.CONVERGED)
    if status is Status.NEGATIVE_CURVATURE:
        return status, f"stopped before a direction of curvature {curvature:.3g}, within {terms} products"
    return status, ""
