"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import GROWTH_LIMIT, NEGATIVE, Iterative, check_symmetric, should_check_convergence
from hoptim.solvers.krylov import _krylov
from hoptim.solvers.solution import State, Status, Unread


@dataclass(frozen=True, kw_only=True)
class CG(Iterative):
    """Conjugate gradients for a symmetric positive definite curvature: the best x of the Krylov space in A's own norm.

    It stops *before* a direction of negative curvature and returns the iterate reached till then; where already the first
    direction, g itself, curves downward with ρ = gᵀAg / gᵀg < 0, that is x = g / |ρ|, one step down the gradient. Each of
    several right-hand sides stops for itself. The residual may rise on the way, since another norm falls; one that ends
    above 10·‖g‖ is a remark: where A is singular and g not in its range, CG has no limit.

    Args:
        terms: the most products, ≥ 1, default 20; one more is for the residual of what converged. Stopping early is a
            regulariser too.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.
        TypeError: when solving, A is not known to be symmetric.

    Source: Hestenes and Stiefel 1952; the stop at negative curvature: Dembo and Steihaug 1983, "Truncated-Newton algorithms
    for large-scale unconstrained optimization".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = CG().solve(A, {"w": torch.ones(2)})
    >>> solution.value, solution.status.name, solution.products
    ({'w': tensor([0.5000, 0.2500])}, 'CONVERGED', 3)
    """

    def iterated(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Iterate from x = 0; what has stopped is frozen by coefficients of zero, so that the host need not look."""
        check_symmetric(self, A)
        batched = A.is_batched(g)
        x, r, p = trees.zeros_like(g), trees.clone(g), trees.clone(g)
        square = start = length = trees.dot(g, g, batched=batched)  # ‖r‖², ‖g‖² and ‖p‖²
        goal = start * self.tolerance**2
        active = square > goal
        flat = downward = torch.zeros_like(active)
        lowest = highest = torch.zeros_like(square)
        squares, rounding = [], torch.finfo(square.dtype).eps
        for term in range(1, self.terms + 1):
            product = A @ p
            along = trees.dot(p, product, batched=batched)
            curvature = along / length
            highest = torch.fmax(highest, curvature)  # where p is zero the curvature is NaN, and nothing is active
            flat_below = rounding * highest  # a flat direction would be walked along for ever
            turned = active & (curvature <= flat_below)
            downward, active = downward | (turned & (curvature < NEGATIVE * highest)), active & ~turned
            lowest = torch.where(turned, curvature, lowest)
            step = torch.where(active, square / along, 0.0)
            if term == 1:
                flat = turned & ~downward
                step = torch.where(turned & downward, start / along.abs(), step)
            trees.axpy_(x, p, step)
            trees.axpy_(r, product, -step)
            before, square = square, trees.dot(r, r, batched=batched)
            squares.append(square)
            active = active & (square > goal)
            share = torch.where(active, square / before, 0.0)
            trees.xpay_(p, r, share)
            length = square + share.square() * length  # r is orthogonal to the last p
            if should_check_convergence(term, self.terms, square) and not bool(active.any()):
                break
        residuals = (torch.stack(squares) / torch.where(start > 0, start, 1.0)).sqrt()
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~square.isfinite(),
            Status.NO_CURVATURE: flat,
            Status.NEGATIVE_CURVATURE: downward,
            Status.LARGE_RESIDUAL: residuals[-1] > GROWTH_LIMIT,
            Status.FINISHED: square > goal,
        }
        return _krylov(x, residuals, flags, lowest, "stopped before a direction of curvature")
