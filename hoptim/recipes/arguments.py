"""Checks of the arguments of recipes, and sums of losses with learned weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hoptim.checks import describe_type, is_finite, is_whole


def check_between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the value is a number above ``low`` and below ``high``."""
    if not (is_finite(value) and low < value < high):  # type: ignore[operator]
        words = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} is {value!r}: give a number {words}")


def check_count(name: str, value: object, what: str = "", least: int = 1) -> None:
    """Raise ValueError unless the value is a whole number of at least ``least``; ``what`` says what it counts."""
    if not (is_whole(value) and value >= least):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}: give {what}{what and ', '}a whole number of at least {least}")


def checked_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names; raise ValueError unless they are two or more, each of them once."""
    if isinstance(names, str) or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{what} is {names!r}: give a list of two names or more, each once")
    return tuple(names)


def checked_index(name: str, index: object, count: int) -> Tensor:
    """The numbers of examples, below ``count``, such that torch takes them neither for a mask nor from the end."""
    if not isinstance(index, Tensor) or index.dtype is torch.bool or index.is_floating_point() or index.is_complex():
        found = f"of {index.dtype}" if isinstance(index, Tensor) else describe_type(index)
        raise TypeError(f"{name} is {found}: give the numbers of examples, a tensor of whole numbers")
    index = index.long()
    return torch.where(index < 0, index - count, index)  # which is an error then, as it is above


def cast(value: Tensor, like: Tensor) -> Tensor:
    """The value in the precision of ``like``, but not as whole numbers, which would make a weight 0.

    Where it has that precision, ``Tensor.to`` would be a tenth of a small step's cost.
    """
    return value if value.dtype is like.dtype or not like.is_floating_point() else value.to(like.dtype)


def weighted_mean(losses: Tensor, weights: Tensor, name: str, index: Tensor) -> Tensor:
    """(1/B) Σ_i w_k ℓ_i, where k is entry i of ``index``, the argument of that name."""
    index = checked_index(name, index, len(weights))
    if losses.ndim != 1 or losses.shape != index.shape:
        raise ValueError(
            f"losses have shape {tuple(losses.shape)} and {name} {tuple(index.shape)}: give one loss and one number for "
            'each example of the batch, of shape (B,), from a criterion with reduction="none"'
        )
    return (cast(weights[index], losses) * losses).mean()


def weighted_sum(what: str, parts: Mapping[str, Tensor], names: Sequence[str], weights: Tensor) -> Tensor:
    """Σ_k w_k p_k of parts by name; raise ValueError unless there is one for each name, all of the same shape."""
    if set(parts) != set(names):
        raise ValueError(f"{what} has {sorted(map(str, parts))}: give one tensor for each of {sorted(names)}")
    return torch.stack([cast(w, parts[name]) * parts[name] for name, w in zip(names, weights, strict=True)]).sum(0)
