"""HyperParameters: named tensors with constraints, moved by an outer optimizer on their unconstrained leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, Transform, identity_transform

from hoptim.validation import describe_type


class HyperParameters(nn.Module):
    """Named hyperparameter tensors, each kept inside its constraint.

    ``hparams["name"]`` is the natural value λ = t(θ); ``hparams.parameters()`` are the unconstrained leaves θ, which the
    outer optimizer moves freely. The map t is ``torch.distributions.biject_to(constraint)``: ``exp`` for ``positive``,
    the logistic function for ``unit_interval``, and so on. ``nonnegative`` alone is kept by projection: there the leaf is
    the value itself, and :meth:`project_` clamps it at zero after each outer step.

    Args:
        values: initial natural values by name, any shapes, floating point. Names may hold dots, so that a hyperparameter
            for a weight may be named as the weight. The tensors are copied.
        constraints: a constraint of ``torch.distributions.constraints`` by name; ``real`` where none is given.

    Raises:
        TypeError: a value is no floating-point tensor, a name no ``str``, or a constraint no ``Constraint``.
        ValueError: there is no value, a constraint names no value, or a value lies outside its constraint or on its edge.

    >>> from torch.distributions import constraints
    >>> hparams = HyperParameters({"weight_decay": torch.full((2,), 0.5)}, {"weight_decay": constraints.positive})
    >>> hparams["weight_decay"].detach()
    tensor([0.5000, 0.5000])
    >>> [(name, leaf.tolist()) for name, leaf in hparams.named_parameters()]
    [('weight_decay', [-0.693..., -0.693...])]
    >>> hparams["weight_decay"] = torch.ones(2)                      # writes the leaf in place
    >>> next(hparams.parameters()).tolist()
    [0.0, 0.0]
    """

    def __init__(self, values: Mapping[str, Tensor], constraints: Mapping[str, Constraint] | None = None) -> None:
        super().__init__()
        if not isinstance(values, Mapping):
            raise TypeError(f"values is {describe_type(values)}: give a dict of named tensors")
        if not isinstance(constraints, Mapping | None):
            raise TypeError(
                f"constraints is {describe_type(constraints)}: give a dict of constraints by the names of the values"
            )
        given = dict(constraints or {})
        if not values:
            raise ValueError("HyperParameters got no values: give at least one named tensor to learn")
        if strangers := sorted(set(given) - set(values)):
            raise ValueError(f"constraints name {strangers}, which are no values: the values are {sorted(values)}")
        self._names = {name: _safe(name) for name in values}
        self._transforms: dict[str, Transform] = {}
        self._constraints: dict[str, Constraint] = {}
        for name, value in values.items():
            constraint, transform = _constraint(name, given.get(name))
            leaf = _leaf(name, value, constraint, transform)
            self._constraints[name], self._transforms[name] = constraint, transform
            self.register_parameter(self._names[name], nn.Parameter(leaf))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(f"no hyperparameter {name!r}: the names are {sorted(self._names)}")
        leaf = self._parameters[self._names[name]]
        assert leaf is not None
        transform = self._transforms[name]
        return leaf if _is_identity(transform) else transform(leaf)

    @torch.no_grad()
    def __setitem__(self, name: str, value: Tensor) -> None:
        old = self[name]
        new = _leaf(name, value, self._constraints[name], self._transforms[name])
        if value.shape != old.shape:
            raise ValueError(f"hyperparameter {name!r} has shape {tuple(old.shape)}, the value {tuple(value.shape)}")
        self.get_parameter(self._names[name]).copy_(new)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_names", ()):
            raise AttributeError(f"{name!r} is a hyperparameter, not an attribute: take hparams[{name!r}]")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_names", ()) and name not in self.__dict__ and not hasattr(type(self), name):
            raise AttributeError(f"{name!r} is a hyperparameter, not an attribute: write hparams[{name!r}] = value")
        super().__setattr__(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def keys(self) -> list[str]:
        """The names, in the order given. With ``hparams[name]`` it makes ``dict(hparams)`` the natural values."""
        return list(self._names)

    def extra_repr(self) -> str:
        """One line for each hyperparameter: name, shape and constraint."""
        shapes = {name: tuple(leaf.shape) for name, leaf in self.named_parameters()}
        return "\n".join(f"({name}): {shapes[name]} {self._constraints[name]}" for name in self)

    @torch.no_grad()
    def project_(self) -> None:
        """Clamp every ``nonnegative`` hyperparameter at zero. ``BilevelOptimizer`` calls it after each outer step."""
        for name, constraint in self._constraints.items():
            if _is_nonnegative(constraint):
                self.get_parameter(self._names[name]).clamp_(min=0)

    # Names with dots, or such as `training`, can't be attributes of a module. The leaves are stored under safe names,
    # and the three methods by which the outside sees names give back the user's own.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The unconstrained leaves, by the user's names."""
        original = {safe: name for name, safe in self._names.items()}
        for safe, leaf in super().named_parameters("", recurse, remove_duplicate):
            yield (prefix + "." if prefix else "") + original.get(safe, safe), leaf

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, safe in self._names.items():
            destination[prefix + name] = destination.pop(prefix + safe)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        ours = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        safe = {prefix + self._names.get(name, name): value for name, value in ours.items()}
        missing: list[str] = []
        errors: list[str] = []
        super()._load_from_state_dict(safe, prefix, local_metadata, strict, missing, [], errors)
        original = {prefix + safe: prefix + name for name, safe in self._names.items()}
        missing_keys += [original.get(key, key) for key in missing]
        for message in errors:
            key = next((key for key in original if f"{key}:" in message), "")
            error_msgs.append(message.replace(key, original[key]) if key else message)
        own = {*self._names, *self._buffers}
        strangers = [name for name in ours if name not in own and name.split(".")[0] not in self._modules]
        unexpected_keys += [prefix + name for name in strangers if strict]


def _safe(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is {describe_type(name)}: name a hyperparameter by a str")
    return "leaf:" + name.replace("%", "%25").replace(".", "%2E")


def _is_nonnegative(constraint: Constraint) -> bool:
    bound = getattr(constraint, "lower_bound", None)
    return type(constraint) is type(constraints.nonnegative) and not isinstance(bound, Tensor) and bound == 0


def _is_identity(transform: Transform) -> bool:
    """Also of a copy of ``identity_transform``, which is no longer the same object."""
    return isinstance(transform, ComposeTransform) and not transform.parts


def _constraint(name: str, constraint: Constraint | None) -> tuple[Constraint, Transform]:
    if constraint is None or constraint is constraints.real or _is_nonnegative(constraint):
        return constraint or constraints.real, identity_transform
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"the constraint of {name!r} is {describe_type(constraint)}: give an instance from torch's constraints"
        )
    try:
        return constraint, biject_to(constraint)
    except NotImplementedError:
        raise ValueError(f"{name!r}: torch has no bijection onto {constraint}; take another constraint") from None


def _leaf(name: str, value: Tensor, constraint: Constraint, transform: Transform) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"of {value.dtype}" if isinstance(value, Tensor) else describe_type(value)
        raise TypeError(f"hyperparameter {name!r} is {what}: give a floating-point tensor, such as torch.tensor(0.1)")
    if value.layout is not torch.strided:
        raise TypeError(f"hyperparameter {name!r} is {value.layout}: give a dense tensor, value.to_dense()")
    if value.is_meta:
        raise ValueError(f"hyperparameter {name!r} is on the meta device, where no values are: give it some")
    if value.ndim < constraint.event_dim:
        shape, axes = tuple(value.shape), constraint.event_dim
        raise ValueError(f"hyperparameter {name!r} has shape {shape}, too few axes for {constraint}: give {axes} at least")
    value = value.detach().clone()
    if not bool(constraint.check(value).all()):
        raise ValueError(f"hyperparameter {name!r} starts outside {constraint}: min {value.min()}, max {value.max()}")
    leaf = transform.inv(value).clone()
    edges = [getattr(constraint, edge, None) for edge in ("lower_bound", "upper_bound")]
    on_edge = not _is_identity(transform) and any(bool((value == e).any()) for e in edges if e is not None)
    if on_edge or not bool(leaf.isfinite().all()):
        raise ValueError(
            f"hyperparameter {name!r} starts on the edge of {constraint}, which no finite leaf reaches: start inside, "
            "or take constraints.nonnegative, which is kept by projection"
        )
    return leaf
