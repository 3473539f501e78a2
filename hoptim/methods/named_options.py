"""Options of the inner optimizer that are made hyperparameters by name, in the run that learns them and in a retraining."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn, optim
from torch.distributions.transforms import identity_transform

from hoptim.methods.learned_options import LearnedOption, find_learned_options, restarted
from hoptim.problem.hyperparameters import transforms_of
from hoptim.validation import describe_type

# What torch's schedulers add to a group whose option they set.
SCHEDULED_BY = {"lr": "initial_lr", "momentum": "max_momentum", "betas": "max_momentum"}


def bind_by_name(inner: optim.Optimizer, options: Mapping[str, Any], hparams: nn.Module) -> list[LearnedOption]:
    """Put hyperparameters in place of options of ``inner``, as if it had been built with them; returns all learned options.

    Args:
        inner: the optimizer.
        options: the name of the hyperparameter by that of the option, such as ``{"lr": "rate"}``; for a pair such as betas a
            tuple of two, one of which may be ``None``; or a list with a name for each parameter group, ``None`` for none.
        hparams: the hyperparameters.

    Raises:
        TypeError: a name is no ``str``.
        ValueError: there is no such option or hyperparameter, it has several numbers, the list has the wrong length, or a
            scheduler sets the option already; or as in :func:`find_learned_options`.

    >>> import torch
    >>> from torch.distributions import constraints
    >>> from hoptim.problem.hyperparameters import HyperParameters
    >>> hparams = HyperParameters({"rate": torch.tensor(0.25)}, {"rate": constraints.positive})
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> [(option.name, option.key) for option in bind_by_name(inner, {"lr": "rate"}, hparams)]
    [('rate', 'lr')]
    >>> inner.param_groups[0]["lr"].item()
    0.25
    """
    transforms, groups = transforms_of(hparams), inner.param_groups
    leaves = {name: leaf for name, leaf in hparams.named_parameters() if leaf.requires_grad}
    before = [dict(group) for group in groups]

    def value(key: str, name: Any, present: Any) -> Any:
        if name is None:
            return present
        if isinstance(name, tuple):
            if not isinstance(present, (tuple, list)) or len(present) != len(name):
                raise ValueError(f"options gives {key} the pair {name}, and it is {present!r}: give one name")
            return tuple(value(key, one, now) for one, now in zip(name, present, strict=True))
        if not isinstance(name, str):
            raise TypeError(f"options gives {key} {describe_type(name)}: give the name of a hyperparameter")
        if name not in leaves or leaves[name].numel() != 1:
            wrong = "is no hyperparameter that is learned" if name not in leaves else f"has {leaves[name].numel()} numbers"
            fitting = [name for name, leaf in leaves.items() if leaf.numel() == 1]
            raise ValueError(f"options gives {key} {name!r}, which {wrong}: give one of {fitting}, of one number each")
        transform = transforms.get(name, identity_transform)
        return leaves[name] if transform is identity_transform else transform(leaves[name])

    for key, names in options.items():
        if key not in inner.defaults:
            raise ValueError(f"options has {key!r}, and {type(inner).__name__} has only {', '.join(inner.defaults)}")
        if isinstance(names, list) and len(names) != len(groups):
            raise ValueError(f"options gives {key} {len(names)} names, and there are {len(groups)} parameter groups")
        for group, name in zip(groups, _in_groups(names, len(groups)), strict=True):
            _check_unscheduled(inner, group, key, name)
            group[key] = value(key, name, group[key])
        if not isinstance(names, list):
            inner.defaults[key] = groups[0][key]  # for groups that are added later
    found = find_learned_options(inner, hparams)
    return [o._replace(script=_number(o.present(before[o.group]))) if o.key in options else o for o in found]


def _in_groups(names: Any, groups: int) -> list[Any]:
    return names if isinstance(names, list) else [names] * groups


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad)
    return float(value) if plain else None


def _check_unscheduled(inner: optim.Optimizer, group: Mapping[str, Any], key: str, name: Any) -> None:
    """Raise ``ValueError`` if a scheduler sets this option, of a pair the first member."""
    first = name[0] if isinstance(name, tuple) and name else name
    if first is not None and SCHEDULED_BY.get(key, key + " is not scheduled") in group:
        raise ValueError(
            f"options gives {key} {first!r}, and a scheduler was built on this {type(inner).__name__} before: it would go "
            f"on from its own numbers, whatever {first!r} is. Build it after the BilevelOptimizer, and on that"
        )


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a retraining has to know of the options that were learned.

    Attributes:
        kind: the class of the inner optimizer.
        groups: the number of its parameter groups, at first.
        options: the options, with their starts.
    """

    kind: type[optim.Optimizer]
    groups: int
    options: tuple[LearnedOption, ...]

    @classmethod
    def of(cls, inner: optim.Optimizer, options: Iterable[LearnedOption]) -> Learned:
        """The options of ``inner``, without their tensors."""
        return cls(kind=type(inner), groups=len(inner.param_groups), options=tuple(o._replace(value=None) for o in options))

    def restarted(self, saved: Iterable[Sequence[Any]]) -> Learned:
        """The same with starts that were saved."""
        return replace(self, options=tuple(restarted(self.options, saved)))


def named_again(
    learned: Learned | None, inner: optim.Optimizer, options: Mapping[str, Any], hparams: nn.Module
) -> dict[str, Any]:
    """``options`` with the names of all that was learned, for a new ``inner``; a key with ``None`` is left to it.

    Raises:
        ValueError: ``inner`` is of another class or has another number of groups; it, or ``options``, has another
            hyperparameter in the place of one that was learned.
    """
    wanted = [o for o in learned.options if options.get(o.key, o.key) is not None] if learned is not None else []
    if learned is None or not wanted:
        return dict(options)
    name, key, count = wanted[0].name, wanted[0].key, len(inner.param_groups)
    if (type(inner), count) != (learned.kind, learned.groups):
        raise ValueError(
            f"{name!r} was learned as the {key} of {learned.kind.__name__} with {learned.groups} parameter groups, and "
            f"inner makes {type(inner).__name__} with {count}: make it as it was, or give options={{{key!r}: None}} for the "
            "number that inner has itself"
        )
    again: dict[str, list[Any]] = {key: [None] * count for key in dict.fromkeys(o.key for o in wanted)}
    for option in wanted:
        names = again[option.key]
        if option.member is None:
            names[option.group] = option.name
        else:
            pair = names[option.group] or (None,) * len(inner.param_groups[option.group][option.key])
            names[option.group] = tuple(option.name if n == option.member else one for n, one in enumerate(pair))
    there = {(o.group, o.key, o.member): o.name for o in find_learned_options(inner, hparams)}
    for o in wanted:
        given = _in_groups(options[o.key], count) if o.key in options else again[o.key]
        if given != again[o.key] or there.get((o.group, o.key, o.member), o.name) != o.name:
            raise ValueError(
                f"the {o.key} was learned as {again[o.key]}, for each parameter group, and retrain is to take other "
                f"hyperparameters for it: name the same, or give options={{{o.key!r}: None}} for the number of inner"
            )
    for key, names in again.items():
        is_default = all(o.is_default for o in wanted if o.key == key) and all(one == names[0] for one in names)
        again[key] = names[0] if is_default else names
    return {**options, **again}
