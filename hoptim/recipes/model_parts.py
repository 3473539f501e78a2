"""The parts of a model by name, and the first values of hyperparameters that belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add, attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from hoptim.checks import describe_type
from hoptim.problem.sharding import whole
from hoptim.problem.wrappers import unwrap


def unwrapped(model: Any) -> nn.Module:
    """The module inside all wrappers; raise TypeError if it is none, nor passes for one."""
    if not hasattr(model, "named_modules"):
        raise TypeError(f"model is {describe_type(model)}: give an nn.Module")
    return unwrap(model)


def part_of(module: nn.Module, name: str) -> Any:
    """The part or the parameter of this dotted name, as it is now; ``None`` if there is none. Cheaper than a dict of all."""
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None


def full(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A first value on the device of ``like``, in float32 or more: a log in bf16 would be too coarse for an outer step."""
    return torch.full(shape, value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def beside(value: Tensor, sharded: Any) -> Tensor:
    """A value that all ranks have, as a ``DTensor`` where ``sharded`` is one, so that they can be multiplied."""
    if not hasattr(sharded, "device_mesh") or hasattr(value, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def whole_like(x: Tensor) -> Tensor:
    """A plain tensor of the whole shape of x, for random numbers that are the same on all ranks; mostly x itself."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if hasattr(x, "device_mesh") else x


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars. Those of sharded weights are added up before ranks wait for each other, once for each mesh."""
    sums: dict[Any, Tensor] = {}
    for term in terms:
        mesh = getattr(term, "device_mesh", None)
        sums[mesh] = sums[mesh] + term if mesh in sums else term
    return reduce(add, map(whole, sums.values()))


def levels_of(values: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The levels of hyperparameters of one kind: one for all of them, and one for each tensor, if there are several."""
    numbered = {name: torch.tensor(number) for number, name in enumerate(values)}
    one_for_all = dict.fromkeys(numbered, torch.tensor(0))
    several = 1 < len(values) < sum(value.numel() for value in values.values())
    return [one_for_all, numbered] if several else [one_for_all]
