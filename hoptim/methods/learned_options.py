"""Options of the inner optimizer that are hyperparameters, such as a learned rate: the leaf itself, or a view of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, optim

from hoptim.linalg.vectors import Tree

Kind = type[optim.Optimizer]

# The classes whose step torch can differentiate, and the options in which it does; of the others it makes constants.
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
    """In place of an option's value: it is the hyperparameter leaf of this name."""

    name: str


def bind(kind: Kind, group: Mapping[str, Any], key: str, leaves: Tree) -> Any:
    """An option of a parameter group as a constant, copied, or :class:`Bound` to the leaf that it is; of a pair, a pair.

    Raises:
        TypeError: it is a leaf, and one that torch's step makes a constant of.
        ValueError: it is computed from other tensors, is part of a leaf, or a leaf of more than one number.
    """
    if isinstance(group[key], (tuple, list)):
        return tuple(bind(kind, {**group, key: member}, key, leaves) for member in group[key])
    value, option = group[key], f"the {key} of {kind.__name__}"
    if not isinstance(value, Tensor):
        return value
    for name, leaf in leaves.items():
        if not shares_memory(value, leaf):
            continue
        if leaf.numel() != 1:
            raise ValueError(f"{option} is part of {name!r}, of shape {tuple(leaf.shape)}: make it a leaf of one number")
        works = DIFFERENTIABLE[kind] | ({"weight_decay"} if group.get("decoupled_weight_decay") else set())
        works -= {"momentum"} if group.get("nesterov") else set()
        if key not in works:
            raise TypeError(
                f"hyperparameter {name!r} is {option}, in which torch's step has no derivative, given its other options: "
                f"{', '.join(sorted(works)) or 'none'} may be one; SGD, Adam and AdamW have one in lr and weight_decay"
            )
        return Bound(name=name)
    if value.grad_fn is not None:
        raise ValueError(
            f"{option} is computed from other tensors, once and for all: give a leaf of hparams, or detach() it"
        )
    return value.detach().clone()


class LearnedOption(NamedTuple):
    """A hyperparameter's name, the group and the key under which the optimizer has it, and the object that is there."""

    name: str
    group: int
    key: str
    value: Any


def find_learned_options(inner: optim.Optimizer, leaves: Tree) -> list[LearnedOption]:
    """The options of ``inner`` that are leaves, or views of their memory.

    >>> import torch
    >>> lr = torch.nn.Parameter(torch.tensor(0.1))
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=lr)
    >>> [(option.name, option.key) for option in find_learned_options(inner, {"rate": lr})]
    [('rate', 'lr')]
    """
    return [
        LearnedOption(name, number, key, value)
        for number, group in enumerate(inner.param_groups)
        for key, value in group.items()
        if key != "params"
        for member in (value if isinstance(value, (tuple, list)) else (value,))
        if isinstance(member, Tensor)
        for name, leaf in leaves.items()
        if shares_memory(member, leaf)
    ]


def check_in_place(inner: optim.Optimizer, options: Iterable[LearnedOption]) -> None:
    """Raise where another value stands in the place of a learned option, so that it would no longer be learned.

    ``ReduceLROnPlateau`` puts one there before torch 2.10, ``OneCycleLR`` for a momentum, ``inner.load_state_dict`` for all.
    """
    for option in options:
        now = inner.param_groups[option.group].get(option.key)
        if now is not option.value:
            raise ValueError(
                f"hyperparameter {option.name!r} was the inner optimizer's {option.key}, which is now {now!r}: something "
                "replaced it, perhaps a scheduler. Do without it, build the scheduler on optimizer.outer, or give the "
                f"inner optimizer a number as its {option.key}"
            )


def put_back(inner: optim.Optimizer, options: Iterable[LearnedOption]) -> None:
    """Give ``inner`` its learned options back, after a state was loaded into it."""
    for option in options:
        inner.param_groups[option.group][option.key] = option.value


def check_unscheduled(groups: Iterable[Mapping[str, Any]], leaves: Tree) -> None:
    """Raise where the learning rate of one of these groups, which a scheduler sets, is a hyperparameter."""
    rates = [group["lr"] for group in groups if isinstance(group.get("lr"), Tensor)]
    if learned := [name for name, leaf in leaves.items() for rate in rates if shares_memory(rate, leaf)]:
        raise ValueError(
            f"hyperparameter {learned[0]!r} is the inner optimizer's lr, and a scheduler would write over what is learned: "
            "do without one, build it on optimizer.outer, or give the inner optimizer a number as its lr"
        )


def shares_memory(x: Tensor, leaf: Tensor) -> bool:
    """Whether ``x`` is ``leaf``, or a view that begins within its memory."""
    start = leaf.data_ptr()
    inside = x.device == leaf.device and start != 0 and start <= x.data_ptr() < start + leaf.numel() * leaf.element_size()
    return x is leaf or inside
