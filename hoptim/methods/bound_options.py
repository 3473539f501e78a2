"""Options of an inner step as a pure function: each is a constant, or computed from a hyperparameter leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim
from torch.distributions.transforms import Transform

from hoptim.linalg.vectors import Tree
from hoptim.methods.learned_options import COMPUTED, LearnedOption, shares_memory

Kind = type[optim.Optimizer]

# The classes whose step torch can differentiate, and the options with a derivative; the others are constants in torch.
DIFFERENTIABLE: dict[Kind, frozenset[str]] = {
    optim.SGD: frozenset({"lr", "momentum", "weight_decay"}),
    optim.Adam: frozenset({"lr", "betas", "eps", "weight_decay"}),
    optim.AdamW: frozenset({"lr", "betas", "eps", "weight_decay"}),
    optim.NAdam: frozenset({"lr", "eps", "momentum_decay"}),
    optim.RAdam: frozenset({"lr", "eps"}),
    optim.Adamax: frozenset({"eps"}),
    optim.RMSprop: frozenset({"eps", "momentum"}),
    optim.Adagrad: frozenset({"eps"}),
    optim.Adadelta: frozenset({"eps"}),
    optim.Rprop: frozenset(),
    optim.ASGD: frozenset(),
}


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Stands for an option that is the leaf of this name, or number · transform(leaf) / start."""

    name: str
    transform: Transform | None = None
    number: float = 1.0
    start: float = 1.0

    def value(self, leaves: Tree) -> Tensor:
        """The option as a tensor of one number."""
        leaf = leaves[self.name]
        if self.transform is None:
            return leaf.reshape(())
        wide = torch.float32 if leaf.device.type == "mps" else torch.float64  # as precise as in the real step
        natural = self.transform(leaf).reshape(()).to(wide)
        # At the start it is the number itself, bit for bit, as in the real step.
        return torch.where(natural == self.start, self.number * (natural / self.start), self.number / self.start * natural)


def bind(kind: Kind, number: int, group: Mapping[str, Any], key: str, leaves: Tree, learned: Sequence[LearnedOption]) -> Any:
    """An option of parameter group ``number``: a copied constant, or :class:`Bound` to its leaf; for a pair, a pair.

    Raises:
        TypeError: it is learned, but torch's step has no derivative in it.
        ValueError: it is computed from other tensors, is part of a leaf, or a leaf of more than one number.
    """
    place = (number, key)
    computed = {option.member: option for option in learned if option.transform and (option.group, option.key) == place}

    def bound(value: Any, member: int | None) -> Any:
        if member in computed:
            option = computed[member]
            check_differentiable(kind, group, key, f"hyperparameter {option.name!r}")
            number, start = option.scale(group)
            return Bound(name=option.name, transform=option.transform, number=number, start=start)
        if not isinstance(value, Tensor):
            return value
        for name, leaf in leaves.items():
            if not shares_memory(value, leaf):
                continue
            if leaf.numel() != 1:
                shape = tuple(leaf.shape)
                raise ValueError(
                    f"the {key} of {kind.__name__} is part of {name!r}, of shape {shape}: make it a leaf of one number"
                )
            check_differentiable(kind, group, key, f"hyperparameter {name!r}")
            return Bound(name=name)
        if value.grad_fn is not None:
            raise ValueError(COMPUTED.format(option=f"the {key} of {kind.__name__}"))
        return value.detach().clone()

    if isinstance(group[key], (tuple, list)):
        return tuple(bound(value, member) for member, value in enumerate(group[key]))
    return bound(group[key], None)


def check_differentiable(kind: Kind, group: Mapping[str, Any], key: str, what: str) -> None:
    """Raise ``TypeError`` unless the step of this class has a derivative in option ``key`` of the group, called ``what``."""
    works = DIFFERENTIABLE[kind] | ({"weight_decay"} if group.get("decoupled_weight_decay") else set())
    works -= {"momentum"} if group.get("nesterov") else set()
    if key not in works:
        raise TypeError(
            f"{what} is the {key} of {kind.__name__}, in which torch's step has no derivative, given its "
            f"other options: {', '.join(sorted(works)) or 'none'} may be one; SGD, Adam and AdamW have one in lr and "
            "weight_decay"
        )
