"""Bounds on the spectrum of A, from a few products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree


def spectral_norm(A: Operator, start: Tree, products: int) -> tuple[Tensor, Tree]:
    """Estimate ‖A‖₂ from below by power iteration: max over the iterates v of ‖A v‖ / ‖v‖.

    For a symmetric A it tends to ‖A‖₂; for another it is at most that, and in the long run at least the spectral radius.

    Args:
        A: the operator.
        start: the first iterate, not zero; the last one of an earlier call makes one or two products enough.
        products: how many products to spend.

    Returns:
        The estimate, a scalar on the device, and the last iterate, of unit length.

    Source: Golub and Van Loan, "Matrix Computations", section 8.2.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([3.0, 1.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> estimate, v = spectral_norm(A, {"w": torch.ones(2)}, products=10)
    >>> round(float(estimate), 4)
    3.0
    """
    v = trees.unit(start)
    estimate = torch.zeros_like(trees.norm(v))
    for _ in range(products):
        v = A @ v
        estimate = torch.maximum(estimate, trees.norm(v))
        v = trees.unit(v)
    return estimate, v


def start_vector(like: Tree, towards: Tree) -> Tree:
    """A first iterate: the direction ``towards`` plus a random one of the same length, from a generator of its own."""
    return trees.add_(trees.unit(gaussian(like)), trees.unit(towards))


def gaussian(like: Tree, *lead: int, seed: int = 0) -> Tree:
    """Standard normal entries, with the leading axes asked for, from a generator of its own: the same at each call."""
    device = next(iter(like.values())).device
    generator = torch.Generator(device).manual_seed(seed)
    return {
        name: torch.randn((*lead, *value.shape), generator=generator, device=device, dtype=value.dtype)
        for name, value in like.items()
    }


@dataclass(frozen=True, kw_only=True)
class Ritz:
    """What Lanczos saw of a spectrum: a quadrature rule for the spectral density as the starts weigh it.

    Attributes:
        values: the Ritz values in ascending order, in float64: shape (steps,), or (R, steps) for R starts.
        weights: their weights, ≥ 0, which sum to 1 along the last axis.
        steps: how many steps each start took before its Krylov space ended, at most those asked for.
    """

    values: Tensor
    weights: Tensor
    steps: Tensor

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
        """The weight below zero, a mean over the starts: for random ones, the share of negative eigenvalues.

        What is above −1e-6 of the largest magnitude counts as zero.
        """
        negative = self.values < -1e-6 * self.values.abs().amax()
        return float((self.weights * negative).sum(-1).mean())


def lanczos(A: Operator, start: Tree, steps: int) -> Ritz:
    """Ritz values of a symmetric A by Lanczos with full reorthogonalisation, and their quadrature weights.

    For a unit start q with q = Σ c_i u_i in the eigenvectors of A, Σ_k weight_k f(value_k) = Σ c_i² f(λ_i) exactly for
    polynomials f of degree < 2·steps. Over random starts the mean is tr f(A) / n: stochastic Lanczos quadrature.

    Args:
        A: the operator, symmetric.
        start: the first vector, not zero; with a leading axis for R of them at once, as ``gaussian(A.like, R)`` gives.
        steps: how many products to spend, ≥ 1; as many vectors are kept.

    Raises:
        TypeError: A is not known to be symmetric.
        ValueError: ``steps`` is below 1, or a product is infinite or NaN.

    Source: Golub and Meurant 2010, "Matrices, Moments and Quadrature"; Ubaru, Chen and Saad 2017, "Fast estimation of
    tr(f(A)) via stochastic Lanczos quadrature".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([3.0, 1.0, -1.0]) * v["w"]}, like={"w": torch.ones(3)})
    >>> found = lanczos(A, {"w": torch.ones(3)}, steps=3)
    >>> [round(value, 4) for value in found.values.tolist()], round(found.negative_share, 4)
    ([-1.0, 1.0, 3.0], 0.3333)
    """
    if not A.symmetric:
        raise TypeError("Lanczos needs a symmetric operator, and this one is not known to be")
    if steps < 1:
        raise ValueError(f"steps={steps!r}: give a whole number of products, 1 or more")
    batched = A.is_batched(start)
    length = trees.norm(start, batched=batched)
    active, taken = torch.ones_like(length, dtype=torch.bool), torch.zeros_like(length)
    basis = [trees.scaled(start, 1 / length)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(steps):
        vector = A @ basis[-1]
        size = trees.norm(vector, batched=batched)
        alpha = orthogonalise_(vector, basis, batched=batched)[-1]
        diagonal.append(torch.where(active, alpha, diagonal[0] if diagonal else alpha))  # filler lies inside the spectrum
        taken = taken + active
        beta = trees.norm(vector, batched=batched)
        active = active & ~(beta <= 10 * torch.finfo(beta.dtype).eps * size)
        beside.append(torch.where(active, beta, 0.0))
        if step + 1 < steps:
            basis.append(trees.scaled(vector, torch.where(active, 1 / beta, 0.0)))
    main, off = (torch.stack(part, -1).double().cpu() for part in (diagonal, beside))
    if not bool((main.isfinite() & off.isfinite()).all()):
        raise ValueError("a product with A is infinite or NaN: look for functions without a second derivative in the loss")
    T = torch.diag_embed(main) + torch.diag_embed(off[..., :-1], 1) + torch.diag_embed(off[..., :-1], -1)
    values, vectors = torch.linalg.eigh(T)
    return Ritz(values=values, weights=vectors[..., 0, :] ** 2, steps=taken.cpu().long())


def orthogonalise_(w: Tree, basis: list[Tree], *, batched: bool) -> Tensor:
    """w ← w − V Vᵀ w, in place, for orthonormal V: modified Gram-Schmidt, twice. Returns Vᵀ w, one row a vector of V.

    One pass leaves behind what rounding makes of ‖w‖; the second takes it away (Giraud, Langou and Rozložník 2005).
    """
    total = []
    for _ in range(2):
        found = []
        for v in basis:
            along = trees.dot(v, w, batched=batched)
            trees.axpy_(w, v, -along)
            found.append(along)
        total.append(torch.stack(found))
    return total[0] + total[1]
