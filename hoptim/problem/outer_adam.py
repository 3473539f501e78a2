"""outer_adam: one Adam for all hyperparameters, with the rates and levels that each module in them asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hoptim.problem.level_adam import Level, LevelAdam
from hoptim.problem.outer_rates import LOGARITHM, PULL, check_validation


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
