"""HyperParameters: named tensors with constraints, moved by an outer optimizer on their unconstrained leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from hoptim.problem.constraint import bijection, described, is_nonnegative, to_leaf
from hoptim.problem.level_adam import Level, checked_levels, renumbered
from hoptim.problem.outer_adam import VALIDATION, Rates, check_validation, joined, rates_of, usual_options

SHOWN = 5  # names that an error lists


class HyperParameters(nn.Module):
    """Named hyperparameter tensors, each kept inside its constraint.

    ``hparams["name"]`` is the natural value λ = t(θ). The unconstrained leaf θ is a parameter of that name, which the
    outer optimizer moves freely. The map t is ``torch.distributions.biject_to(constraint)``: ``exp`` for ``positive``,
    the logistic function for ``unit_interval``, and so on. Only ``nonnegative`` is kept by projection: its leaf is the
    value itself, and :meth:`project_` clamps it at zero after each outer step.

    Names with dots nest as in a model: ``"0.weight"`` is the parameter ``weight`` of a child module ``0``. So a
    hyperparameter may have the name of its weight, and works with all of torch that takes names of parameters, such as
    ``torch.func.functional_call``. An attribute is the leaf, as in every module: ``hparams.weight_decay`` is θ, not λ.

    In a :class:`Problem` without a ``val_loss`` the loss runs in evaluation mode too, where only those should act that are
    part of the model: if yours are, set the attribute ``acts_in_evaluation``, or a warning asks for it.

    Args:
        values: initial natural values by name, of any shapes, floating point. The tensors are copied.
        constraints: constraints of ``torch.distributions.constraints`` by name; ``real`` for a name without one.
        levels: what moves together as well as by itself under :meth:`optimizer`: up to two dicts of whole numbers by name,
            the coarser one first, which broadcast to the shapes of the values. Entries with the same number in a dict share
            a level: ``[{"decay": torch.tensor(0)}]`` is one for all of ``decay``, with ``torch.arange(9)[:, None]`` each of
            its nine rows has its own. Default: none.

    Raises:
        TypeError: a value is no floating-point tensor.
        ValueError: a constraint has no value, a value lies outside its constraint, on its edge or nearer to it than its
            precision allows; a state is loaded that was saved under another constraint.
        KeyError: a module can't have a parameter of that name: ``"training"``, ``"keys"``, ``"a..b"``, ``"a"`` beside
            ``"a.b"``.
        NotImplementedError: torch has no map onto a constraint.

    >>> from torch.distributions import constraints
    >>> hparams = HyperParameters({"weight_decay": torch.full((2,), 0.5)}, {"weight_decay": constraints.positive})
    >>> hparams["weight_decay"].detach()
    tensor([0.5000, 0.5000])
    >>> [(name, leaf.tolist()) for name, leaf in hparams.named_parameters()]
    [('weight_decay', [-0.693..., -0.693...])]
    >>> hparams["weight_decay"] = torch.ones(2)                      # writes the leaf in place
    >>> hparams.weight_decay.tolist()
    [0.0, 0.0]
    """

    _levels: Sequence[Mapping[str, Tensor]] = ()
    acts_in_evaluation = False
    outer_rate: float | None = None  # of a kind of hyperparameters whose leaves need another one than their constraints say

    def __init__(
        self,
        values: Mapping[str, Tensor],
        constraints: Mapping[str, Constraint] | None = None,
        levels: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        super().__init__()
        given = dict(constraints or {})
        if strangers := sorted(set(given) - set(values)):
            raise ValueError(f"constraints name {strangers}, which are no values: the values are {sorted(values)}")
        self._constraints: dict[str, Constraint] = {}
        self._transforms: dict[str, Transform] = {}
        for name, value in values.items():
            constraint, transform = bijection(given.get(name))
            self._add(name, nn.Parameter(to_leaf(name, value, constraint, transform)))
            self._constraints[name], self._transforms[name] = constraint, transform
        self._levels = checked_levels(levels, {name: self._leaf(name) for name in self}, self._rates())

    def _add(self, name: str, leaf: nn.Parameter) -> None:
        *groups, last = name.split(".")
        module: Any = self
        for group in groups:
            if group not in module._modules:
                module.add_module(group, _Group())
            module = module._modules[group]
        module.register_parameter(last, leaf)

    def _leaf(self, name: str) -> nn.Parameter:
        if name not in self:
            raise KeyError(_unknown(name, list(self)))
        *groups, last = name.split(".")
        module: Any = self
        for group in groups:
            module = module._modules[group]
        return module._parameters[last]

    def forward(self, name: str) -> Tensor:
        """``hparams[name]``, so that ``torch.func.functional_call(hparams, leaves, name)`` is the value at other leaves."""
        return self[name]

    def __getitem__(self, name: str) -> Tensor:
        leaf = self._leaf(name)
        return self._transforms[name](leaf)

    @torch.no_grad()
    def __setitem__(self, name: str, value: Tensor) -> None:
        shape = self[name].shape
        leaf = to_leaf(name, value, self._constraints[name], self._transforms[name])
        if value.shape != shape:
            raise ValueError(f"hyperparameter {name!r} has shape {tuple(shape)}, the value {tuple(value.shape)}")
        self._leaf(name).copy_(leaf)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if metadata := getattr(destination, "_metadata", None):  # which torch.save keeps, and a load gives back
            metadata[prefix[:-1]]["constraints"] = {name: described(one) for name, one in self._constraints.items()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        there = local_metadata.get("constraints", {})  # safetensors does not keep them
        for name, constraint in self._constraints.items():
            if name in there and there[name] != (here := described(constraint)):
                raise ValueError(
                    f"hyperparameter {prefix + name!r} was saved under {there[name]:.200} and is {here:.200} here, where "
                    "its leaf means another value: give it the constraint that it was saved with, or set its value instead"
                )
            leaf = state_dict.get(prefix + name)
            if is_nonnegative(constraint) and isinstance(leaf, Tensor) and bool((leaf < 0).any()):
                raise ValueError(
                    f"the state of hyperparameter {prefix + name!r} is {float(leaf.min()):.3g}, and it is nonnegative here: "
                    "it was saved under another constraint. Give it that one, or set its value instead"
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def __iter__(self) -> Iterator[str]:
        return iter(self._constraints)

    def __len__(self) -> int:
        return len(self._constraints)

    def __contains__(self, name: object) -> bool:
        return name in self._constraints

    def keys(self) -> list[str]:
        """The names, in the order given; ``dict(hparams)`` uses them and has the natural values."""
        return list(self._constraints)

    def __repr__(self) -> str:
        lines = [f"({name}): {tuple(self[name].shape)} {constraint}" for name, constraint in self._constraints.items()]
        lines += [f"({name}): {child}" for name, child in self._modules.items() if not isinstance(child, _Group)]
        return f"{type(self).__name__}(\n" + indent("\n".join(lines), "  ") + "\n)"

    @property
    def degrees_of_freedom(self) -> int:
        """How many numbers are learned; for a simplex, one fewer than it has values."""
        return sum(leaf.numel() for leaf in self.parameters())

    def optimizer(self, lr: float | None = None, *, validation: int = VALIDATION) -> torch.optim.Adam:
        """An outer optimizer: Adam on the leaves, with a group for each rate, and on the levels that they share.

        A study (scripts/studies/defaults) found these rates for some forty hypersteps: 0.05 for ``positive``, whose leaf is
        a logarithm, 0.3 for ``unit_interval``, 0.1 for ``real`` and 0.01 for ``nonnegative``. Any other constraint
        has the rate of the one of these with the same map, or 0.1. If the leaf is the value itself, as for the last two, the
        rate should be small compared with the value.

        Args:
            lr: one rate for all leaves instead, without levels; default ``None``.
            validation: how many validation examples there are, default 200. The fewer, the more the entries of a tensor are
                drawn to their mean, as :class:`LevelAdam` says, with δ = 100/``validation``: at most they end at a factor of
                e^(``validation``/100) from it, a start that differs more is drawn in, too.

        Raises:
            ValueError: ``validation`` is no positive whole number.

        >>> from torch.distributions import constraints
        >>> kinds = {"decay": constraints.positive, "weight": constraints.unit_interval}
        >>> hparams = HyperParameters({"decay": torch.tensor(0.1), "weight": torch.full((3,), 0.5)}, kinds)
        >>> [group["lr"] for group in hparams.optimizer().param_groups], hparams.optimizer(lr=0.1).param_groups[0]["lr"]
        ([0.05, 0.3], 0.1)
        """
        lr = self.outer_rate if lr is None else lr
        if lr is not None:
            return torch.optim.Adam(self.parameters(), lr=lr)
        check_validation(validation)
        rates, usual = self._rates(), usual_options()
        options: dict[int, dict[str, Any]] = {}
        levels: list[Level] = []
        for name, own in rates.items():
            shares, leaf = any(name in level for level in self._levels), self._leaf(name)
            chosen = own.of_entries(validation, leaf.numel()) if shares else {"lr": own.alone}
            options[id(leaf)] = {**usual, **chosen}
        for depth, level in enumerate(self._levels):
            if free := {name: index for name, index in level.items() if self._leaf(name).requires_grad}:
                members = [(self._leaf(name), index) for name, index in renumbered(free).items()]
                levels.append(Level(members, rates[next(iter(free))].levels[depth], *levels[-1:]))
        return joined(self, options, levels)

    def _rates(self) -> dict[str, Rates]:
        return {name: rates_of(kind, self._transforms[name]) for name, kind in self._constraints.items()}

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp every ``nonnegative`` hyperparameter at zero. ``BilevelOptimizer`` calls it after each outer step."""
        for name, constraint in self._constraints.items():
            if is_nonnegative(constraint):
                self._leaf(name).clamp_(min=0)


def _unknown(name: object, names: list[str]) -> str:
    """The error message for an unknown name, in one line even if there are many names."""
    rest = len(names) - SHOWN
    return f"no hyperparameter {name!r}: the names are {sorted(names)[:SHOWN]}{f' and {rest} more' if rest > 0 else ''}"


class _Group(nn.Module):
    """Holds the hyperparameters whose names have the same part before a dot."""


def transforms_of(hparams: nn.Module) -> dict[str, Transform]:
    """The maps from leaves to natural values, by name of the leaf, for every :class:`HyperParameters` in a module."""
    return {
        f"{prefix}.{name}" if prefix else name: transform
        for prefix, module in hparams.named_modules()
        if isinstance(module, HyperParameters)
        for name, transform in module._transforms.items()
    }
