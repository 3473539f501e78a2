"""The optimizers of torch.optim whose steps torch can differentiate, and the options in which they have a derivative."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import optim

if TYPE_CHECKING:
    from hoptim.methods.learned_options import LearnedOption

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

KINDS = tuple(DIFFERENTIABLE)
DECOUPLED = (optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam)  # a decay beside whose steps is in F
WORKS = f"take one of torch.optim's {', '.join(kind.__name__ for kind in KINDS)}, or Implicit() on Gradient()"


def is_differentiable(inner: optim.Optimizer) -> bool:
    """Whether torch can differentiate a step of ``inner``."""
    try:
        kind_of(inner)
    except TypeError:
        return False
    return True


def kind_of(inner: optim.Optimizer) -> Kind:
    """The class of ``torch.optim`` whose step ``inner`` takes; ``TypeError`` if torch can't differentiate it."""
    own = type(inner).__name__
    kind = next((base for base in type(inner).__mro__ if base in KINDS), None)
    if kind is None:
        raise TypeError(f"the inner optimizer is of class {own}, whose step has no differentiable form: {WORKS}")
    for method in ("step", "_init_group"):
        found = inspect.unwrap(getattr(inner, method))
        if getattr(found, "__func__", found) is not inspect.unwrap(getattr(kind, method)):
            raise TypeError(f"the inner optimizer, of class {own}, has a {method} that is not {kind.__name__}'s: {WORKS}")
    return kind


def check_differentiable(
    kind: Kind, number: int, group: Mapping[str, Any], learned: Sequence[LearnedOption], keys: Collection[str] | None = None
) -> None:
    """Raise ``TypeError`` unless the step has a derivative in what is learned of parameter group ``number``."""
    for option in learned:
        if option.group == number and not option.is_decay and (keys is None or option.key in keys):
            check_has_derivative(kind, group, option.key, f"hyperparameter {option.name!r}")


def check_has_derivative(kind: Kind, group: Mapping[str, Any], key: str, what: str) -> None:
    """Raise ``TypeError`` unless torch's step has a derivative in this option; ``what`` says what it is."""
    works = DIFFERENTIABLE[kind] | ({"weight_decay"} if group.get("decoupled_weight_decay") else set())
    works -= {"momentum"} if group.get("nesterov") else set()
    if key not in works:
        raise TypeError(
            f"{what} is the {key} of {kind.__name__}, in which torch's step has no derivative, given its "
            f"other options: {', '.join(sorted(works)) or 'none'} may be one; SGD, Adam and AdamW have one in lr and "
            "weight_decay"
        )
