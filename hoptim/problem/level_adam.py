"""LevelAdam: Adam for many numbers that share a level, so that what is wrong with all of them is corrected at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


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

    def __len__(self) -> int:
        return 1 + max(int(index.max()) for _, index in self.members)

    def sums(self, parts: Sequence[Tensor | None]) -> Tensor:
        """For each level the sum over its entries of these tensors, one for each leaf; ``None`` counts as 0."""
        total = self.members[0][0].new_zeros(len(self))
        for part, (_, index) in zip(parts, self.members, strict=True):
            if part is not None:
                total.index_add_(0, index.flatten().to(total.device), part.sum_to_size(index.shape).flatten().to(total))
        return total

    def spread(self, levels: Tensor) -> list[Tensor]:
        """For each leaf the levels of its entries, of a shape that broadcasts to the leaf's."""
        return [levels[index.to(levels.device)].to(leaf) for leaf, index in self.members]

    def differences(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """These tensors, one for each leaf, without the mean over all entries of the same level."""
        means = self.sums(parts) / self.sums([torch.ones_like(part) for part in parts])
        return [part - mean for part, mean in zip(parts, self.spread(means), strict=True)]

    def siblings(self) -> Level | None:
        """The levels themselves as entries of those above."""
        if self.above is None:
            return None
        index = torch.zeros(len(self), dtype=torch.long)
        for (_, own), (_, above) in zip(self.members, self.above.members, strict=True):
            own, above = torch.broadcast_tensors(own.cpu(), above.cpu())
            index[own.flatten()] = above.flatten()
        return Level([(self.members[0][0].new_zeros(len(self)), index)], {})


class LevelAdam(torch.optim.Adam):
    """Adam for leaves θ whose entries share levels, θ_k = Σ_l level_l(k) + offset_k, at rates that may fall.

    A level has the sum of its entries' gradients, in which their noise averages out, and its own step of Adam, of size u. A
    finer level and the entries themselves move only by what sets them apart from others of the same level, and entries are
    drawn to the mean of theirs:

        step of entry k:  −lr·(u_k − ū + δ·(θ_k − θ̄)),

    where ū and θ̄ are means over the entries of its level. So the levels take the same way with one entry or many, and few
    validation examples, which say little about single entries, leave them together.

    After each step the levels are added to the leaves and are 0 again, so that the leaves are all there is to read, save
    and load. The param groups of the levels come after those of the leaves.

    The rate of a group with ``"fall_after": h`` is lr/√(1 + t/h) after t steps: large at first, as the start may be far off,
    and small later, since weights that follow a level late would make it swing. A group with ``"pull": δ`` has that one.

    Args:
        params: the leaves, or groups of them, as for Adam.
        levels: what shares a level, and the options of each; coarser ones before finer ones.
        **options: those of Adam.

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
        for level in self.levels:
            values = level.members[0][0].new_zeros(len(level))
            self.add_param_group({"params": [values.requires_grad_()], **level.options})
        self._register()

    def _register(self) -> None:
        self.register_step_pre_hook(_before)
        self.register_step_post_hook(_after)
        self.register_load_state_dict_pre_hook(_completed)
        self._old: list[list[Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "levels": self.levels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "levels" in state:  # a copy, which torch makes without hooks
            self._register()

    def shared(self) -> list[tuple[Level, Tensor]]:
        """Each level, and its tensor in the last param groups."""
        groups = self.param_groups[len(self.param_groups) - len(self.levels) :]
        return [(level, group["params"][0]) for level, group in zip(self.levels, groups, strict=True)]

    def finest(self) -> list[Level]:
        """The levels that have single entries below them."""
        above = {id(level.above) for level in self.levels}
        return [level for level in self.levels if id(level) not in above]


@torch.no_grad()
def _before(optimizer: Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    for level, values in optimizer.shared():
        grads = [leaf.grad for leaf, _ in level.members]
        values.grad = None if all(grad is None for grad in grads) else level.sums(grads)
    for group in optimizer.param_groups:
        group["full"] = group.get("full", group["lr"])  # it is there already if the last step raised an error
        group["lr"] = group["full"] * _fallen(group, optimizer.state)
    optimizer._old = [[leaf.detach().clone() for leaf, _ in level.members] for level in optimizer.finest()]


@torch.no_grad()
def _after(optimizer: Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    pulls: dict[Tensor, float] = {}
    for group in optimizer.param_groups:
        pulls |= dict.fromkeys(group["params"], min(group["lr"] * group.get("pull", 0.0), 1.0))  # 1 takes them to the mean
    for level, old in zip(optimizer.finest(), optimizer._old, strict=True):
        leaves = [leaf for leaf, _ in level.members]
        moves = level.differences([leaf - before for leaf, before in zip(leaves, old, strict=True)])
        for leaf, before, move, offset in zip(leaves, old, moves, level.differences(old), strict=True):
            if leaf.grad is not None:
                leaf.copy_(before + move - pulls.get(leaf, 0.0) * offset)
    for level, values in optimizer.shared():
        siblings = level.siblings()
        steps = level.spread(values if siblings is None else siblings.differences([values])[0])
        for member, step in zip(level.members, steps, strict=True):
            member[0].add_(step)
        values.zero_()
        values.grad = None
    for group in optimizer.param_groups:
        group["lr"] = group.pop("full")
    optimizer._old = []


def _fallen(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> float:
    """1/√(1 + t/h) after t steps of a group with ``fall_after``; else 1."""
    steps = max((float(state[leaf].get("step", 0)) for leaf in group["params"] if leaf in state), default=0.0)
    return (1 + steps / group["fall_after"]) ** -0.5 if "fall_after" in group else 1.0


def _completed(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state that was saved by Adam, without levels, gets their groups; they begin anew."""
    own, saved = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    return {**state_dict, "param_groups": [*saved, *own[len(saved) :]]}
