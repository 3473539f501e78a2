"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, aypx_
from hoptim.solvers.base import Iterative, check_operator
from hoptim.solvers.monitor import Monitor
from hoptim.solvers.solution import Solution, State


@dataclass(frozen=True, kw_only=True)
class CG(Iterative):
    """Conjugate gradients for a symmetric positive definite curvature: the best x of the Krylov space in A's own norm.

    It stops *before* a direction of negative curvature and returns the iterate so far. If already the first direction, g
    itself, has curvature ρ = gᵀAg / gᵀg < 0, it returns x = g / |ρ|, one step down the gradient. Several right-hand sides
    stop independently. It stops before a flat direction, too, with ``FLAT_DIRECTIONS``. The residual may rise on the way,
    since CG minimises another norm; one that ends above ‖g‖ is a remark: if A is singular and g not in its range, CG does
    not converge.

    Args:
        terms: the largest number of products, ≥ 1, default 20; if it converges, one more checks the residual. Stopping early
            regularises.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.
        TypeError: when solving, A is not known to be symmetric, or changes from product to product.

    Source: Hestenes and Stiefel 1952; the stop at negative curvature: Dembo and Steihaug 1983, "Truncated-Newton algorithms
    for large-scale unconstrained optimization".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([2.0, 4.0]) * v, like=torch.ones(2))
    >>> solution = CG().solve(A, torch.ones(2))
    >>> solution.value, solution.status.name, solution.products
    (tensor([0.5000, 0.2500]), 'CONVERGED', 3)
    """

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Iterate from x = 0."""
        check_operator(self, A)
        monitor = Monitor(A, g, self.terms, self.tolerance)
        x, r, p = torch.zeros_like(g), g.clone(), g.clone()
        rr = pp = A.dot(r, r)
        largest, rounding = torch.zeros_like(rr), torch.finfo(rr.dtype).eps
        for k in monitor:
            Ap = A @ p
            pAp = A.dot(p, Ap)
            curvature = pAp / pp
            monitor.record_curvature(curvature)
            largest = torch.maximum(largest, curvature)
            monitor.stop(curvature <= rounding * largest)  # a step along a flat direction would have no end
            alpha = monitor.where_active(rr / pAp)
            if k == 1:
                alpha = torch.where(curvature < 0, rr / pAp.abs(), alpha)
            axpy_(x, alpha, p)
            axpy_(r, -alpha, Ap)
            del Ap  # the next product needs its memory
            rr, rr_before = A.dot(r, r), rr
            monitor.record_residual(rr.sqrt())
            beta = monitor.where_active(rr / rr_before)
            aypx_(p, beta, r)
            pp = rr + beta**2 * pp  # r is orthogonal to the last p

        return monitor.finish(x, met="stopped before a direction of curvature")
