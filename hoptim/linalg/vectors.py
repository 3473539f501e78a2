"""Flat vectors, and how the named tensors of a model are laid out in one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
OptionalTensors = dict[str, Tensor | None]  # None for what does not exist, such as the gradient of a weight that is not used

PIECE = 2**18  # BLAS adds numbers one by one: in float32 a sum of 2^18 equal squares is off by 7e-5, of 2^26 by 1e-2


@dataclass(frozen=True)
class Layout:
    """The order, shapes and types of named tensors in a flat vector.

    A vector of the layout has shape (n,), or (R, n) for R vectors, whose tensors have a leading axis of R. Its type is the
    widest of the tensors' types, and at least float32, which sums of many terms need.

    >>> layout = Layout.of({"w": torch.zeros(2, 2), "b": torch.zeros(1)})
    >>> v = layout.flatten({"w": torch.eye(2), "b": None})
    >>> v
    tensor([1., 0., 0., 1., 0.])
    >>> layout.unflatten(v)["w"].shape, layout.unflatten(v.expand(3, 5))["w"].shape
    (torch.Size([2, 2]), torch.Size([3, 2, 2]))
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[torch.device, ...]

    @classmethod
    def of(cls, tensors: Tensors) -> Layout:
        """The layout of these tensors, in their order."""
        values = tensors.values()
        return cls(
            tuple(tensors), tuple(t.shape for t in values), tuple(t.dtype for t in values), tuple(t.device for t in values)
        )

    @cached_property
    def sizes(self) -> list[int]:
        """How many numbers each tensor has."""
        return [shape.numel() for shape in self.shapes]

    @cached_property
    def size(self) -> int:
        """How many numbers a vector has: n."""
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of a vector."""
        return reduce(torch.promote_types, self.dtypes, torch.float32)

    @cached_property
    def device(self) -> torch.device:
        """The device of a vector: that of the first tensor."""
        return self.devices[0] if self.devices else torch.device("cpu")

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all tensors have the vector's type and device, so that they can be views of it."""
        return set(self.dtypes) <= {self.dtype} and set(self.devices) <= {self.device}

    def flatten(self, tensors: Mapping[str, Tensor | None], lead: Sequence[int] = ()) -> Tensor:
        """The vector of these tensors, with zeros where one is missing or ``None``; other names are ignored.

        Args:
            tensors: by name, each of its shape in the layout.
            lead: ``(R,)`` if each has a leading axis of R; default ``()``.
        """
        if not self.names:
            return torch.zeros((*lead, 0), dtype=self.dtype, device=self.device)
        found = [tensors.get(name) for name in self.names]
        pieces = [
            torch.zeros((*lead, size), dtype=self.dtype, device=self.device) if t is None else t.reshape((*lead, size))
            for t, size in zip(found, self.sizes, strict=True)
        ]
        if not self.is_uniform:
            pieces = [piece.to(self.device, self.dtype) for piece in pieces]
        return torch.cat(pieces, dim=-1)

    def views(self, v: Tensor) -> Tensors:
        """The tensors of a vector, as views of it."""
        pieces, lead = torch.split_with_sizes(v, self.sizes, -1), v.shape[:-1]
        named = zip(self.names, pieces, self.shapes, strict=True)
        return {name: piece.view((*lead, *shape)) for name, piece, shape in named}

    def unflatten(self, v: Tensor) -> Tensors:
        """The tensors of a vector in their own types and on their own devices; views of it where possible."""
        tensors = self.views(v)
        if self.is_uniform:
            return tensors
        return {
            name: t.to(device, dtype)
            for (name, t), device, dtype in zip(tensors.items(), self.devices, self.dtypes, strict=True)
        }


def dot(u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩: a scalar, or shape (R,) for R pairs of vectors; long sums are added up in pieces.

    >>> dot(torch.ones(3), torch.full((3,), 2.0))
    tensor(6.)
    """
    if u.ndim > 1:
        return (u * v).sum(-1)
    if len(u) <= PIECE:
        return torch.dot(u, v)
    return torch.stack([torch.dot(a, b) for a, b in zip(u.split(PIECE), v.split(PIECE), strict=True)]).sum()


def norm(v: Tensor) -> Tensor:
    """‖v‖₂: a scalar, or shape (R,) for R vectors.

    >>> norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor([5., 1.])
    """
    if v.shape[-1] <= PIECE:
        return torch.linalg.vector_norm(v, dim=-1)
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(p, dim=-1) for p in v.split(PIECE, dim=-1)]), dim=0
    )


def axpy_(y: Tensor, a: Tensor | float, x: Tensor) -> Tensor:
    """y ← y + a·x in place, for one number a or one for each of R vectors; returns y.

    >>> axpy_(torch.ones(2, 3), torch.tensor([1.0, 2.0]), torch.ones(2, 3))
    tensor([[2., 2., 2.],
            [3., 3., 3.]])
    """
    a = _coefficient(a)
    return y.addcmul_(x, a) if isinstance(a, Tensor) else y.add_(x, alpha=a)


def aypx_(y: Tensor, a: Tensor | float, x: Tensor) -> Tensor:
    """y ← x + a·y in place; returns y."""
    a = _coefficient(a)
    return y.mul_(a).add_(x) if isinstance(a, Tensor) else torch.add(x, y, alpha=a, out=y)


def scale_(y: Tensor, a: Tensor | float) -> Tensor:
    """y ← a·y in place; returns y."""
    return y.mul_(_coefficient(a))


def _coefficient(a: Tensor | float) -> Tensor | float:
    """A plain number if the host has it, which makes torch several times as fast; else a tensor that broadcasts."""
    if not isinstance(a, Tensor):
        return a
    return a[..., None] if a.ndim or a.device.type != "cpu" else a.item()


def gram(x: Tensor, y: Tensor) -> Tensor:
    """⟨x_i, y_j⟩ for all pairs of rows, in float64 whatever the type of the vectors.

    >>> gram(torch.eye(2), torch.ones(3, 2)).shape
    torch.Size([2, 3])
    """
    pieces = zip(x.split(2**16, dim=-1), y.split(2**16, dim=-1), strict=True)  # small enough to stay in the cache
    return torch.stack([a.double() @ b.double().T for a, b in pieces]).sum(0)


def inverse(a: Tensor | float, tiny: float = 0.0) -> Any:
    """1 / a for a length a, finite even if a is zero, so that a zero vector divided by its length stays zero.

    Of a plain number ``tiny`` is the smallest that it may be, which a tensor has in its type.

    >>> 0 * inverse(torch.tensor(0.0))
    tensor(0.)
    """
    if not isinstance(a, Tensor):
        return 1 / max(a, tiny)
    return a.clamp(min=torch.finfo(a.dtype).tiny).reciprocal()


def hypot(a: Any, b: Any) -> Any:
    """√(a² + b²) of tensors, or of plain numbers."""
    return torch.hypot(a, b) if isinstance(a, Tensor) else math.hypot(a, b)


def larger(a: Any, b: Any) -> Any:
    """The larger one, for each entry of tensors, or of plain numbers."""
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)


def unit(v: Tensor) -> Tensor:
    """v / ‖v‖, and zero where v is zero.

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return v * inverse(norm(v))[..., None]
