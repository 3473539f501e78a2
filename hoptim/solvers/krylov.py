"""Solvers that build a Krylov space: conjugate gradients and minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim import trees
from hoptim.operators import Operator
from hoptim.solvers.base import (
    GROWTH_LIMIT,
    NEGATIVE,
    Iterative,
    Solution,
    State,
    Status,
    Unread,
    check_symmetric,
    ending,
    inverse,
    time_to_look,
)
from hoptim.trees import Tree


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

    >>> from hoptim.operators import Symmetric
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
            if time_to_look(term, self.terms, square) and not bool(active.any()):
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

    >>> from hoptim.operators import Symmetric
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
            if time_to_look(term, self.terms, start) and not bool(active.any()):
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


def _krylov(x: Tree, history: Tensor, flags: dict[Status, Tensor], lowest: Tensor, met: str) -> Unread:
    products = len(history)

    def then(status: Status, figures: list[float]) -> Solution:
        detail = f"{met} {figures[0]:.3g}, within {products} products" if status is Status.NEGATIVE_CURVATURE else ""
        return Solution(value=x, status=status, detail=detail, residuals=history, products=products, state={})

    return ending(x, flags, [lowest.amin()], then)
