"""The Nyström solver: a low-rank curvature plus ρI, inverted in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.lanczos import gaussian
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import NEGATIVE, Deferring, check_symmetric, ending
from hoptim.solvers.solution import Solution, State, Status, Unread
from hoptim.validation import is_finite, is_whole

CHUNK = 1 << 18  # columns that are widened to float64 at a time


@dataclass(frozen=True, kw_only=True)
class Nystrom(Deferring):
    """The Nyström approximation of a symmetric curvature, A_k = (AΩ)(ΩᵀAΩ)⁺(AΩ)ᵀ, and x = (A_k + ρI)⁻¹ g by Woodbury.

    Ω has ``rank`` orthonormal columns; AΩ is one batched product. They span a random subspace, drawn from a Gaussian with a
    generator of their own, the same at each call, where the source draws coordinates: the columns of A that belong to dead
    units are zero, and coordinates drawn there are wasted. Of an indefinite ΩᵀAΩ the positive part is used.

    What is solved is the damped system, (A + ρI) x = g with A of low rank. The one entry of ``residuals`` is nonetheless
    ‖g − Ax‖/‖g‖, as for the other solvers, and so includes what ρ leaves behind; ‖g − (A + ρI)x‖/‖g‖ is in ``detail``. Both
    come from one product more, so that a solve costs rank + 1 products and ``rank`` + 2 vectors of memory.

    Args:
        rank: the number k of directions, ≥ 1, default 10; as many as A has rows at most.
        rho: ρ > 0, default 0.01.

    Raises:
        ValueError: ``rank`` is no positive whole number, or ``rho`` is not positive.
        TypeError: when solving, A is not known to be symmetric.

    Source: Hataya and Yamada 2023, "Nyström method for accurate and scalable implicit differentiation" (arXiv 2302.09726);
    Gaussian test matrices: Frangella, Tropp and Udell 2023, "Randomized Nyström preconditioning". Its shift against rounding
    presumes a definite A; here eigenvalues of ΩᵀAΩ below rounding are left out instead.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([2.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = Nystrom(rank=2, rho=1.0).solve(A, {"w": torch.tensor([3.0, 5.0])})
    >>> solution.value["w"].round(decimals=4), solution.products
    (tensor([1., 1.]), 3)
    """

    rank: int = 10
    rho: float = 0.01

    def __post_init__(self) -> None:
        if not (is_whole(self.rank) and self.rank >= 1):
            raise ValueError(f"rank={self.rank!r}: give a whole number of directions, 1 or more")
        if not (is_finite(self.rho) and self.rho > 0):
            raise ValueError(f"rho={self.rho!r}: give a positive number")

    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """The products with Ω, the small matrices in float64, and one product for the residual."""
        check_symmetric(self, A)
        batched = A.is_batched(g)
        rank = min(self.rank, trees.size(A.like))
        probes = _orthonormal(gaussian(A.like, rank))
        image = A @ probes
        sides = g if batched else trees.map_tree(lambda value: value[None], g)
        small = [_gram(probes, image), _gram(image, image), _gram(image, sides)]
        coefficients, lowest, highest = _core(small, self.rho, rank * torch.finfo(next(iter(g.values())).dtype).eps)
        x = trees.scale_(trees.clone(g), 1 / self.rho)
        for i, row in enumerate(coefficients.to(next(iter(g.values())))):
            column = trees.map_tree(lambda value: value[i], image)  # noqa: B023 (used at once)
            trees.axpy_(x, column, row if batched else row[0])

        left = trees.add(g, A @ x, alpha=-1.0)
        start = trees.norm(g, batched=batched)
        scale = torch.where(start > 0, start, 1.0)
        residual = trees.norm(left, batched=batched) / scale
        damped = trees.norm(trees.add_(left, x, alpha=-self.rho), batched=batched) / scale
        flat, negative = highest == lowest == 0, lowest < NEGATIVE * max(highest, -lowest)
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~residual.isfinite(),
            Status.NO_CURVATURE: (start > 0) & flat,
            Status.NEGATIVE_CURVATURE: torch.full_like(start, negative, dtype=torch.bool),
            Status.LARGE_RESIDUAL: damped > 1 + 1e-5,
            Status.FINISHED: torch.ones_like(start, dtype=torch.bool),
        }

        def then(status: Status, figures: list[float]) -> Solution:
            detail = f"‖g − (A + {self.rho:g} I)x‖ / ‖g‖ = {figures[0]:.3g}"
            if status is Status.NEGATIVE_CURVATURE:
                detail = f"met a curvature of {lowest:.3g}; {detail}"
            return Solution(value=x, status=status, detail=detail, residuals=residual[None], products=rank + 1, state={})

        return ending(x, flags, [damped.amax()], then)


def _core(small: list[Tensor], rho: float, rounding: float) -> tuple[Tensor, float, float]:
    """The coefficients of x on AΩ beside g/ρ, one column a right-hand side, and the ends of the spectrum of W = ΩᵀAΩ.

    From W, C = (AΩ)ᵀAΩ and b = (AΩ)ᵀg.

    With W = U diag(w) Uᵀ, of which the positive part is kept, and B = AΩ U w^{−1/2}, A_k = BBᵀ and
    (A_k + ρI)⁻¹ g = g/ρ − B (ρI + BᵀB)⁻¹ Bᵀg / ρ.
    """
    read = torch.cat(small, dim=1).cpu()  # the host looks at the device here: the matrices are tiny
    W, C, b = read.split([part.shape[1] for part in small], dim=1)
    if not bool(read.isfinite().all()):
        return torch.full_like(b, torch.nan), 0.0, 0.0
    w, U = torch.linalg.eigh((W + W.T) / 2)
    kept = w > rounding * w.abs().amax()
    M = U[:, kept] / w[kept].sqrt()
    solved = torch.linalg.solve(M.T @ C @ M + rho * torch.eye(int(kept.sum()), dtype=W.dtype), M.T @ b)
    return -(M @ solved) / rho, float(w[0]), float(w[-1])


def _orthonormal(probes: Tree) -> Tree:
    """L⁻¹Ω with LLᵀ = ΩΩᵀ, rows being vectors, twice: once leaves the rounding of an ill-conditioned draw.

    Where the draw was degenerate all becomes NaN, without a look of the host.
    """
    for _ in range(2):
        L, failed = torch.linalg.cholesky_ex(_gram(probes, probes))
        L = torch.where(failed == 0, L, torch.nan)
        inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
        probes = trees.map_tree(lambda value: _rows(inverse, value), probes)  # noqa: B023 (used at once)
    return probes


def _rows(M: Tensor, value: Tensor) -> Tensor:
    """M times the rows of ``value``, in float64 by chunks: no TF32, whatever the user has allowed."""
    chunks = value.reshape(len(value), -1).split(CHUNK, dim=1)
    return torch.cat([(M @ chunk.double()).to(value.dtype) for chunk in chunks], dim=1).reshape(value.shape)


def _gram(x: Tree, y: Tree) -> Tensor:
    """⟨x_i, y_j⟩ for all pairs of rows, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=next(iter(x.values())).device)
    for name, value in x.items():
        rows = value.reshape(len(value), -1).split(CHUNK, dim=1)
        columns = y[name].reshape(len(y[name]), -1).split(CHUNK, dim=1)
        total = total + sum(a.double() @ b.double().T for a, b in zip(rows, columns, strict=True))
    return total
