"""The rates of the outer Adam, by the map from a leaf to its value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, ExpTransform, SigmoidTransform, Transform

from hoptim.problem.constraint import is_nonnegative
from hoptim.validation import is_whole

VALIDATION = 200  # how many validation examples there are, if nobody says
PULL = 100  # an offset of 1 is drawn to its level as much as Adam moves it, if there are as many validation examples


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The options of Adam for leaves of one kind.

    Attributes:
        alone: the rate of a leaf that shares no level, from scripts/defaults.py.
        levels: the options of levels, the coarser one first, from scripts/arrive.py.
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
