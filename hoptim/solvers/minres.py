"""Minimal residuals for a symmetric curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import Iterative, check_symmetric, inverse, should_check_convergence
from hoptim.solvers.krylov import _krylov
from hoptim.solvers.solution import State, Status, Unread


@dataclass(frozen=True, kw_only=True)
class MINRES(Iterative):
    """Minimal residuals for a symmetric curvature of either sign: the x of the Krylov space with the least ‖g − Ax‖.

    It needs no positive definiteness; that the curvature was negative along a residual on the way is a remark. Few terms
    regularise: driven to the end on an indefinite Hessian, x is that of the saddle, which may point the wrong way. Where A
    is singular and g not in its range, it stops at the least residual there is: once ‖Ar‖ is nothing beside ‖A‖·‖r‖.

    Args:
        terms: the most products, ≥ 1, default 20; one more is for the residual of what converged.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.
        TypeError: when solving, A is not known to be symmetric.

    Source: Paige and Saunders 1975, "Solution of sparse indefinite systems of linear equations"; the sign of the curvature:
    Liu and Roosta 2022, "MINRES: from negative curvature detection to monotonicity properties".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([-2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = MINRES().solve(A, {"w": torch.ones(2)})
    >>> solution.value["w"].round(decimals=4), solution.status.name, solution.products
    (tensor([-0.5000,  0.2500]), 'NEGATIVE_CURVATURE', 2)
    """

    def iterated(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Lanczos vectors v, a QR factorisation of their tridiagonal matrix by rotations (c, s), directions d = γw."""
        check_symmetric(self, A)
        batched = A.is_batched(g)
        x, d, d_before = trees.zeros_like(g), trees.zeros_like(g), trees.zeros_like(g)
        u, u_before = trees.clone(g), trees.zeros_like(g)  # the Lanczos vectors, not yet of unit length
        start = beta = phi_bar = trees.norm(g, batched=batched)
        zero, goal = torch.zeros_like(start), start * self.tolerance
        c, s, delta_bar, epsilon, over_beta_before, largest = zero - 1, zero, zero, zero, zero + 1, zero
        over_gamma = over_gamma_before = zero
        active, eps = start > 0, torch.finfo(zero.dtype).eps
        going, kept, lefts, bends, sizes = [], [], [], [], []  # of each term, looked at together in the end
        for term in range(1, self.terms + 1):
            going.append(active)
            over_beta = inverse(beta)
            v = trees.scaled(u, over_beta)
            product = trees.axpy_(A @ v, u_before, -beta * over_beta_before)
            alpha = trees.dot(v, product, batched=batched)
            trees.axpy_(product, u, -alpha * over_beta)
            u_before, u, over_beta_before, beta = u, product, over_beta, trees.norm(product, batched=batched)

            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            epsilon_before, epsilon, delta_bar = epsilon, s * beta, -c * beta
            gamma = torch.hypot(gamma_bar, beta)
            largest = torch.maximum(largest, gamma)
            bends.append(c * gamma_bar)  # −⟨r, A r⟩ / ⟨r, r⟩ for the residual r before this term
            moved = torch.hypot(gamma_bar, delta_bar)  # ‖Ar‖/‖r‖
            active = active & ~(moved <= eps**0.5 * largest)  # a NaN stays, to be seen
            sizes.append(largest)
            kept.append(active)
            trees.axpy_(v, d_before, -epsilon_before * over_gamma_before)
            trees.axpy_(v, d, -delta * over_gamma)
            d_before, d, over_gamma_before, over_gamma = d, v, over_gamma, inverse(gamma)

            c, s = gamma_bar * over_gamma, beta * over_gamma
            phi, phi_bar = torch.where(active, c * phi_bar, 0.0), torch.where(active, s * phi_bar, phi_bar)
            trees.axpy_(x, d, phi * over_gamma)
            lefts.append(phi_bar.abs())
            active = active & ~(lefts[-1] <= goal)
            if should_check_convergence(term, self.terms, start) and not bool(active.any()):
                break
        residuals, bend = torch.stack(lefts) * inverse(start), torch.stack(bends)
        turned = torch.stack(going) & (bend > 10 * eps * torch.stack(sizes))
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~residuals[-1].isfinite(),
            Status.NO_CURVATURE: (start > 0) & ~kept[0],
            Status.NEGATIVE_CURVATURE: turned.any(0),
            Status.FINISHED: residuals[-1] > self.tolerance,
        }
        return _krylov(x, residuals, flags, torch.where(turned, -bend, 0.0).amin(0), "met a direction of curvature")
