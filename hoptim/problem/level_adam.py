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
    """

    members: Sequence[tuple[Tensor, Tensor]]
    options: Mapping[str, Any]

    def zeros(self) -> Tensor:
        """The levels, all 0."""
        return self.members[0][0].new_zeros(1 + max(int(index.max()) for _, index in self.members))

    def gathered(self, like: Tensor) -> Tensor | None:
        """The sum of the gradients of each level's entries; ``None`` if no entry has one."""
        found = [(leaf.grad, index) for leaf, index in self.members if leaf.grad is not None]
        total = torch.zeros_like(like)
        for grad, index in found:
            own = grad.sum_to_size(index.shape).flatten().to(total)
            total.index_add_(0, index.flatten().to(total.device), own)
        return total if found else None

    def spread(self, levels: Tensor) -> None:
        """Add to each entry its level."""
        for leaf, index in self.members:
            leaf.add_(levels[index.to(levels.device)].to(leaf))


class LevelAdam(torch.optim.Adam):
    """Adam for leaves θ whose entries share levels, θ_k = Σ_l level_l(k) + offset_k, at rates that may fall.

    A level has the sum of its entries' gradients, in which their noise averages out, and its own step of Adam; so do the
    offsets, whose gradients are those of the entries. After each step the levels are added to the leaves and are 0 again, so
    that the leaves are all there is to read, save and load. The param groups of the levels come after those of the leaves.

    The rate of a group with ``"fall_after": h`` is lr/√(1 + t/h) after t steps: large at first, as the start may be far off,
    and small later, since weights that follow a level late would make it swing.

    Args:
        params: the leaves, or groups of them, as for Adam.
        levels: what shares a level, and the options of each.
        **options: those of Adam.

    Source: the non-centred parametrisation of hierarchical models: Papaspiliopoulos, Roberts and Sköld 2007, A general
        framework for the parametrization of hierarchical models, with Adam as the rule.

    >>> leaf = torch.zeros(3, requires_grad=True)
    >>> one_for_all = Level([(leaf, torch.tensor([0]))], {"lr": 0.2})
    >>> optimizer = LevelAdam([leaf], [one_for_all], lr=0.05)
    >>> leaf.grad = torch.tensor([3.0, 2.0, -1.0])                       # the sum is positive, the third entry is not
    >>> optimizer.step()
    >>> leaf.detach()
    tensor([-0.2500, -0.2500, -0.1500])
    """

    levels: list[Level]

    def __init__(self, params: Iterable[Any], levels: Iterable[Level] = (), **options: Any) -> None:
        super().__init__(params, **options)
        self.levels = list(levels)
        for level in self.levels:
            self.add_param_group({"params": [level.zeros().requires_grad_()], **level.options})
        self._register()

    def _register(self) -> None:
        self.register_step_pre_hook(_before)
        self.register_step_post_hook(_after)
        self.register_load_state_dict_pre_hook(_completed)

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


def _before(optimizer: Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    for level, values in optimizer.shared():
        values.grad = level.gathered(values)
    for group in optimizer.param_groups:
        group["full"] = group.get("full", group["lr"])  # it is there already if the last step raised an error
        group["lr"] = group["full"] * _fallen(group, optimizer.state)


@torch.no_grad()
def _after(optimizer: Optimizer, *_: Any) -> None:
    assert isinstance(optimizer, LevelAdam)
    for group in optimizer.param_groups:
        group["lr"] = group.pop("full")
    for level, values in optimizer.shared():
        level.spread(values)
        values.zero_()
        values.grad = None


def _fallen(group: Mapping[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> float:
    """1/√(1 + t/h) after t steps of a group with ``fall_after``; else 1."""
    steps = max((float(state[leaf].get("step", 0)) for leaf in group["params"] if leaf in state), default=0.0)
    return (1 + steps / group["fall_after"]) ** -0.5 if "fall_after" in group else 1.0


def _completed(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state that was saved by Adam, without levels, gets their groups; they begin anew."""
    own, saved = optimizer.state_dict()["param_groups"], state_dict["param_groups"]
    return {**state_dict, "param_groups": [*saved, *own[len(saved) :]]}
