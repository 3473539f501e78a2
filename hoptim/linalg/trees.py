"""Arithmetic on vectors kept as ``dict[str, Tensor]``, one entry a parameter, each in its shape.

A vector may carry a leading axis of R right-hand sides in every entry; ``batched=True`` says so where it matters, and a
scalar then becomes a tensor of shape (R,). Functions that end in an underscore write into their first argument.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tree = dict[str, Tensor]
Found = dict[str, Tensor | None]  # by name; None for what a loss does not touch
PIECE = 2**18  # of a long sum: added in turn, float32 loses 7e-5 of 2^18 equal squares, and 1e-2 of 2^26


def map_tree(function: Callable[[Tensor], Tensor], x: Tree) -> Tree:
    """Apply ``function`` to each tensor.

    >>> map_tree(torch.neg, {"w": torch.ones(2)})
    {'w': tensor([-1., -1.])}
    """
    return {name: function(value) for name, value in x.items()}


def clone(x: Tree) -> Tree:
    """Copy, so that in-place arithmetic on the copy leaves ``x`` alone."""
    return map_tree(torch.clone, x)


def cast(x: Tree, like: Tree) -> Tree:
    """``x`` in the data types of ``like``; what has them already is not copied."""
    return {name: value.to(like[name].dtype) for name, value in x.items()}


def widened(x: Tree) -> Tree:
    """``x`` with what is in half precision in float32, the rest as it is."""
    half = (torch.float16, torch.bfloat16)
    return map_tree(lambda value: value.float() if value.dtype in half else value, x)


def zeros_like(x: Tree) -> Tree:
    """The zero vector of the same names and shapes."""
    return map_tree(torch.zeros_like, x)


def add_(x: Tree, y: Tree, alpha: float = 1.0) -> Tree:
    """x ← x + alpha·y, in place, over the names of ``x``; returns ``x``.

    >>> add_({"w": torch.zeros(2)}, {"w": torch.ones(2)}, alpha=-2)
    {'w': tensor([-2., -2.])}
    """
    torch._foreach_add_(list(x.values()), [y[name] for name in x], alpha=alpha)
    return x


def add(x: Tree, y: Tree, alpha: float = 1.0) -> Tree:
    """x + alpha·y, a new vector, over the names of ``x``."""
    return dict(zip(x, torch._foreach_add(list(x.values()), [y[name] for name in x], alpha=alpha), strict=True))


def axpy_(x: Tree, y: Tree, a: Tensor) -> Tree:
    """x ← x + a·y, in place, with ``a`` on the device: a scalar, or one coefficient for each of R right-hand sides."""
    if _is_at_hand(a):
        return add_(x, y, a.item())
    values = list(x.values())
    torch._foreach_addcmul_(values, [y[name] for name in x], [_spread(a, value) for value in values])
    return x


def xpay_(x: Tree, y: Tree, a: Tensor) -> Tree:
    """x ← y + a·x, in place, likewise."""
    if _is_at_hand(a):
        number = a.item()
        for name, value in x.items():
            torch.add(y[name], value, alpha=number, out=value)
        return x
    values = list(x.values())
    torch._foreach_mul_(values, [_spread(a, value) for value in values])
    torch._foreach_add_(values, [y[name] for name in x])
    return x


def scaled(x: Tree, a: Tensor) -> Tree:
    """a·x, a new vector, likewise."""
    values = list(x.values())
    found = torch._foreach_mul(values, a.item() if _is_at_hand(a) else [_spread(a, value) for value in values])
    return dict(zip(x, found, strict=True))


def _is_at_hand(a: Tensor) -> bool:
    """A number that the host can read for nothing: operations with a plain number are several times as fast."""
    return not a.ndim and a.device.type == "cpu"


def _spread(a: Tensor, like: Tensor) -> Tensor:
    return a.reshape(-1, *[1] * (like.ndim - 1)) if a.ndim else a


def expanded(x: Tree, lead: Sequence[int]) -> Tree:
    """With leading axes, as views: a shape for R right-hand sides.

    >>> expanded({"w": torch.zeros(())}, (3,))
    {'w': tensor([0., 0., 0.])}
    """
    return map_tree(lambda value: value.expand((*lead, *value.shape)), x)


def length(x: Tree) -> int:
    """R, the size of the leading axis of right-hand sides."""
    return len(next(iter(x.values())))


def part(x: Tree, index: int | slice) -> Tree:
    """One of R right-hand sides, or several of them."""
    return {name: value[index] for name, value in x.items()}


def stack(parts: Sequence[Tree]) -> Tree:
    """R vectors as one with a leading axis."""
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


def present(x: Mapping[str, Tensor | None]) -> Tree:
    """What is there."""
    return {name: value for name, value in x.items() if value is not None}


def filled(x: Mapping[str, Tensor | None], like: Tree) -> Tree:
    """Over the names of ``like``, with its zeros for what is not there."""
    return {name: torch.zeros_like(value) if (part := x.get(name)) is None else part for name, value in like.items()}


def stack_found(parts: Sequence[Found]) -> Found:
    """R vectors as one with a leading axis, each of what is there in all of them or in none."""
    found: Found = {}
    for name in parts[0]:
        there = [value for part in parts if (value := part[name]) is not None]
        found[name] = torch.stack(there) if there else None
    return found


def sum_of(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b, where ``None`` is what does not exist, and so adds nothing."""
    return b if a is None else a if b is None else a + b


def times(x: Tree, y: Tree) -> Tree:
    """The entrywise product, over the names of ``x``; a leading axis of ``x`` may be missing in ``y``."""
    return {name: value * y[name] for name, value in x.items()}


def negative(x: Tree) -> Tree:
    """−x, a new vector."""
    return dict(zip(x, torch._foreach_neg(list(x.values())), strict=True))


def scale_(x: Tree, alpha: float) -> Tree:
    """x ← alpha·x, in place; returns ``x``."""
    torch._foreach_mul_(list(x.values()), alpha)
    return x


def dot(x: Tree, y: Tree, *, batched: bool = False) -> Tensor:
    """⟨x, y⟩ over all entries: a scalar, or shape (R,) for R right-hand sides at once.

    >>> dot({"w": torch.ones(3), "b": torch.ones(1)}, {"w": torch.full((3,), 2.0), "b": torch.ones(1)})
    tensor(7.)
    """
    return torch.stack(dot_parts(list(x.values()), [y[name] for name in x], batched=batched)).sum(0)


def dot_parts(x: Sequence[Tensor], y: Sequence[Tensor], *, batched: bool = False) -> list[Tensor]:
    """⟨x, y⟩ of each pair, of a long one in pieces: what a dot product is the sum of."""
    if batched:
        return [(a * b).reshape(len(a), -1).sum(1) for a, b in zip(x, y, strict=True)]
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(x, y, strict=True)]
    return [torch.dot(a, b) for pair in pairs for a, b in zip(*map(_pieces, pair), strict=True)]


def norm(x: Tree, *, batched: bool = False) -> Tensor:
    """‖x‖₂ over all entries: a scalar, or shape (R,) for R right-hand sides at once.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return torch.linalg.vector_norm(torch.stack(norm_parts(list(x.values()), batched=batched)), dim=0)


def norm_parts(tensors: list[Tensor], *, batched: bool = False) -> list[Tensor]:
    """The norm of each tensor, of a long one in pieces."""
    if batched:
        rows = [value.reshape(len(value), -1) for value in tensors]
        return [torch.linalg.vector_norm(piece, dim=1) for row in rows for piece in row.split(PIECE, dim=1)]
    return list(torch._foreach_norm([piece for value in tensors for piece in _pieces(value)]))


def _pieces(value: Tensor) -> Sequence[Tensor]:
    return (value,) if value.numel() <= PIECE else value.reshape(-1).split(PIECE)


@dataclass(frozen=True)
class Packed:
    """A vector and the tensors that hold it: one for all entries of a type on a device, whose views the entries are.

    What is done to all of the vector alike is one operation on these.

    >>> packed = Packed.of({"w": torch.ones(2), "b": torch.zeros(1)})
    >>> packed.held[0].add_(1)
    tensor([2., 2., 1.])
    >>> packed.entries
    {'w': tensor([2., 2.]), 'b': tensor([1.])}
    """

    entries: Tree
    held: list[Tensor]

    @classmethod
    def of(cls, x: Tree, *, batched: bool = False) -> Packed:
        """A copy; of R right-hand sides, whose norms are taken apart, each entry stays by itself."""
        if batched:
            entries = clone(x)
            return cls(entries, list(entries.values()))
        groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name, value in x.items():
            groups.setdefault((value.dtype, value.device), []).append(name)
        held = [torch.cat([x[name].reshape(-1) for name in names]) for names in groups.values()]
        entries = dict.fromkeys(x, held[0])
        for names, whole in zip(groups.values(), held, strict=True):
            pieces = whole.split([x[name].numel() for name in names])
            entries |= {name: piece.view(x[name].shape) for name, piece in zip(names, pieces, strict=True)}
        return cls(entries, held)


def unit(x: Tree) -> Tree:
    """x / ‖x‖₂, a copy; zero where x is zero.

    >>> unit({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    length = norm(x)
    length = torch.where(length > 0, length, 1.0)
    return map_tree(lambda value: value / length.to(value), x)


def size(x: Tree) -> int:
    """The number of scalars in the vector.

    >>> size({"w": torch.ones(3, 2), "b": torch.ones(1)})
    7
    """
    return sum(value.numel() for value in x.values())
