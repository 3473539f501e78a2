"""Linear operators on dicts of tensors, and operators made from operators: transposes, shifts, means, scalings."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence

import torch

from hoptim.linalg import trees
from hoptim.linalg.trees import Tree


class Operator(ABC):
    """A square linear operator on vectors of the names and shapes of ``like``.

    ``A @ v`` is the product; a vector whose entries have a leading axis of R right-hand sides gives R products at once.
    ``A.T`` is the transpose, ``A + sigma`` is A + σI; ``A.symmetric`` says whether A is known to be its own transpose.
    """

    symmetric = False

    def __init__(self, like: Tree) -> None:
        self.like = like

    @abstractmethod
    def __matmul__(self, v: Tree) -> Tree:
        """The product A v, or R of them."""

    @property
    @abstractmethod
    def T(self) -> Operator:  # noqa: N802 (the field's own name)
        """The transpose Aᵀ."""

    def __add__(self, sigma: float) -> Operator:
        return _Shifted(self, sigma) if sigma else self

    def is_batched(self, v: Tree) -> bool:
        """Whether ``v`` has the leading axis of R right-hand sides."""
        name, value = next(iter(v.items()))
        return value.ndim > self.like[name].ndim


class Symmetric(Operator):
    """A symmetric operator given by its product.

    >>> A = Symmetric(lambda v: {"w": 2 * v["w"]}, like={"w": torch.ones(2)})
    >>> ((A + 1.0) @ {"w": torch.ones(2)})["w"]
    tensor([3., 3.])
    """

    symmetric = True

    def __init__(self, product: Callable[[Tree], Tree], like: Tree) -> None:
        super().__init__(like)
        self._product = product

    def __matmul__(self, v: Tree) -> Tree:
        return self._product(v)

    @property
    def T(self) -> Operator:  # noqa: N802
        """The operator itself."""
        return self


class _Shifted(Operator):
    def __init__(self, base: Operator, sigma: float) -> None:
        super().__init__(base.like)
        self.base, self.sigma, self.symmetric = base, sigma, base.symmetric

    def __matmul__(self, v: Tree) -> Tree:
        return trees.add(self.base @ v, v, alpha=self.sigma)

    @property
    def T(self) -> Operator:  # noqa: N802
        return _Shifted(self.base.T, self.sigma)


def in_float32(A: Operator) -> Operator:
    """A for vectors in float32 where weights are in half precision, which would lose sums of many terms; else A itself."""
    wide = trees.widened(A.like)
    return A if all(wide[name] is A.like[name] for name in wide) else _Widened(A, wide)


class _Widened(Operator):
    def __init__(self, base: Operator, like: Tree) -> None:
        super().__init__(like)
        self.base, self.symmetric = base, base.symmetric

    def __matmul__(self, v: Tree) -> Tree:
        largest = torch.stack(torch._foreach_norm(list(v.values()), torch.inf)).amax()
        size = torch.where(largest > 0, largest, 1.0)  # in float16 a small vector would become zero
        narrow = trees.cast(trees.map_tree(lambda value: value / size, v), self.base.like)
        return trees.map_tree(lambda value: value * size, trees.widened(self.base @ narrow))

    @property
    def T(self) -> Operator:  # noqa: N802
        return _Widened(self.base.T, self.like)


class Mean(Operator):
    """The mean of operators on the same weights: (A₁ + … + Aₙ) / n, as over batches. What one of them lacks counts as zero.

    >>> A = Mean([Symmetric(lambda v, k=k: {"w": k * v["w"]}, like={"w": torch.ones(1)}) for k in (1, 3)])
    >>> (A @ {"w": torch.ones(1)})["w"]
    tensor([2.])
    """

    def __init__(self, parts: Sequence[Operator]) -> None:
        super().__init__({name: value for part in parts for name, value in part.like.items()})
        self.parts, self.symmetric = parts, all(part.symmetric for part in parts)

    def __matmul__(self, v: Tree) -> Tree:
        products = [part @ {name: v[name] for name in part.like} for part in self.parts]
        return mean_of(products, like=v)

    @property
    def T(self) -> Operator:  # noqa: N802
        """The mean of the transposes."""
        return Mean([part.T for part in self.parts])


def mean_of(vectors: Sequence[Tree], like: Tree) -> Tree:
    """The mean of vectors over the names of ``like``; what one of them lacks counts as zero."""
    total = trees.zeros_like(like)
    for vector in vectors:
        for name in total.keys() & vector.keys():
            total[name] = total[name] + vector[name] / len(vectors)
    return total


class Scaled(Operator):
    """S A S for a diagonal S: the curvature in weights of another scale, which takes the place of a preconditioner S⁻².

    Source: Saad, "Iterative Methods for Sparse Linear Systems", section 9.2 (split preconditioning).
    """

    def __init__(self, base: Operator, scale: Tree) -> None:
        super().__init__(base.like)
        self.base, self.scale, self.symmetric = base, scale, base.symmetric

    def __matmul__(self, v: Tree) -> Tree:
        return trees.times(self.base @ trees.times(v, self.scale), self.scale)

    @property
    def T(self) -> Operator:  # noqa: N802
        """S Aᵀ S."""
        return Scaled(self.base.T, self.scale)


def rows(product: Callable[[Tree], Tree], v: Tree, key: Hashable) -> Tree:
    """The products of R vectors, the rows of ``v``: all at once, four at a time or one by one, whichever is fastest here.

    The first call for a ``key`` and R times the ways on this very work and remembers the choice for the life of the process;
    ``product`` takes a vector without a leading axis, or with one.
    """
    count = trees.length(v)
    chosen = _CHUNK.get((key, count))
    if chosen is None:
        sizes = [size for size in (1, 4, count) if size <= count]
        seconds = {size: min(_seconds(product, v, size) for _ in range(2)) for size in sizes}
        chosen = min(seconds, key=lambda size: seconds[size] * -(-count // size))
        _CHUNK[(key, count)] = chosen
    return _by_chunks(product, v, chosen)


_CHUNK: dict[Hashable, int] = {}


def _by_chunks(product: Callable[[Tree], Tree], v: Tree, size: int) -> Tree:
    count = trees.length(v)
    if size == 1:
        return trees.stack([product(trees.part(v, i)) for i in range(count)])
    if size == count:
        return product(v)
    found = [product(trees.part(v, slice(i, i + size))) for i in range(0, count, size)]
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _seconds(product: Callable[[Tree], Tree], v: Tree, size: int) -> float:
    """How long one chunk of this size takes."""
    on_gpu = next(iter(v.values())).is_cuda
    v = trees.part(v, 0 if size == 1 else slice(0, size))
    if on_gpu:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    product(v)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begun
