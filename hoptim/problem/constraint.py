"""Constraints: the map from an unconstrained leaf to a natural value and back, and the words for a constraint in a state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ExpTransform, SoftmaxTransform, Transform, identity_transform

from hoptim.checks import describe_type

FAR = 0.01  # a start is refused if its leaf gives a value whose distance to the constraint's edge is off by this share


class Shares(Constraint):
    """A simplex whose leaf has a logarithm for each share, so that the order of the shares does not matter.

    The leaf of ``constraints.simplex`` breaks a stick, so that what one of its numbers does depends on the shares before it.
    """

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether they are positive and add up to 1."""
        return constraints.simplex.check(value)


biject_to.register(Shares, lambda _: SoftmaxTransform())


def is_nonnegative(constraint: Constraint) -> bool:
    """Whether a hyperparameter is kept at zero or above by projection, so that its leaf is the value itself."""
    return _is_from_zero(constraint, constraints.nonnegative)


def _is_from_zero(constraint: Constraint, kind: Constraint) -> bool:
    bound = getattr(constraint, "lower_bound", None)
    return type(constraint) is type(kind) and not isinstance(bound, Tensor) and bound == 0


def _is_simplex(constraint: Constraint) -> bool:
    return isinstance(constraint, (type(constraints.simplex), Shares))


def described(found: Any) -> str:
    """A constraint with all its numbers, the same on each device and in each precision."""
    if isinstance(found, Constraint):
        parts = [f"{name}={described(value)}" for name, value in getattr(found, "__dict__", {}).items()]
        return f"{type(found).__name__.strip('_')}({', '.join(parts)})"
    if isinstance(found, (list, tuple)):
        return f"[{', '.join(map(described, found))}]"
    if isinstance(found, Tensor):
        return described(found.tolist())
    return str(float(found)) if isinstance(found, (int, float)) else str(found)


def bijection(constraint: Constraint | None) -> tuple[Constraint, Transform]:
    """The constraint of a hyperparameter, and the map onto it."""
    constraint = constraints.real if constraint is None else constraint
    if is_nonnegative(constraint):
        return constraint, identity_transform
    if _is_from_zero(constraint, constraints.positive):
        return constraint, ExpTransform()  # torch's own also multiplies by 1 and adds 0, at four times the cost
    return constraint, biject_to(constraint)


def to_leaf(name: str, value: Tensor, constraint: Constraint, transform: Transform) -> Tensor:
    """The unconstrained leaf of a natural value, as a copy."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"of {value.dtype}" if isinstance(value, Tensor) else describe_type(value)
        raise TypeError(f"hyperparameter {name!r} is {what}: give a floating-point tensor, such as torch.tensor(0.1)")
    value = value.detach().clone()
    if not constraint.check(value).all():
        raise ValueError(f"hyperparameter {name!r} starts outside {constraint}: min {value.min()}, max {value.max()}")
    if _is_simplex(constraint):  # its map divides by what is left of 1
        exact = value.to("cpu", torch.float64)
        leaf = transform.inv(exact / exact.sum(-1, keepdim=True)).to(value)
    else:
        leaf = transform.inv(value).clone()
    edges = _edges(constraint)
    on_edge = not is_nonnegative(constraint) and any((value == edge).any() for edge in edges)
    if on_edge or not leaf.isfinite().all():
        raise ValueError(
            f"hyperparameter {name!r} starts on the edge of {constraint}, which no finite leaf reaches: start inside, "
            "or take constraints.nonnegative, which is kept by projection"
        )
    _check_given_back(name, value, leaf, transform(leaf), edges[0] if edges else None)
    return leaf


def _edges(constraint: Constraint) -> list[Any]:
    """The bounds of a constraint's values, the lower one first."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    bounds = [getattr(constraint, edge, None) for edge in ("lower_bound", "upper_bound")]
    return [0.0] if _is_simplex(constraint) else [edge for edge in bounds if edge is not None]


def _check_given_back(name: str, value: Tensor, leaf: Tensor, back: Tensor, edge: Any) -> None:
    """Raise ``ValueError`` unless the leaf's value is the given one, within rounding and FAR of the distance to the edge."""
    if not leaf.numel():  # no values, or a simplex of a single one
        return
    size = value.abs().max() if edge is None else (value - edge).abs()
    rounding = 4 * torch.finfo(value.dtype).eps
    allowed = (FAR + rounding * leaf.abs().max()) * size + rounding * (value.abs() + abs(0.0 if edge is None else edge))
    excess = (back - value).abs() - allowed
    if not excess.max() <= 0:  # also if it is NaN
        start, found = (one.flatten()[excess.argmax()].item() for one in (value, back))
        raise ValueError(
            f"hyperparameter {name!r} starts at {start:.3g}, and its leaf gives {found:.3g}: that is too near the edge for "
            f"{value.dtype}. Start further inside, or in torch.float64"
        )
