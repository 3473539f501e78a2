"""Functions of named tensors, ``dict[str, Tensor]``, the form in which weights and gradients appear outside a solve."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hoptim.linalg import vectors
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors


def map_tensors(function: Callable[[Tensor], Tensor], x: Tensors) -> Tensors:
    """Apply ``function`` to each tensor.

    >>> map_tensors(torch.neg, {"w": torch.ones(2)})
    {'w': tensor([-1., -1.])}
    """
    return {name: function(value) for name, value in x.items()}


def present(x: Mapping[str, Tensor | None]) -> Tensors:
    """The entries that are not ``None``.

    >>> present({"w": torch.ones(1), "b": None})
    {'w': tensor([1.])}
    """
    return {name: value for name, value in x.items() if value is not None}


def filled(x: Mapping[str, Tensor | None], like: Tensors) -> Tensors:
    """The entries with the names of ``like``, with zeros of its shapes for missing ones."""
    return {name: torch.zeros_like(value) if (part := x.get(name)) is None else part for name, value in like.items()}


def add(x: OptionalTensors, y: OptionalTensors) -> OptionalTensors:
    """x + y for dicts with the same names, where ``None`` counts as zero."""
    pairs = ((name, a, y[name]) for name, a in x.items())
    return {name: b if a is None else a if b is None else a + b for name, a, b in pairs}


def expanded(x: Tensors, lead: Sequence[int]) -> Tensors:
    """The tensors with leading axes added, as views.

    >>> expanded({"w": torch.zeros(())}, (3,))
    {'w': tensor([0., 0., 0.])}
    """
    return map_tensors(lambda value: value.expand((*lead, *value.shape)), x) if lead else x


def stack(rows: Sequence[OptionalTensors]) -> OptionalTensors:
    """R dicts as one whose tensors have a leading axis of R; ``None`` for a name without tensors."""
    found: OptionalTensors = {}
    for name in rows[0]:
        tensors = [value for row in rows if (value := row[name]) is not None]
        found[name] = torch.stack(tensors) if tensors else None
    return found


def is_same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape and values; NaN is the same as NaN.

    >>> is_same(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan])), is_same(torch.ones(1), None)
    (True, False)
    >>> is_same(torch.eye(2).to_sparse(), torch.eye(2).to_sparse())
    True
    """
    if b is None or a.shape != b.shape or a.layout != b.layout:
        return False
    return all(
        one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
        for one, other in zip(_strided(a), _strided(b), strict=True)
    )


def _strided(t: Tensor) -> tuple[Tensor, ...]:
    """The tensors that a sparse one consists of; of another one, itself."""
    if t.layout == torch.sparse_coo:
        return t.coalesce().indices(), t.coalesce().values()
    return (t.crow_indices(), t.col_indices(), t.values()) if t.layout == torch.sparse_csr else (t,)


def shared(x: Tensors, before: Tensors) -> Tensors:
    """The tensors of x, but those of ``before`` where they are the same, so that no memory is held twice."""
    return {name: before[name] if is_same(value, before.get(name)) else value for name, value in x.items()}


def dot(x: Tensors, y: Tensors) -> Tensor:
    """⟨x, y⟩ over all entries, in float32 or wider.

    >>> dot({"w": torch.ones(3), "b": torch.ones(1)}, {"w": torch.full((3,), 2.0), "b": torch.ones(1)})
    tensor(7.)
    """
    layout = Layout.of(x)
    return vectors.dot(layout.flatten(x), layout.flatten(y))


def norm(x: Tensors) -> Tensor:
    """‖x‖₂ over all entries, in float32 or wider.

    >>> norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    return vectors.norm(Layout.of(x).flatten(x))
