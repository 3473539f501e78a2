"""GMRES: minimal residuals for a curvature that is not symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.lanczos import orthogonalise_
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import NEGATIVE, Iterative, ended, inverse, should_check_convergence
from hoptim.solvers.solution import Solution, State, Status, Unread


@dataclass(frozen=True, kw_only=True)
class GMRES(Iterative):
    """Generalised minimal residuals for any curvature: the x of the Krylov space of Aᵀ with the least ‖g − Aᵀx‖.

    It keeps one vector a product, so that memory grows with ``terms``, and j inner products at product j: for a symmetric A
    MINRES gives the same x for less. A Ritz value with a negative real part is a remark. Each of several right-hand sides
    stops for itself; one whose Krylov space ends before the system is solved, which only a singular A allows, stops there.

    Args:
        terms: the most products, ≥ 1, default 20; one more is for the residual of what converged.
        tolerance: the relative residual ‖g − Aᵀx‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.

    Source: Saad and Schultz 1986, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = GMRES().solve(A, {"w": torch.ones(2)})
    >>> solution.value["w"].round(decimals=4), solution.status.name, solution.products
    (tensor([0.5000, 0.2500]), 'CONVERGED', 3)
    """

    def iterated(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Arnoldi vectors v: rotations of their Hessenberg matrix H tell when to stop, its singular values give x."""
        batched = A.is_batched(g)
        start = trees.norm(g, batched=batched)
        eps = torch.finfo(start.dtype).eps
        basis, rotated = [trees.scaled(g, inverse(start))], _Rotated(start, self.terms)
        active, largest, residuals = start > 0, torch.zeros_like(start), []
        for term in range(1, self.terms + 1):
            w = A.T @ basis[-1]
            largest = torch.maximum(largest, trees.norm(w, batched=batched))
            along = orthogonalise_(w, basis, batched=batched)
            beside = trees.norm(w, batched=batched)
            residuals.append(rotated.add(along, beside, active).to(start.dtype))
            active = active & ~(residuals[-1] <= self.tolerance) & ~(beside <= 10 * eps * largest)
            if should_check_convergence(term, self.terms, start) and not bool(active.any()):
                break
            if term < self.terms:
                basis.append(trees.scaled(w, torch.where(active, inverse(beside), 0.0)))
        flags = {Status.NON_FINITE_GRADIENT: ~start.isfinite(), Status.NON_FINITE_PRODUCT: ~rotated.hessenberg().isfinite()}
        status, (H, length) = ended(flags, rotated.hessenberg(), start)
        x, detail = trees.zeros_like(g), ""
        if status.ok:
            y, residual = _least_squares(H, length, rounding=32 * eps)
            for v, coefficient in zip(basis, y.to(start).unbind(-1), strict=True):
                trees.axpy_(x, v, coefficient)
            residuals[-1] = residual.to(start)
            status, detail = _how(H, length, residual, self.tolerance)
        history = torch.stack(residuals)
        products = len(history)
        return Unread.known(Solution(value=x, status=status, detail=detail, residuals=history, products=products, state={}))


class _Rotated:
    """The Hessenberg matrix H of each right-hand side, which grows by one column a product, and its Q in H = Qᵀ R."""

    def __init__(self, like: Tensor, terms: int) -> None:
        self.Q = torch.eye(terms + 1, dtype=torch.float64, device=like.device).repeat(*like.shape, 1, 1)
        self.residual = (like > 0).double()
        self.columns: list[Tensor] = []

    def add(self, along: Tensor, beside: Tensor, active: Tensor) -> Tensor:
        """One column of H: Vᵀ Aᵀ v, and the length of what is left. Returns min ‖β e₁ − H y‖ / β."""
        j, Q = len(self.columns), self.Q
        column = torch.zeros_like(Q[..., 0])
        column[..., : j + 1] = along.double().movedim(0, -1)
        column[..., j + 1] = beside.double()
        self.columns.append(column)  # zero where a right-hand side has stopped: its basis vectors are
        turned = (Q * column[..., None, :]).sum(-1)
        length = torch.hypot(turned[..., j], turned[..., j + 1])
        c = torch.where(length == 0, 1.0, turned[..., j] * inverse(length))[..., None]
        s = (turned[..., j + 1] * inverse(length))[..., None]
        Q[..., j, :], Q[..., j + 1, :] = c * Q[..., j, :] + s * Q[..., j + 1, :], c * Q[..., j + 1, :] - s * Q[..., j, :]
        self.residual = torch.where(active, Q[..., j + 1, 0].abs(), self.residual)
        return self.residual

    def hessenberg(self) -> Tensor:
        """H, with columns of zeros where a right-hand side has stopped."""
        k = len(self.columns)
        return torch.stack(self.columns, -1)[..., : k + 1, :]


def _least_squares(H: Tensor, length: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """The shortest y with the least ‖β e₁ − H y‖, and that over β; singular values of mere rounding count as zero."""
    U, S, Vh = torch.linalg.svd(H, full_matrices=False)
    kept = rounding * S[..., :1] < S
    first = length[..., None] * U[..., 0, :]
    y = (Vh.mT @ torch.where(kept, first / S, 0.0)[..., None])[..., 0]
    goal = torch.zeros_like(H[..., 0])
    goal[..., 0] = length
    left = torch.linalg.vector_norm(goal - (H @ y[..., None])[..., 0], dim=-1)
    return y, left * inverse(length)


def _how(H: Tensor, length: Tensor, residual: Tensor, tolerance: float) -> tuple[Status, str]:
    if bool(((length > 0) & (H[..., 0].abs().amax(-1) == 0)).any()):
        return Status.NO_CURVATURE, ""
    stopped = H.abs().amax(-2) == 0  # its ones on the diagonal are eigenvalues of no consequence
    values = torch.linalg.eigvals(H[..., :-1, :] + torch.diag_embed(stopped.double()))
    if (low := values.real.amin()) < NEGATIVE * values.abs().amax():
        return Status.NEGATIVE_CURVATURE, f"a Ritz value has the real part {low:.3g}"
    return Status.CONVERGED if bool((residual <= tolerance).all()) else Status.FINISHED, ""
