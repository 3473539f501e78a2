"""outer_adam: one Adam for all hyperparameters, with the rates and levels that each module in them asks for.

The rates of a leaf come from the map that takes it to its value, as the study of defaults found them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, ExpTransform, SigmoidTransform, Transform

from hoptim.checks import is_whole
from hoptim.problem.constraint import is_nonnegative
from hoptim.problem.level_adam import Level, LevelAdam

VALIDATION = 200  # how many validation examples there are, if nobody says
PULL = 100  # an offset of 1 is drawn to its level as much as Adam moves it, if there are as many validation examples


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The options of Adam for leaves of one kind.

    Attributes:
        alone: the rate of a leaf that shares no level, from scripts/studies/defaults.
        levels: the options of levels, the coarser one first, from scripts/studies/one_training.
        entries: those of leaves that share levels.
        is_drawn: whether the entries of a tensor are drawn to their mean.
    """

    alone: float
    levels: tuple[Mapping[str, Any], Mapping[str, Any]]
    entries: Mapping[str, Any]
    is_drawn: bool = False

    @classmethod
    def steady(cls, lr: float) -> Rates:
        """One rate for levels and entries."""
        return cls(alone=lr, levels=({"lr": lr}, {"lr": lr}), entries={"lr": lr})

    def of_entries(self, validation: int, count: int) -> dict[str, Any]:
        """The options of a leaf of ``count`` entries that shares levels, for so many validation examples."""
        return {**self.entries, **({"pull": PULL / validation} if self.is_drawn and count > 1 else {})}


_FALLING = {"eps": 1e-12, "fall_after": 2.0}  # the gradients of 10,000 decays are of the size of Adam's usual eps
LOGARITHM = Rates(
    alone=0.05,
    levels=({"lr": 0.6, "betas": (0.5, 0.9), **_FALLING}, {"lr": 0.2, "betas": (0.5, 0.9), **_FALLING}),
    entries={"lr": 0.1, "betas": (0.9, 0.99), **_FALLING},
    is_drawn=True,
)
LOGISTIC, PROJECTED, FREE = Rates.steady(0.3), Rates.steady(0.01), Rates.steady(0.1)


def check_validation(validation: object) -> None:
    """Raise ValueError unless it is a positive whole number."""
    if not (is_whole(validation) and validation >= 1):  # type: ignore[operator]
        raise ValueError(f"validation is {validation!r}: give the number of validation examples")


def rates_of(constraint: Constraint, transform: Transform) -> Rates:
    """The rates of a leaf, by the first map on the way from it to the value; ``FREE`` for maps that were not studied."""
    if is_nonnegative(constraint):
        return PROJECTED
    parts = transform.parts if isinstance(transform, ComposeTransform) else [transform]
    first = type(parts[0]) if parts else type(transform)  # the identity has no parts
    return {ExpTransform: LOGARITHM, SigmoidTransform: LOGISTIC}.get(first, FREE)


def outer_adam(hparams: nn.Module, lr: float | None = None, *, validation: int | None = None) -> torch.optim.Optimizer:
    """The outer optimizer of any module: its own ``optimizer()``, or Adam as each module in it that has one says.

    Args:
        hparams: a :class:`HyperParameters`, a module of several of them, or any other, whose leaves have the rate 0.05.
        lr: one rate for all leaves instead, without levels; default ``None``.
        validation: how many validation examples there are, as for :meth:`HyperParameters.optimizer`; default: as there.

    Raises:
        TypeError: the ``optimizer()`` of one of several modules makes another optimizer than Adam.

    >>> from hoptim.recipes import LabelSmoothing, WeightDecay
    >>> hparams = nn.ModuleDict({"decay": WeightDecay(nn.Linear(2, 3), per="weight"), "smoothing": LabelSmoothing()})
    >>> [group["lr"] for group in outer_adam(hparams).param_groups]                       # entries, smoothing, their level
    [0.1, 0.3, 0.6]
    """
    if lr is not None:
        return torch.optim.Adam(hparams.parameters(), lr=lr)
    own = _optimizer_of(hparams)
    outer = joined(hparams, {}, []) if own is None else own()
    for group in outer.param_groups:
        if "pull" in group and validation is not None:
            check_validation(validation)
            group["pull"] = PULL / validation
    return outer


def joined(hparams: nn.Module, options: Mapping[int, Mapping[str, Any]], levels: Sequence[Level]) -> torch.optim.Adam:
    """Adam with these options, by the ids of leaves; for others as the outermost module inside with ``optimizer()`` says.

    The options that come first hold, and the levels of a module whose leaves have none yet.
    """
    shared, usual = list(levels), usual_options()
    for path, module in hparams.named_modules():
        own = _optimizer_of(module)
        if not path or own is None:
            continue
        found = own()
        if not isinstance(found, torch.optim.Adam):
            raise TypeError(
                f"{path}.optimizer() returns {type(found).__name__}, and all hyperparameters share an Adam: give outer"
            )
        of_levels = getattr(found, "levels", ())
        shared += [level for level in of_levels if not any(id(leaf) in options for leaf, _ in level.members)]
        for group in found.param_groups:
            chosen = {key: value for key, value in group.items() if key != "params"}
            options = {**{id(leaf): chosen for leaf in group["params"]}, **options}
    groups: dict[frozenset[tuple[str, Any]], list[nn.Parameter]] = {}
    for leaf in hparams.parameters():
        groups.setdefault(frozenset(options.get(id(leaf), usual).items()), []).append(leaf)
    merged = [{**dict(chosen), "params": leaves} for chosen, leaves in groups.items()]
    return LevelAdam(merged, shared) if shared else torch.optim.Adam(merged)


def usual_options() -> dict[str, Any]:
    """The options of a leaf of which nothing is known."""
    return torch.optim.Adam([torch.zeros(())], lr=LOGARITHM.alone).defaults


def _optimizer_of(module: Any) -> Callable[[], torch.optim.Optimizer] | None:
    """The method ``optimizer`` of a module's class, if it has one; a child or a parameter may have this name too."""
    return module.optimizer if callable(getattr(type(module), "optimizer", None)) else None
