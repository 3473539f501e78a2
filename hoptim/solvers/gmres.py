"""GMRES: minimal residuals for a curvature that is not symmetric."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from hoptim.linalg.lanczos import orthogonalise_
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, inverse, scale_
from hoptim.solvers.base import Iterative, check_operator
from hoptim.solvers.monitor import SLACK, History, Monitor
from hoptim.solvers.solution import Solution, State, Status


@dataclass(frozen=True, kw_only=True)
class GMRES(Iterative):
    """Generalised minimal residuals for any curvature: the x of the Krylov space of Aᵀ with the least ‖g − Aᵀx‖.

    It keeps one vector for each product and takes j inner products at product j, so memory grows with ``terms``; for a
    symmetric A, MINRES gives the same x for less. A Ritz value with a negative real part is a remark. Several right-hand
    sides stop independently, also when a Krylov space ends before its system is solved, as only a singular A allows: the
    status is then ``FLAT_DIRECTIONS``.

    Args:
        terms: the largest number of products, ≥ 1, default 20; if it converges, one more checks the residual.
        tolerance: the relative residual ‖g − Aᵀx‖ / ‖g‖ at which to stop, ≥ 0, default 1e-5.

    Raises:
        ValueError: ``terms`` is no positive whole number, or ``tolerance`` is negative or not finite.
        TypeError: when solving, A changes from product to product.

    Source: Saad and Schultz 1986, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear systems";
    the residual without rotations: Ayachour 2003, "A fast implementation for GMRES method".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([2.0, 4.0]) * v, like=torch.ones(2))
    >>> solution = GMRES().solve(A, torch.ones(2))
    >>> solution.value.round(decimals=4), solution.status.name, solution.products
    (tensor([0.5000, 0.2500]), 'CONVERGED', 3)
    """

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Arnoldi vectors V with Aᵀ V_k = V_{k+1} H, and x = V y for the least ‖β e₁ − H y‖."""
        check_operator(self, A, symmetric=False)
        monitor = Monitor(A, g, self.terms, self.tolerance)
        beta = residual = monitor.g_norm
        V, columns = [g * inverse(beta)[..., None]], []
        u = torch.ones_like(beta[None], dtype=torch.float64)  # uᵀ H = 0, so that the least residual is β / ‖u‖
        largest, rounding = torch.zeros_like(beta), torch.finfo(beta.dtype).eps
        for _ in monitor:
            w = (A.T @ V[-1]).clone()  # a product may share memory with the vector
            largest = torch.maximum(largest, A.norm(w))
            h = orthogonalise_(A, w, V)
            below = A.norm(w)
            columns.append(torch.cat([h, below[None]]).double())
            uh = (u * columns[-1][:-1]).sum(0)
            u = torch.cat([u, torch.where(uh == 0, 0.0, -uh / below)[None]])
            residual = monitor.where_active(beta / torch.linalg.vector_norm(u, dim=0).to(beta), residual)
            monitor.stop(below <= 10 * rounding * largest)  # the Krylov space has ended
            monitor.record_residual(residual)
            V.append(scale_(w, monitor.where_active(inverse(below))))  # zero for what has stopped

        found = torch.cat([beta[None].double(), monitor.flat[None].double(), *columns]).cpu()
        beta, flat, *columns = found.split([1, 1, *range(2, len(columns) + 2)])
        H = pad_sequence(columns).movedim((0, 1), (-2, -1))
        if not bool(beta.isfinite().all() and H.isfinite().all()):
            return monitor.finish(torch.zeros_like(g), failed=Status.NON_FINITE_PRODUCT)
        goal = pad(beta.movedim(0, -1), (0, H.shape[-1]))[..., None]  # β e₁
        y = torch.linalg.lstsq(H, goal, rcond=32 * rounding, driver="gelsd").solution  # the shortest where H is singular
        x = torch.zeros_like(g)
        for v, coefficient in zip(V, y.movedim(-2, 0)[..., 0].to(g), strict=False):
            axpy_(x, coefficient, v)

        least = torch.linalg.vector_norm(goal - H @ y, dim=(-2, -1))
        monitor.norms[-1] = least.to(residual)
        left, ritz = least * inverse(beta[0]), torch.linalg.eigvals(H[..., :-1, :]).movedim(-1, 0)  # 0 after the stop
        is_unsolved = (flat[0] > 0) & (left > SLACK * max(self.tolerance, rounding))
        largest = torch.linalg.matrix_norm(H, 2)
        records = beta[0].numpy(), largest.numpy(), left[None].numpy(), ritz.real.numpy()
        history = History(*records, flat=bool(is_unsolved.any()))
        return monitor.finish(x, history, met="met a Ritz value with the real part")
