"""What recipes share: the first values of their hyperparameters, weighted sums, and checks of their arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.problem.wrappers import unwrap
from hoptim.validation import describe_type, is_finite, is_whole


def full(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A first value on the device of ``like``, in float32 or more: a log in bf16 would be too coarse for an outer step."""
    return torch.full(shape, value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def shared(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The levels of hyperparameters of one kind: one for all of them, and one for each tensor, if there are several."""
    numbered = {name: torch.tensor(number) for number, name in enumerate(values)}
    one_for_all = dict.fromkeys(numbered, torch.tensor(0))
    several = 1 < len(values) < sum(value.numel() for value in values.values())
    return [one_for_all, numbered] if several else [one_for_all]


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


def inside(model: Any) -> nn.Module:
    """The module inside all wrappers; raise TypeError if it is none, nor passes for one."""
    if not hasattr(model, "named_modules"):
        raise TypeError(f"model is {describe_type(model)}: give an nn.Module")
    return unwrap(model)


def held(module: nn.Module, name: str) -> Any:
    """The part or the parameter of this dotted name, as it is now; ``None`` if there is none. Cheaper than a dict of all."""
    *path, last = name.split(".")
    part: Any = module
    for group in path:
        if (part := getattr(part, group, None)) is None:
            return None
    return part._parameters.get(last) if last in part._parameters else getattr(part, last, None)


def cast(value: Tensor, like: Tensor) -> Tensor:
    """The value in the precision of ``like``; where it has that, ``Tensor.to`` would be a tenth of a small step's cost."""
    return value if value.dtype is like.dtype else value.to(like.dtype)


def check_floats(name: str, value: object) -> None:
    """Raise TypeError unless the value is a tensor of floating-point numbers: cast to whole ones, a weight would be 0."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} is {_kind(value)}: give a tensor of floating-point numbers")


def checked_index(name: str, index: object, count: int) -> Tensor:
    """The numbers of examples, below ``count``, such that torch takes them neither for a mask nor from the end."""
    if not isinstance(index, Tensor) or index.dtype is torch.bool or index.is_floating_point() or index.is_complex():
        raise TypeError(
            f"{name} is {_kind(index)}: give one number for each example of the batch, a tensor of whole numbers"
        )
    index = index.long()
    return torch.where(index < 0, index - count, index)  # which is an error then, as it is above


def check_losses(losses: Tensor, name: str, index: Tensor) -> None:
    """Raise unless there is a loss for each number of ``index``, the argument of this name."""
    check_floats("losses", losses)
    if losses.ndim != 1 or losses.shape != index.shape or not len(losses):
        raise ValueError(
            f"losses have shape {tuple(losses.shape)} and {name} {tuple(index.shape)}: give one loss and one number for "
            'each example of the batch, of shape (B,), from a criterion with reduction="none"'
        )


def weighted_sum(what: str, parts: object, names: Sequence[str], weights: Tensor) -> Tensor:
    """Σ_k w_k p_k of parts by name; raise unless there is one for each name, all of the same shape."""
    if not isinstance(parts, Mapping):
        raise TypeError(f"{what} is {describe_type(parts)}: give a dict of tensors by the names {sorted(names)}")
    if set(parts) != set(names):
        raise ValueError(f"{what} has {sorted(map(str, parts))}: give one tensor for each of {sorted(names)}")
    for name in names:
        check_floats(f"{what}[{name!r}]", parts[name])
    if len({part.shape for part in parts.values()}) > 1:
        shapes = {name: tuple(parts[name].shape) for name in names}
        raise ValueError(f"{what} has the shapes {shapes}: give tensors of the same shape")
    return torch.stack([parts[name] * w.to(parts[name].dtype) for name, w in zip(names, weights, strict=True)]).sum(0)


def _kind(value: object) -> str:
    return f"of {value.dtype}" if isinstance(value, Tensor) else describe_type(value)
