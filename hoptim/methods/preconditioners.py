"""Strategies for a simple D near A: solvers then see D^(−1/2) A D^(−1/2), whose eigenvalues lie closer together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.checks import is_finite, is_whole, listed
from hoptim.linalg.operators import Operator, Root
from hoptim.linalg.vectors import Tensors
from hoptim.problem.sharding import local


class Preconditioner(ABC):
    """A strategy for D: a frozen dataclass."""

    @abstractmethod
    def __call__(self, A: Operator, weights: Tensors, inner: Optimizer | None) -> Tensor | Root:
        """The diagonal of D, of shape (n,), every entry positive; or D^(−1/2).

        Args:
            A: the curvature, with damping.
            weights: the live weights in the order of A's vectors.
            inner: the inner optimizer, if it is known.
        """


@dataclass(frozen=True, kw_only=True)
class Jacobi(Preconditioner):
    """The diagonal of A itself, estimated: D = |mean over probes z of z ⊙ A z|, z of random signs.

    Args:
        probes: the number of products, ≥ 1, default 4; they go through A at once.
        floor: the smallest entry, relative to the largest, in (0, 1], default 1e-3.

    Raises:
        ValueError: an option out of its range.

    Source: Bekas, Kokiopoulou and Saad 2007, "An estimator for the diagonal of a matrix".

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([1.0, 4.0]) * v, like=torch.ones(2))
    >>> Jacobi(probes=1)(A, {}, None)
    tensor([1., 4.])
    """

    probes: int = 4
    floor: float = 1e-3

    def __post_init__(self) -> None:
        if not (is_whole(self.probes) and self.probes >= 1):
            raise ValueError(f"probes={self.probes!r}: give a whole number, 1 or more")
        if not (is_finite(self.floor) and 0 < self.floor <= 1):
            raise ValueError(f"floor={self.floor!r}: give a number above 0 and at most 1")

    def __call__(self, A: Operator, weights: Tensors, inner: Optimizer | None) -> Tensor:
        """The diagonal of D, of shape (n,), every entry positive."""
        z = torch.where(A.gaussian(self.probes) < 0, -1.0, 1.0).to(A.dtype)
        diagonal = (z * (A @ z)).mean(0).abs()
        largest = A.largest(diagonal)
        return diagonal.clamp(min=torch.where(largest > 0, largest * self.floor, 1.0))  # D = I if A is zero


@dataclass(frozen=True, kw_only=True)
class SecondMoments(Preconditioner):
    """D = √v̂ + ε, where v̂ are the second moments that an inner Adam holds already, and ε is its own. It costs no product.

    With ``Identity`` this is SAMA's hypergradient, x = g / (√v̂ + ε).

    Raises:
        ValueError: when called, no inner optimizer, or one without second moments yet.

    Source: Choe et al. 2023 (arXiv 2310.05674), section 3.2.

    >>> SecondMoments()
    SecondMoments()
    """

    def __call__(self, A: Operator, weights: Tensors, inner: Optimizer | None) -> Tensor:
        """The diagonal of D, of shape (n,), every entry positive."""
        if inner is None:
            raise ValueError("SecondMoments needs the inner optimizer: call hypergradient(..., inner=optimizer)")
        groups = {p: group for group in inner.param_groups for p in group["params"]}
        moments = {name: inner.state.get(p, {}).get("exp_avg_sq") for name, p in weights.items()}
        if missing := [name for name, moment in moments.items() if moment is None]:
            raise ValueError(
                f"{type(inner).__name__} holds no second moments of the weights {missing}: take an inner optimizer such as "
                "Adam or AdamW, after its first step, or Jacobi()"
            )
        if codes := [name for name, moment in moments.items() if not moment.is_floating_point()]:
            raise ValueError(
                f"{type(inner).__name__} holds the second moments of {listed(codes)} as {moments[codes[0]].dtype}, which "
                "are codes and no values: take Jacobi(), or an inner optimizer with moments of full precision"
            )
        roots = []
        for name, p in weights.items():
            group = groups[p]
            correction = 1 - group["betas"][1] ** float(inner.state[p]["step"]) if "betas" in group else 1.0
            root = (local(moments[name]) / correction).sqrt() + group["eps"]
            roots.append(root.reshape(-1).to(A.device, A.dtype))
        return torch.cat(roots)
