"""The Nyström solver: a low-rank curvature plus ρI, inverted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hoptim.checks import is_whole
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_
from hoptim.solvers.base import Solver, check_operator, check_positive
from hoptim.solvers.monitor import History, Monitor
from hoptim.solvers.solution import Solution, State


@dataclass(frozen=True, kw_only=True)
class Nystrom(Solver):
    """The Nyström approximation of a symmetric curvature, A_k = (AΩ)(ΩᵀAΩ)⁺(AΩ)ᵀ, and x = (A_k + ρI)⁻¹ g by Woodbury.

    Ω has ``rank`` orthonormal columns, which span a random subspace; AΩ is one batched product. They are drawn from a
    Gaussian with a generator of their own, so they are the same at each call. The source draws coordinates instead, which
    are wasted on dead units, whose columns of A are zero. If ΩᵀAΩ is indefinite, its positive part is used.

    The system that is solved is the damped one, (A + ρI) x = g with A of low rank. The one entry of ``residuals`` is still
    ‖g − Ax‖/‖g‖, as for the other solvers, and so includes the effect of ρ; ‖g − (A + ρI)x‖/‖g‖ is in ``detail``. Both come
    from one further product, so a solve costs rank + 1 products and ``rank`` + 2 vectors of memory.

    Args:
        rank: the number k of directions, ≥ 1, default 10; at most the number of rows of A is used.
        rho: ρ > 0, default 0.01.

    Raises:
        ValueError: ``rank`` is no positive whole number, or ``rho`` is not positive.
        TypeError: when solving, A is not known to be symmetric, or changes from product to product.

    Source: Hataya and Yamada 2023, "Nyström method for accurate and scalable implicit differentiation" (arXiv 2302.09726);
    Gaussian test matrices: Frangella, Tropp and Udell 2023, "Randomized Nyström preconditioning". Their shift against
    rounding assumes a definite A; here eigenvalues of ΩᵀAΩ below rounding are left out instead.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([2.0, 4.0]) * v, like=torch.ones(2))
    >>> solution = Nystrom(rank=2, rho=1.0).solve(A, torch.tensor([3.0, 5.0]))
    >>> solution.value.round(decimals=4), solution.products
    (tensor([1., 1.]), 3)
    """

    rank: int = 10
    rho: float = 0.01

    def __post_init__(self) -> None:
        if not (is_whole(self.rank) and self.rank >= 1):
            raise ValueError(f"rank={self.rank!r}: give a whole number of directions, 1 or more")
        check_positive("rho", self.rho)

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """The products with Ω, the small matrices in float64 on the host, and one product for the residual."""
        check_operator(self, A)
        k = min(self.rank, A.total)
        omega = _orthonormal(A, A.gaussian(k))
        image = A @ omega
        small = torch.cat([A.gram(omega, image), A.gram(image, image), A.gram(image, g.reshape(-1, A.size))], dim=1).cpu()
        W, C, b = small.split([k, k, small.shape[1] - 2 * k], dim=1)
        coefficients, w = _woodbury(W, C, b, self.rho, rounding=k * torch.finfo(g.dtype).eps)
        x = g / self.rho
        for row, coefficient in zip(image, coefficients.to(g), strict=True):
            axpy_(x, coefficient.reshape(g.shape[:-1]), row)

        monitor = Monitor(A, g, terms=1)
        left = g - A @ x
        monitor.record_residual(A.norm(left))
        damped = A.norm(axpy_(left, -self.rho, x)) / monitor.scale
        g_norm, residual, damped = torch.stack([monitor.g_norm, *monitor.residuals, damped]).double().cpu().numpy()
        return monitor.finish(
            x,
            History(g_norm, np.full_like(g_norm, w.abs().max()), residual[None], curvatures=w[:, None].numpy()),
            spent=f"rank {k}",
            detail=f"‖g − (A + {self.rho:g} I)x‖ / ‖g‖ = {float(damped.max()):.3g}",
            products=k + 1,
        )


def _woodbury(W: Tensor, C: Tensor, b: Tensor, rho: float, rounding: float) -> tuple[Tensor, Tensor]:
    """c with x = g/ρ + AΩ c, one column for each right-hand side, and the eigenvalues of W = ΩᵀAΩ, ascending.

    From W, C = (AΩ)ᵀAΩ and b = (AΩ)ᵀg. With the positive part of W = U diag(w) Uᵀ and B = AΩ U w^{−1/2}, A_k = BBᵀ and
    (A_k + ρI)⁻¹ g = g/ρ − B (ρI + BᵀB)⁻¹ Bᵀg / ρ.
    """
    if not all(bool(part.isfinite().all()) for part in (W, C, b)):
        return torch.full_like(b, torch.nan), W.new_zeros(1)
    w, U = torch.linalg.eigh((W + W.T) / 2)
    kept = w > rounding * w.abs().amax()
    M = U[:, kept] / w[kept].sqrt()
    solved = torch.linalg.solve(M.T @ C @ M + rho * torch.eye(int(kept.sum()), dtype=W.dtype), M.T @ b)
    return -(M @ solved) / rho, w


def _orthonormal(A: Operator, omega: Tensor) -> Tensor:
    """L⁻¹Ω with LLᵀ = ΩΩᵀ, for the vectors as rows."""
    L = torch.linalg.cholesky_ex(A.gram(omega, omega)).L
    L_inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
    return L_inverse.to(omega) @ omega
