"""Bounds on the spectrum of A from a few products: power iteration and Lanczos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, inverse, scale_


def spectral_norm(A: Operator, start: Tensor, products: int) -> tuple[Tensor, Tensor]:
    """Estimate ‖A‖₂ from below by power iteration: max over the iterates v of ‖A v‖ / ‖v‖.

    For a symmetric A it tends to ‖A‖₂. Otherwise it is at most that, and in the long run at least the spectral radius.
    If A changes from product to product, it is the largest over the products taken.

    Args:
        A: the operator.
        start: the first iterate, of shape (n,), not zero. From the last iterate of an earlier call one or two products are
            enough.
        products: how many products to spend, ≥ 1.

    Returns:
        The estimate, a scalar on the device, and the last iterate, of unit length.

    Source: Golub and Van Loan, "Matrix Computations", section 8.2.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([3.0, 1.0]) * v, like=torch.ones(2))
    >>> estimate, v = spectral_norm(A, torch.ones(2), products=10)
    >>> round(float(estimate), 4)
    3.0
    """
    v, estimate = start, start.new_zeros(())
    for _ in range(products):
        v = A @ _unit(A, v)
        estimate = torch.maximum(estimate, A.norm(v))
    return estimate, _unit(A, v)


def start_vector(A: Operator, towards: Tensor) -> Tensor:
    """A first iterate: the direction ``towards`` plus a random one of the same length, the same at each call."""
    return _unit(A, A.gaussian()) + _unit(A, towards)


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """Ritz values and their weights: a quadrature rule for the spectral density, as weighted by the start vectors.

    Attributes:
        values: the Ritz values in ascending order, in float64: shape (steps,), or (R, steps) for R starts.
        weights: their weights, ≥ 0, which sum to 1 along the last axis.
    """

    values: Tensor
    weights: Tensor

    @property
    def lowest(self) -> float:
        """The lowest Ritz value: never below the lowest eigenvalue."""
        return float(self.values.amin())

    @property
    def highest(self) -> float:
        """The highest Ritz value: never above the highest eigenvalue."""
        return float(self.values.amax())

    @property
    def negative_share(self) -> float:
        """The weight of the values below zero, averaged over the starts: for random ones, the share of negative eigenvalues.

        Values above −1e-6 of the largest magnitude count as zero.
        """
        negative = self.values < -1e-6 * self.values.abs().amax()
        return float((self.weights * negative).sum(-1).mean())


def lanczos(A: Operator, start: Tensor, steps: int) -> Ritz:
    """Ritz values of a symmetric A by Lanczos with full reorthogonalisation, and their quadrature weights.

    For a unit start q with q = Σ c_i u_i in the eigenvectors of A, Σ_k weight_k f(value_k) = Σ c_i² f(λ_i) exactly for
    polynomials f of degree < 2·steps. Over random starts the mean is tr f(A) / n: stochastic Lanczos quadrature.

    Args:
        A: the operator, symmetric, and the same in each product.
        start: the first vector, of shape (n,), not zero; or R of them, (R, n), as ``A.gaussian(R)`` gives.
        steps: how many products to spend, ≥ 1; that many vectors are kept.

    Raises:
        TypeError: A is not known to be symmetric, or changes from product to product.
        ValueError: a product is infinite or NaN.

    Source: Golub and Meurant 2010, "Matrices, Moments and Quadrature"; Ubaru, Chen and Saad 2017, "Fast estimation of
    tr(f(A)) via stochastic Lanczos quadrature".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([3.0, 1.0, -1.0]) * v, like=torch.ones(3))
    >>> found = lanczos(A, torch.ones(3), steps=3)
    >>> [round(value, 4) for value in found.values.tolist()], round(found.negative_share, 4)
    ([-1.0, 1.0, 3.0], 0.3333)
    """
    if not A.is_symmetric:
        raise TypeError("Lanczos needs a symmetric operator, and this one is not known to be")
    if not A.is_fixed:
        raise TypeError("Lanczos needs the same operator in each product, and this one changes, as with a fresh batch each")
    length = A.norm(start)
    active = torch.ones_like(length, dtype=torch.bool)
    basis = [start / length[..., None]]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        w = (A @ basis[-1]).clone()  # a product may share memory with the vector
        size = A.norm(w)
        alpha = orthogonalise_(A, w, basis)[-1]
        alphas.append(torch.where(active, alpha, alphas[0] if alphas else alpha))  # after its end: a value in the spectrum
        beta = A.norm(w)
        active = active & ~(beta <= 10 * torch.finfo(beta.dtype).eps * size)
        betas.append(torch.where(active, beta, 0.0))
        basis.append(scale_(w, torch.where(active, 1 / beta, 0.0)))
    diagonal, off_diagonal = (torch.stack(part, -1).double().cpu() for part in (alphas, betas))
    if not bool((diagonal.isfinite() & off_diagonal.isfinite()).all()):
        raise ValueError("a product with A is infinite or NaN: look for functions without a second derivative in the loss")
    upper = torch.diag_embed(off_diagonal[..., :-1], 1)
    T = torch.diag_embed(diagonal) + upper + upper.mT
    values, vectors = torch.linalg.eigh(T)
    return Ritz(values=values, weights=vectors[..., 0, :] ** 2)


def orthogonalise_(A: Operator, w: Tensor, basis: list[Tensor]) -> Tensor:
    """w ← w − V Vᵀ w in place for orthonormal vectors V, by modified Gram-Schmidt. Returns Vᵀ w, one row for each vector.

    It runs twice: the second pass removes the rounding error of the first (Giraud, Langou and Rozložník 2005).
    """
    total = []
    for _ in range(2):
        found = []
        for v in basis:
            found.append(A.dot(v, w))
            axpy_(w, -found[-1], v)
        total.append(torch.stack(found))
    return total[0] + total[1]


def _unit(A: Operator, v: Tensor) -> Tensor:
    return v * inverse(A.norm(v))
