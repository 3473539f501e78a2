"""Linear operators on flat vectors, and operators made from operators: transposes, shifts, means, scalings."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hoptim.linalg import vectors
from hoptim.linalg.random import gaussian
from hoptim.linalg.vectors import Layout


class Operator(ABC):
    """A square linear operator on vectors of shape (n,).

    ``A @ v`` is the product, or R products for ``v`` of shape (R, n). The result may be ``v`` itself or share its memory, so
    never write to it. ``A.T`` is the transpose, ``A + sigma`` is A + σI, or A + diag(σ) for a vector σ. Solvers take inner
    products from ``A.dot``, ``A.norm`` and ``A.gram``, so that an operator whose vectors are spread over several processes
    can add up theirs.

    Attributes:
        size: n.
        dtype: the type of its vectors.
        device: where they live.
        is_symmetric: whether A is known to be its own transpose.
        is_fixed: whether A is the same in each product, as Krylov solvers need; ``False`` where each takes a fresh batch.
    """

    size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, like: Tensor | Layout | Operator, *, is_symmetric: bool = False, is_fixed: bool = True) -> None:
        self.size = len(like) if isinstance(like, Tensor) else like.size
        self.dtype, self.device = like.dtype, like.device
        self.is_symmetric, self.is_fixed = is_symmetric, is_fixed

    @abstractmethod
    def __matmul__(self, v: Tensor) -> Tensor:
        """The product A v, or R of them."""

    @property
    @abstractmethod
    def T(self) -> Operator:  # noqa: N802 (the usual name)
        """The transpose Aᵀ."""

    def product_onto_(self, y: Tensor, a: Tensor | float, v: Tensor) -> Tensor:
        """y ← A v + a·y in place; returns y. Pieces of a product are added as they come, which saves a vector of memory."""
        return vectors.aypx_(y, a, self @ v)

    def __add__(self, sigma: float | Tensor) -> Operator:
        return _Shifted(self, sigma) if isinstance(sigma, Tensor) or sigma else self

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩: a scalar, or shape (R,)."""
        return vectors.dot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖: a scalar, or shape (R,)."""
        return vectors.norm(v)

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u_i, v_j⟩ for all pairs of rows, in float64."""
        return vectors.gram(u, v)

    def largest(self, v: Tensor) -> Tensor:
        """The largest entry of v."""
        return v.amax()

    def gaussian(self, *lead: int, seed: int = 0) -> Tensor:
        """Standard normal vectors of shape (…, n), from their own generator: the same at each call."""
        return gaussian(self.size, *lead, seed=seed, dtype=self.dtype, device=self.device)

    @property
    def total(self) -> int:
        """The number of entries of a vector on all processes."""
        return self.size


class Symmetric(Operator):
    """A symmetric operator given by its product.

    Args:
        product: v ↦ A v, for v of shape (n,) or (R, n).
        like: a vector of its space, or a layout of one; only its size, type and device are used.
        is_fixed: whether A is the same in each product, default ``True``.

    >>> A = Symmetric(lambda v: 2 * v, like=torch.ones(2))
    >>> (A + 1.0) @ torch.ones(2)
    tensor([3., 3.])
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], like: Tensor | Layout | Operator, *, is_fixed: bool = True
    ) -> None:
        super().__init__(like, is_symmetric=True, is_fixed=is_fixed)
        self._product = product

    def __matmul__(self, v: Tensor) -> Tensor:
        return self._product(v)

    @property
    def T(self) -> Operator:  # noqa: N802
        """The operator itself."""
        return self


class Wrapped(Operator):
    """An operator made from another one, ``base``: symmetric and fixed if ``base`` is, and with its inner product."""

    def __init__(self, base: Operator) -> None:
        super().__init__(base, is_symmetric=base.is_symmetric, is_fixed=base.is_fixed)
        self.base = base

    @property
    def T(self) -> Operator:  # noqa: N802
        """The same made from the transpose of ``base``."""
        transposed = copy.copy(self)
        transposed.base = self.base.T
        return transposed

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u, v⟩ of ``base``."""
        return self.base.dot(u, v)

    def norm(self, v: Tensor) -> Tensor:
        """‖v‖ of ``base``."""
        return self.base.norm(v)

    def gram(self, u: Tensor, v: Tensor) -> Tensor:
        """⟨u_i, v_j⟩ of ``base``."""
        return self.base.gram(u, v)

    def largest(self, v: Tensor) -> Tensor:
        """The largest entry of v, by ``base``."""
        return self.base.largest(v)

    def gaussian(self, *lead: int, seed: int = 0) -> Tensor:
        """Those of ``base``."""
        return self.base.gaussian(*lead, seed=seed)

    @property
    def total(self) -> int:
        """That of ``base``."""
        return self.base.total


class OnFree(Wrapped):
    """A on the entries that are free, where ``free`` is true, and the identity on the others.

    >>> A = OnFree(Symmetric(lambda v: 2 * v.flip(-1), like=torch.ones(2)), torch.tensor([True, False]))
    >>> A @ torch.tensor([3.0, 5.0])
    tensor([0., 5.])
    """

    def __init__(self, base: Operator, free: Tensor) -> None:
        super().__init__(base)
        self.free = free

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.where(self.free, self.base @ (v * self.free), v)


class _Shifted(Wrapped):
    def __init__(self, base: Operator, sigma: float | Tensor) -> None:
        super().__init__(base)
        self.sigma = sigma

    def __matmul__(self, v: Tensor) -> Tensor:
        if isinstance(self.sigma, Tensor):
            return torch.addcmul(self.base @ v, v, self.sigma)
        return torch.add(self.base @ v, v, alpha=self.sigma)

    def product_onto_(self, y: Tensor, a: Tensor | float, v: Tensor) -> Tensor:
        """y ← A v + σ v + a·y in place; returns y."""
        self.base.product_onto_(y, a, v)
        return y.addcmul_(v, self.sigma) if isinstance(self.sigma, Tensor) else y.add_(v, alpha=self.sigma)


class Root(Symmetric):
    """A symmetric S and its inverse, given by their products, such as the root D^(−1/2) of a preconditioner D.

    >>> S = Root(lambda v: 2 * v, lambda v: v / 2, like=torch.ones(2))
    >>> S @ torch.ones(2), S.inverse @ torch.ones(2)
    (tensor([2., 2.]), tensor([0.5000, 0.5000]))
    """

    def __init__(
        self, product: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], like: Tensor | Layout | Operator
    ) -> None:
        super().__init__(product, like)
        self.inverse = Symmetric(inverse, like)

    @classmethod
    def diagonal(cls, s: Tensor) -> Root:
        """diag(s), for s of shape (n,)."""
        return cls(lambda v: s * v, lambda v: v / s, like=s)


class Scaled(Wrapped):
    """S A S for a symmetric S, or a diagonal one of shape (n,): what a solver sees under a preconditioner S⁻².

    Source: Saad, "Iterative Methods for Sparse Linear Systems", section 9.2 (split preconditioning).

    >>> (Scaled(Symmetric(lambda v: v, like=torch.ones(2)), torch.tensor([1.0, 2.0])) @ torch.ones(2)).tolist()
    [1.0, 4.0]
    """

    def __init__(self, base: Operator, scale: Tensor | Root) -> None:
        super().__init__(base)
        self.scale = Root.diagonal(scale) if isinstance(scale, Tensor) else scale

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.scale @ (self.base @ (self.scale @ v))


class Embedded(Wrapped):
    """A as an operator on other weights, with zero rows and columns for those that it does not touch.

    Args:
        base: A, on vectors of the layout ``inner``.
        inner: its layout. Weights that ``outer`` does not have are held fixed.
        outer: the layout of the vectors that the operator takes.

    >>> inner, outer = Layout.of({"b": torch.zeros(1)}), Layout.of({"a": torch.zeros(2), "b": torch.zeros(1)})
    >>> (Embedded(Symmetric(lambda v: 3 * v, like=torch.ones(1)), inner, outer) @ torch.ones(3)).tolist()
    [0.0, 0.0, 3.0]
    """

    def __init__(self, base: Operator, inner: Layout, outer: Layout) -> None:
        super().__init__(base)
        self.size, self.inner, self.outer = outer.size, inner, outer

    total, gaussian = Operator.total, Operator.gaussian  # of its own size

    def __matmul__(self, v: Tensor) -> Tensor:
        lead = v.shape[:-1]
        product = self.base @ self.inner.flatten(self.outer.unflatten(v), lead)
        return self.outer.flatten(self.inner.unflatten(product), lead)


class Mean(Wrapped):
    """The mean of operators on the same space, (A₁ + … + Aₙ) / n, as over batches.

    >>> A = Mean([Symmetric(lambda v, k=k: k * v, like=torch.ones(1)) for k in (1, 3)])
    >>> A @ torch.ones(1)
    tensor([2.])
    """

    def __init__(self, parts: Sequence[Operator]) -> None:
        super().__init__(parts[0])
        self.is_symmetric, self.is_fixed = all(A.is_symmetric for A in parts), all(A.is_fixed for A in parts)
        self.parts = parts

    def __matmul__(self, v: Tensor) -> Tensor:
        total = self.parts[0] @ v
        for part in self.parts[1:]:
            total = total + part @ v
        return total / len(self.parts)

    @property
    def T(self) -> Operator:  # noqa: N802
        """The mean of the transposes."""
        return Mean([part.T for part in self.parts])
