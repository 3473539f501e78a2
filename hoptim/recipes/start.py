"""What recipes share: the first values of their hyperparameters, and checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hoptim.validation import describe_type, is_finite, is_whole


def full(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A first value on the device of ``like``, in float32 or more: a log in bf16 would be too coarse for an outer step."""
    return torch.full(shape, value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def check_between(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless the value is a number above ``low`` and below ``high``."""
    if not (is_finite(value) and low < value < high):  # type: ignore[operator]
        words = f"above {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        raise ValueError(f"{name} is {value!r}: give a number {words}")


def check_count(name: str, value: object, what: str = "", least: int = 1) -> None:
    """Raise ValueError unless the value is a whole number of at least ``least``; ``what`` says what it counts."""
    if not (is_whole(value) and value >= least):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}: give {what}{what and ', '}a whole number of at least {least}")


def checked_names(what: str, names: object) -> list[str]:
    """The names as a list; raise unless they are two or more, each of them once."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} is {describe_type(names)}: give a list of names")
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"{what} is {list(names)}: give two names or more, each once")
    return list(names)
