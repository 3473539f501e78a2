"""Minimal residuals for a symmetric curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, aypx_, hypot, inverse, larger, scale_
from hoptim.solvers.base import Iterative, check_operator
from hoptim.solvers.monitor import Monitor
from hoptim.solvers.solution import Solution, State

NOTHING = 1e-12  # a smaller share of ‖r‖², or of ‖A‖, is taken for zero also in float64


@dataclass(frozen=True, kw_only=True)
class MINRES(Iterative):
    """Minimal residuals for a symmetric curvature of either sign: the x of the Krylov space with the least ‖g − Ax‖.

    A need not be positive definite; negative curvature along a residual on the way is a remark. Few terms regularise: on an
    indefinite Hessian the exact solution belongs to a saddle point and may point the wrong way. If A is singular and g not
    in its range, it stops at the least possible residual: once two terms in a row would lower ‖r‖² by less than rounding, or
    the curvature along r or along the term is zero within rounding. The status is then ``FLAT_DIRECTIONS``. In a long solve
    of an ill-conditioned system rounding makes the tracked residual too small; where that may show, one product more gives
    the true one, and the status ``INEXACT`` if they differ.

    Args:
        terms: the largest number of products, ≥ 1, default 20; if it converges, one more checks the residual.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.
        TypeError: when solving, A is not known to be symmetric, or changes from product to product.

    Source: Paige and Saunders 1975, "Solution of sparse indefinite systems of linear equations", with the letters of Choi,
    Paige and Saunders 2011, "MINRES-QLP", section 2; the sign of the curvature: Liu and Roosta 2022, "MINRES: from negative
    curvature detection to monotonicity properties"; rounding, which enters x with the square of the condition: Sleijpen, van
    der Vorst and Modersitzki 2000, "Differences in the effects of rounding errors in Krylov solvers for symmetric indefinite
    linear systems".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([-2.0, 4.0]) * v, like=torch.ones(2))
    >>> solution = MINRES().solve(A, torch.ones(2))
    >>> solution.value.round(decimals=4), solution.status.name, solution.converged
    (tensor([-0.5000,  0.2500]), 'NEGATIVE_CURVATURE', True)
    """

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Lanczos vectors v, their tridiagonal matrix in QR form by reflections (c, s), and directions d."""
        check_operator(self, A)
        monitor, limits = Monitor(A, g, self.terms, self.tolerance), torch.finfo(g.dtype)
        number, rounding, tiny = monitor.number, limits.eps, limits.tiny
        v, v_before = g * inverse(monitor.g_norm)[..., None], torch.zeros_like(g)
        x, d, d_before = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
        beta = phi = number(monitor.g_norm)
        s = delta_bar = epsilon_next = largest = longest = number(torch.zeros_like(monitor.g_norm))
        least, flat, c, idle = max(10 * rounding, NOTHING), max(100 * rounding, NOTHING), s - 1, beta < 0
        for _ in monitor:
            p = A.product_onto_(v_before, -beta, v)
            alpha = number(A.dot(v, p))
            axpy_(p, -alpha, v)
            beta = number(A.norm(p))
            v, v_before = scale_(p, inverse(beta, tiny)), v

            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            epsilon, epsilon_next, delta_bar = epsilon_next, s * beta, -c * beta
            gamma = hypot(gamma_bar, beta)
            monitor.record_curvature(-c * gamma_bar)  # along the residual r before this term
            largest = larger(largest, gamma)
            left = hypot(gamma_bar, delta_bar)  # ‖Ar‖ / ‖r‖, and (left / gamma)² bounds the fall of ‖r‖² / ‖r‖²
            over_gamma = inverse(gamma, tiny)
            c, s = gamma_bar * over_gamma, beta * over_gamma

            aypx_(d_before, -epsilon, v_before)
            axpy_(d_before, -delta, d)
            d, d_before = scale_(d_before, over_gamma), d
            length = number(A.norm(d))  # ‖Ad‖ = 1, so that the curvature along d is 1 / length
            idle, idle_before = left <= least**0.5 * gamma, idle
            nothing = flat * largest
            monitor.stop((idle & idle_before) | (left <= nothing) | (inverse(length, tiny) <= nothing))
            longest = larger(longest, monitor.where_active(length))
            axpy_(x, monitor.where_active(c * phi), d)
            phi = monitor.where_active(s * phi, phi)
            monitor.record_residual(phi)

        del v, v_before, p, d, d_before  # a check of the residual needs their memory
        monitor.largest, monitor.drift = largest, rounding * (largest * longest) * (largest * longest)
        return monitor.finish(x, met="met a direction of curvature")
