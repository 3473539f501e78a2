"""What BilevelOptimizer is given, checked before anything runs: each error names the value and the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from hoptim.method import Method
from hoptim.options import is_finite, is_whole
from hoptim.problem import Problem


def check_schedule(every: int | None, warmup: int) -> None:
    """``every`` is a positive number of steps or None, ``warmup`` a number of steps."""
    if every is not None and not (is_whole(every) and every >= 1):
        raise ValueError(f"every={every!r}: give a whole number of inner steps, 1 or more, or None for never")
    if not (is_whole(warmup) and warmup >= 0):
        raise ValueError(f"warmup={warmup!r}: give a whole number of inner steps, 0 or more")


def check_weights(val_weights: Sequence[float] | None) -> list[float] | None:
    """Finite numbers, one for each validation loss."""
    if val_weights is None:
        return None
    if not isinstance(val_weights, (Sequence, Tensor)) or isinstance(val_weights, str):
        raise TypeError(
            f"val_weights is a {type(val_weights).__name__}: give a list of numbers, one for each validation loss"
        )
    found = [float(weight) for weight in val_weights]
    if not found or not all(is_finite(weight) for weight in found):
        raise ValueError(f"val_weights={found!r}: give one finite number for each validation loss")
    return found


def check_strategies(hypergradient: Method | None, hooks: Sequence[Any], every: int | None) -> None:
    """The method is one whose steps all come after the last hyperstep, and the hooks are functions."""
    if hypergradient is not None and not isinstance(hypergradient, Method):
        raise TypeError(f"hypergradient is a {type(hypergradient).__name__}: give a method, such as hoptim.Implicit()")
    steps = 0 if hypergradient is None else hypergradient.keeps_steps
    if every is not None and steps > every:
        raise ValueError(
            f"{hypergradient} goes back {steps} inner steps, but hypersteps come every {every}: unroll at most {every}"
        )
    if not isinstance(hooks, Sequence):
        raise TypeError(f"hooks is a {type(hooks).__name__}: give a list of functions of the record")
    if bad := [hook for hook in hooks if not callable(hook)]:
        raise TypeError(f"hook {bad[0]!r} can't be called: give functions of the record")


def check_optimizers(inner: Optimizer, outer: Optimizer, problem: Problem) -> None:
    """The inner optimizer holds weights and no hyperparameter; the outer one the other way round."""
    for name, optimizer in (("inner", inner), ("outer", outer)):
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name} is a {type(optimizer).__name__}: give a torch.optim.Optimizer")
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}: give hoptim.Problem(model, hparams, train_loss, val_loss)")
    if isinstance(outer, LBFGS):
        raise ValueError("outer is an LBFGS, which needs a closure that a hyperstep has not: take SGD or Adam")
    weights, leaves = _names(problem)
    learned = {id(p) for p in (*problem.weights().values(), *problem.leaves().values())}
    for name, optimizer, own, other, kinds, remedy in (
        ("inner", inner, weights, leaves, ("weight of the model", "hyperparameter"), "model.parameters()"),
        ("outer", outer, leaves, weights, ("hyperparameter", "weight of the model"), "hparams.parameters()"),
    ):
        held = {id(p): None for group in optimizer.param_groups for p in group["params"]}
        if wrong := [other[p] for p in held if p in other]:
            raise ValueError(f"the {name} optimizer holds {wrong[0]!r}, a {kinds[1]}: build it on {remedy}")
        if not any(p in own for p in held):
            raise ValueError(f"the {name} optimizer holds no {kinds[0]} of the problem: build it on {remedy}")
        if left := [own[p] for p in own if p not in held and p in learned]:
            warnings.warn(
                f"the {name} optimizer does not hold {left}, though they require a gradient: the hypergradient takes them "
                "as learned. Add them, or freeze them with requires_grad_(False)",
                stacklevel=4,
            )


def check_added(params: Tensor | Iterable[Tensor], problem: Problem) -> None:
    """A group that is added to the inner optimizer holds no hyperparameter."""
    leaves = _names(problem)[1]
    if wrong := [leaves[id(p)] for p in ([params] if isinstance(params, Tensor) else params) if id(p) in leaves]:
        raise ValueError(f"the added group holds {wrong[0]!r}, a hyperparameter: add it to the outer optimizer")


def _names(problem: Problem) -> tuple[dict[int, str], dict[int, str]]:
    weights = {id(p): name for name, p in problem.model.named_parameters()}
    leaves = {id(p): name for name, p in problem.hparams.named_parameters()}
    return weights, leaves
