"""LevelAdam: Adam for many numbers that share a level, so that what is wrong with all of them is corrected at once.

:class:`Level` says what shares one, ``checked_levels`` checks what a user says, and :class:`LevelAdam` takes the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.checks import describe_type


@dataclass(frozen=True, eq=False)
class Level:
    """Levels that entries of tensors share.

    Attributes:
        members: pairs of a leaf and an index: whole numbers from 0, of a shape that broadcasts to the leaf's, that say
            which level each entry has.
        options: those of their param group, such as ``lr``.
        above: coarser levels of the same leaves, each of which is shared by some of these.
    """

    members: Sequence[tuple[Tensor, Tensor]]
    options: Mapping[str, Any]
    above: Level | None = None

    @cached_property
    def count(self) -> int:
        """How many levels there are."""
        return 1 + max(int(index.max()) for _, index in self.members)

    @cached_property
    def leaves(self) -> list[Tensor]:
        """The leaves of the members."""
        return [leaf for leaf, _ in self.members]

    def zeros(self) -> Tensor:
        """A number for each level, with the device of the leaves, in their precision or float32."""
        like = self.leaves[0]
        return torch.zeros(self.count, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

    def sums(self, parts: Sequence[Tensor | None]) -> Tensor:
        """For each level the sum over its entries of these tensors, one for each leaf; ``None`` counts as 0."""
        total = self.zeros()
        total = total if total.device.type == "mps" else total.double()  # a sum of 2^24 ones is lost in float32
        for part, (_, index) in zip(parts, self.members, strict=True):
            if part is not None:
                own = part.to(total).sum_to_size(index.shape).flatten()
                total.index_add_(0, index.flatten().to(total.device), own)
        return total

    def sizes(self) -> Tensor:
        """How many entries each level has, without those of frozen leaves."""
        each = [(leaf, torch.full(index.shape, leaf.numel() // max(index.numel(), 1))) for leaf, index in self.members]
        return self.sums([one if leaf.requires_grad else None for leaf, one in each])

    def spread(self, levels: Tensor) -> list[Tensor]:
        """For each leaf the levels of its entries, of a shape that broadcasts to the leaf's."""
        return [levels[index.to(levels.device)].to(leaf) for leaf, index in self.members]

    def differences(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """These tensors, one for each leaf, less the mean over all entries of a level; frozen leaves don't count."""
        free = [part if leaf.requires_grad else None for part, leaf in zip(parts, self.leaves, strict=True)]
        means = self.sums(free) / self.sizes().clamp(min=1)
        return [part - mean for part, mean in zip(parts, self.spread(means), strict=True)]

    @cached_property
    def siblings(self) -> Level | None:
        """These levels as the entries of those above; ``None`` if there are none above."""
        if self.above is None:
            return None
        index = torch.zeros(self.count, dtype=torch.long)
        for (_, own), (_, above) in zip(self.members, self.above.members, strict=True):
            own, above = torch.broadcast_tensors(own.cpu(), above.cpu())
            index[own.flatten()] = above.flatten()
        return Level([(self.zeros().requires_grad_(), index)], {})

    def steps(self, moves: Tensor) -> list[Tensor]:
        """For each leaf the steps of its entries' levels, whose own moves are given: what sets them apart from siblings."""
        return self.spread(moves if self.siblings is None else self.siblings.differences([moves])[0])


class LevelAdam(torch.optim.Adam):
    """Adam for leaves θ whose entries share levels, θ_k = Σ_l level_l(k) + offset_k, at rates that may fall.

    A level has the sum of its entries' gradients, in which their noise averages out, and its own step of Adam, of size u. A
    finer level and the entries themselves move only by what sets them apart from others of the same level, and entries are
    drawn to the mean of theirs:

        step of entry k:  −lr·(u_k − ū + δ·(θ_k − θ̄)) and those of its levels,

    where ū and θ̄ are means over the entries of its level; for a finer level ū is the mean over the levels beside it. So the
    levels take the same way with one entry or many, and few validation examples, which say little about single entries,
    leave them together. An entry whose gradient keeps its sign ends at 1/δ from θ̄.

    After each step the levels are added to the leaves and are 0 again, so that the leaves are all there is to read, save
    and load. Levels have param groups of their own, with the key ``"level"``. Frozen leaves stay. Gradients have to be there
    before :meth:`step`, so that it takes no closure.

    Args:
        params: the leaves, or groups of them, as for Adam. In a group with ``"fall_after": h`` a step is 1/√(1 + t/h) times
            as long after t steps: long at first, as the start may be far off, and short later, since weights that follow a
            level late would make it swing. ``"pull"`` is δ.
        levels: what shares a level, and the options of each.
        **options: those of Adam.

    Raises:
        TypeError: ``step`` gets a closure.

    Source: the non-centred parametrisation of hierarchical models: Papaspiliopoulos, Roberts and Sköld 2007, A general
        framework for the parametrization of hierarchical models, with Adam as the rule.

    >>> leaf = torch.zeros(3, requires_grad=True)
    >>> one_for_all = Level([(leaf, torch.tensor([0]))], {"lr": 0.2})
    >>> optimizer = LevelAdam([leaf], [one_for_all], lr=0.03)
    >>> leaf.grad = torch.tensor([3.0, 2.0, -1.0])                       # the sum is positive, the third entry is not
    >>> optimizer.step()
    >>> leaf.detach()                                                    # −0.2 − 0.03·(u_k − 1/3)
    tensor([-0.2200, -0.2200, -0.1600])
    """

    levels: list[Level]

    def __init__(self, params: Iterable[Any], levels: Iterable[Level] = (), **options: Any) -> None:
        super().__init__(params, **options)
        self.levels = list(levels)
        for number, level in enumerate(self.levels):
            self.add_param_group({"params": [level.zeros().requires_grad_()], **level.options, "level": number})
        self._register()

    def _register(self) -> None:
        self.register_step_pre_hook(_before)
        self.register_step_post_hook(_after)
        self._old: dict[Tensor, Tensor] = {}  # the members before a step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "levels": self.levels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "levels" in state:  # a copy, which torch makes without hooks
            self._register()

    def shared(self) -> list[tuple[Level, dict[str, Any], Tensor]]:
        """Each level, its param group, and the tensor in it."""
        groups = [group for group in self.param_groups if "level" in group]
        return [(self.levels[group["level"]], group, group["params"][0]) for group in groups]

    def finest(self) -> list[Level]:
        """The levels that have single entries below them."""
        above = {id(level.above) for level in self.levels}
        return [level for level in self.levels if id(level) not in above]


@torch.no_grad()
def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    if any(value is not None for value in (*args[1:], *kwargs.values())):
        raise TypeError("step() got a closure, and levels need the gradients before: compute them first, then call step()")
    for level, _, values in optimizer.shared():
        grads = [leaf.grad if leaf.requires_grad else None for leaf in level.leaves]
        values.data = values.data.to(level.zeros())  # the leaves may have been moved or cast since
        values.grad = None if all(grad is None for grad in grads) else level.sums(grads).to(values)
    optimizer._old = {leaf: leaf.detach().clone() for level in optimizer.finest() for leaf in level.leaves}


@torch.no_grad()
def _after(optimizer: Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    groups = {leaf: group for group in optimizer.param_groups for leaf in group["params"]}
    old, done = optimizer._old, {leaf: _steps(optimizer, leaf) for leaf in optimizer._old}
    for level in optimizer.finest():
        before = [old[leaf] for leaf in level.leaves]
        moves = level.differences([leaf - was for leaf, was in zip(level.leaves, before, strict=True)])
        for leaf, was, move, offset in zip(level.leaves, before, moves, level.differences(before), strict=True):
            if leaf.grad is not None and leaf in groups:
                fall = _fallen(groups[leaf], done[leaf])
                pull = min(fall * groups[leaf]["lr"] * groups[leaf].get("pull", 0.0), 1.0)  # 1 takes it to the mean
                leaf.copy_(was + fall * move - pull * offset)
    for level, group, values in optimizer.shared():
        fall = _fallen(group, max(_steps(optimizer, values), *(done[leaf] for leaf in level.leaves)))
        for leaf, step in zip(level.leaves, level.steps(fall * values), strict=True):
            if leaf.requires_grad:
                leaf.add_(step)
        values.zero_()
        values.grad = None
    optimizer._old = {}


def _steps(optimizer: Optimizer, leaf: Tensor) -> float:
    """How many steps Adam has taken with this tensor."""
    return float(optimizer.state[leaf].get("step", 0.0)) if leaf in optimizer.state else 0.0


def _fallen(group: Mapping[str, Any], steps: float) -> float:
    """1/√(1 + t/h) in the step after t others, of a group with ``fall_after``; else 1."""
    return (1 + max(steps - 1, 0.0) / group["fall_after"]) ** -0.5 if "fall_after" in group else 1.0


def checked_levels(
    levels: Sequence[Mapping[str, Tensor]], leaves: Mapping[str, Tensor], kinds: Mapping[str, object]
) -> list[dict[str, Tensor]]:
    """The levels of hyperparameters by name, numbered without gaps.

    Raises:
        TypeError: a level is no tensor of whole numbers.
        KeyError: a name is that of no leaf.
        ValueError: there are more than two dicts, a level has negative numbers, does not fit its leaf or is shared by
            several kinds, or those of the second dict are not within those of the first.
    """
    if len(levels) > 2:
        raise ValueError(f"levels has {len(levels)} dicts: give at most two, the coarser one first")
    for level in levels:
        for name, index in level.items():
            _check_index(name, index, leaves[name].shape)
        if len({id(kinds[name]) for name in level}) > 1:
            raise ValueError(f"a level is shared by {', '.join(level)}, of several kinds: give a level to one kind each")
    if len(levels) == 2:
        _check_nested(*levels)
    return [renumbered(level) for level in levels]


def _check_index(name: str, index: object, shape: torch.Size) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex() or index.dtype is torch.bool:
        raise TypeError(f"the level of {name!r} is {describe_type(index)}: give a tensor of whole numbers from 0")
    fits = index.ndim <= len(shape) and all(n in (1, m) for n, m in zip(index.shape[::-1], shape[::-1], strict=False))
    if not fits or bool((index < 0).any()):
        raise ValueError(
            f"the level of {name!r} has shape {tuple(index.shape)} or negative numbers: give whole numbers from 0, of a "
            f"shape that broadcasts to {tuple(shape)}"
        )


def _check_nested(coarse: Mapping[str, Tensor], fine: Mapping[str, Tensor]) -> None:
    if coarse.keys() != fine.keys():
        raise ValueError(f"the second dict of levels names {', '.join(fine)}, the first {', '.join(coarse)}: give the same")
    both = [torch.stack(torch.broadcast_tensors(fine[name].long(), coarse[name].long())).reshape(2, -1) for name in fine]
    pairs = torch.cat(both, dim=1).unique(dim=1)
    if len(pairs[0].unique()) < pairs.shape[1]:
        raise ValueError("levels of the second dict of levels are not within one of the first: give the coarser one first")


def renumbered(level: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same levels, numbered without gaps."""
    _, numbers = torch.cat([index.flatten().cpu().long() for index in level.values()]).unique(return_inverse=True)
    parts = numbers.split([index.numel() for index in level.values()])
    return {name: part.reshape(index.shape) for (name, index), part in zip(level.items(), parts, strict=True)}
