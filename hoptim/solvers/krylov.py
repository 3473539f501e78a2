"""Solvers that build a Krylov space: conjugate gradients and minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim import trees
from hoptim.operators import Operator
from hoptim.options import is_finite, is_whole
from hoptim.solvers.base import Solution, Solver, Status
from hoptim.solvers.stationary import READ_EVERY
from hoptim.trees import Tree


@dataclass(frozen=True, kw_only=True)
class _Krylov(Solver):
    terms: int = 20
    tolerance: float = 1e-5

    def __post_init__(self) -> None:
        if not (is_whole(self.terms) and self.terms >= 1):
            raise ValueError(f"terms={self.terms!r}: give a whole number of products, 1 or more")
        if not (is_finite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"tolerance={self.tolerance!r}: give a finite number, 0 or more")


@dataclass(frozen=True, kw_only=True)
class CG(_Krylov):
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
        status, detail = _ended(flags, "stopped before a direction of curvature", lowest, len(residuals))
        history = torch.stack(residuals)
        return Solution(value=x, status=status, detail=detail, residuals=history, products=len(history), state={})


@dataclass(frozen=True, kw_only=True)
class MINRES(_Krylov):
    """Minimal residuals for a symmetric curvature of either sign: the x of the Krylov space with the least ‖g − Ax‖.

    It needs no positive definiteness; that the curvature was negative along a residual on the way is a remark. Few terms
    regularise: driven to the end on an indefinite Hessian, x is that of the saddle, which may point the wrong way.

    Args:
        terms: the most products, ≥ 1, default 20.
        tolerance: the relative residual ‖g − Ax‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.

    Source: Paige and Saunders 1975, "Solution of sparse indefinite systems of linear equations"; the sign of the curvature:
    Liu and Roosta 2022, "MINRES: from negative curvature detection to monotonicity properties".

    >>> from hoptim.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([-2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = MINRES().solve(A, {"w": torch.ones(2)})
    >>> solution.value["w"].round(decimals=4), solution.status.name, solution.products
    (tensor([-0.5000,  0.2500]), 'NEGATIVE_CURVATURE', 2)
    """

    def solve(self, A: Operator, g: Tree, state: Tree | None = None) -> Solution:
        """Lanczos vectors v, a QR factorisation of their tridiagonal matrix by rotations (c, s), directions w."""
        batched = A.is_batched(g)
        x, w, w_before = trees.zeros_like(g), trees.zeros_like(g), trees.zeros_like(g)
        u, u_before = trees.clone(g), trees.zeros_like(g)  # the Lanczos vectors, not yet of unit length
        start = beta = phi_bar = trees.norm(g, batched=batched)
        zero = torch.zeros_like(start)
        c, s, delta_bar, epsilon, beta_before = zero - 1, zero, zero, zero, zero + 1
        active = start > 0
        downward, lowest, residuals = torch.zeros_like(active), zero, []
        for term in range(1, self.terms + 1):
            v = trees.axpy_(trees.zeros_like(u), u, _inverse(beta))
            product = trees.axpy_(A @ v, u_before, -beta * _inverse(beta_before))
            alpha = trees.dot(v, product, batched=batched)
            trees.axpy_(product, u, -alpha * _inverse(beta))
            u_before, u = u, product
            beta_before, beta = beta, trees.norm(u, batched=batched)

            delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
            turned = active & (c * gamma_bar > 0)  # ⟨r, A r⟩ < 0 for the residual r before this term
            downward, lowest = downward | turned, torch.where(turned, torch.minimum(lowest, -c * gamma_bar), lowest)
            epsilon_before, epsilon, delta_bar = epsilon, s * beta, -c * beta
            gamma = torch.sqrt(gamma_bar**2 + beta**2)
            active = active & (gamma != 0)  # a NaN stays active, so that it is seen
            c, s = gamma_bar * _inverse(gamma), beta * _inverse(gamma)
            phi, phi_bar = torch.where(active, c * phi_bar, 0.0), torch.where(active, s * phi_bar, phi_bar)

            trees.axpy_(v, w_before, -epsilon_before)
            trees.axpy_(v, w, -delta)
            w_before, w = w, trees.axpy_(trees.zeros_like(v), v, _inverse(gamma))
            trees.axpy_(x, w, phi)
            residuals.append(phi_bar.abs() * _inverse(start))
            active = active & ~(residuals[-1] <= self.tolerance)
            if _time_to_look(term, self.terms, start) and not bool(active.any()):
                break
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~residuals[-1].isfinite(),
            Status.NO_CURVATURE: (start > 0) & (trees.norm(x, batched=batched) == 0),
            Status.NEGATIVE_CURVATURE: downward,
            Status.FINISHED: residuals[-1] > self.tolerance,
        }
        status, detail = _ended(flags, "met a direction of curvature", lowest, len(residuals))
        history = torch.stack(residuals)
        return Solution(value=x, status=status, detail=detail, residuals=history, products=len(history), state={})


def _inverse(a: Tensor) -> Tensor:
    return torch.where(a == 0, 0.0, 1 / a)


def _time_to_look(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU a look costs nothing; elsewhere the device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % READ_EVERY == 0)


def _ended(flags: dict[Status, Tensor], what: str, lowest: Tensor, terms: int) -> tuple[Status, str]:
    """The first status that holds for any right-hand side; the host looks at the device once."""
    *held, curvature = torch.stack([*(flag.any().double() for flag in flags.values()), lowest.amin().double()]).tolist()
    status = next((status for status, holds in zip(flags, held, strict=True) if holds), Status.CONVERGED)
    if status is Status.NEGATIVE_CURVATURE:
        return status, f"{what} {curvature:.3g}, within {terms} products"
    return status, ""
