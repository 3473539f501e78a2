"""Checks of the levels that hyperparameters share, and their numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hoptim.problem.outer_rates import Rates
from hoptim.validation import describe_type

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
Numbers = dict[str, Tensor]  # by name of the hyperparameter: which level each entry has


def checked_levels(levels: object, leaves: Mapping[str, Tensor], kinds: Mapping[str, Rates]) -> list[Numbers]:
    """The levels, numbered without gaps; raises unless they fit their leaves, are of one kind each, and nested."""
    if isinstance(levels, Mapping) or not isinstance(levels, Sequence):
        raise TypeError(f"levels is {describe_type(levels)}: give a list of dicts, such as [{{'decay': torch.tensor(0)}}]")
    if len(levels) > 2:
        raise ValueError(f"levels has {len(levels)} dicts: give at most two, the coarser one first")
    if not all(levels):
        raise ValueError("levels has an empty dict: give the numbers of levels by the names of hyperparameters")
    for level in levels:
        if strangers := [name for name in level if name not in leaves]:
            raise KeyError(f"levels names {strangers[0]!r}, which is no hyperparameter: the names are {sorted(leaves)[:5]}")
        if len({id(kinds[name]) for name in level}) > 1:
            raise ValueError(f"a level is shared by {', '.join(level)}, of several kinds: give a level to one kind each")
    found = [renumbered({name: _checked(name, one, leaves[name].shape) for name, one in level.items()}) for level in levels]
    if len(found) == 2:
        _check_nested(*found)
    return found


def _checked(name: str, index: object, shape: torch.Size) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype not in WHOLE:
        raise TypeError(f"the level of {name!r} is {describe_type(index)}: give a tensor of whole numbers from 0")
    try:
        fits = torch.broadcast_shapes(index.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits or bool((index < 0).any()):
        raise ValueError(
            f"the level of {name!r} has shape {tuple(index.shape)} or negative numbers: give whole numbers from 0, of a "
            f"shape that broadcasts to {tuple(shape)}"
        )
    return index.long()


def renumbered(level: Mapping[str, Tensor]) -> Numbers:
    """The same levels, numbered without gaps."""
    _, numbers = torch.cat([index.flatten().cpu() for index in level.values()]).unique(return_inverse=True)
    parts = numbers.split([index.numel() for index in level.values()])
    return {name: part.reshape(index.shape) for (name, index), part in zip(level.items(), parts, strict=True)}


def _check_nested(coarse: Mapping[str, Tensor], fine: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless each of the finer levels is within one of the coarser ones."""
    if coarse.keys() != fine.keys():
        raise ValueError(f"the second dict of levels names {', '.join(fine)}, the first {', '.join(coarse)}: give the same")
    both = [torch.broadcast_tensors(fine[name], coarse[name]) for name in fine]
    inner, outer = (torch.cat([pair[place].flatten() for pair in both]) for place in (0, 1))
    if len((inner * (outer.max() + 1) + outer).unique()) > len(inner.unique()):
        raise ValueError("levels of the second dict of levels are not within one of the first: give the coarser one first")
