"""Checks of the arguments of BilevelOptimizer, CrossValidated and retrain."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from hoptim.checks import describe_type, is_finite, is_whole, listed
from hoptim.methods.method import Method, check_method, check_one_training, check_steps, checked_problem, held
from hoptim.problem.level_adam import LevelAdam
from hoptim.problem.problem import Problem

OnFailure = Literal["skip", "raise"]
Unheld = list[tuple[str, str]]  # "inner" or "outer", and the name of a tensor that should be in this optimizer but is not


def check_schedule(every: int | None, warmup: int, on_failure: object) -> None:
    """Check that ``every`` is a positive number of steps or ``None``, ``warmup`` a number of steps, ``on_failure`` valid."""
    if every is not None and not (is_whole(every) and every >= 1):
        raise ValueError(f"every={every!r}: give a whole number of inner steps, 1 or more, or None for never")
    if not (is_whole(warmup) and warmup >= 0):
        raise ValueError(f"warmup={warmup!r}: give a whole number of inner steps, 0 or more")
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure={on_failure!r}: give 'skip', to go on with a warning, or 'raise'")


def checked_weights(val_weights: Sequence[float] | None) -> list[float] | None:
    """``val_weights`` as a list of floats, after checking that they are finite numbers."""
    if val_weights is None:
        return None
    if not isinstance(val_weights, (Sequence, Tensor)) or isinstance(val_weights, str):
        raise TypeError(f"val_weights is {describe_type(val_weights)}: give a list of numbers, one for each validation loss")
    found = val_weights.tolist() if isinstance(val_weights, Tensor) else list(val_weights)
    if not isinstance(found, list) or not found or not all(is_finite(weight) for weight in found):
        raise ValueError(f"val_weights={found!r}: give one finite number for each validation loss")
    return [float(weight) for weight in found]


def check_method_fits(method: Method | None, every: int | None, options: Mapping[str, Any] | None) -> None:
    """Check that the method needs no steps before the last hyperstep, and sees the options that are learned."""
    check_method("hypergradient", method)
    check_one_training("hypergradient", method)
    if method is None:
        return
    if every is not None and method.keeps_steps > every:
        raise ValueError(
            f"{method} goes back {method.keeps_steps} inner steps, but hypersteps come every {every}: unroll at most {every}"
        )
    unseen = [key for key in options or () if key != "weight_decay"]  # which is a part of the condition Gradient()
    if unseen and not method.sees_options:
        raise ValueError(
            f"options makes {', '.join(unseen)} hyperparameters, in which {method} has no derivative: leave "
            "hypergradient out for Unrolled(), or give Implicit(condition=Update())"
        )


def check_hooks(hooks: Sequence[Any]) -> None:
    """Check that hooks are functions in a list."""
    if not isinstance(hooks, Sequence):
        raise TypeError(f"hooks is {describe_type(hooks)}: give a list of functions of the record")
    for hook in hooks:
        if isinstance(hook, type):
            raise TypeError(f"hook {hook.__name__} is a class: give an instance, such as hoptim.tracking.Console()")
        if not callable(hook):
            raise TypeError(f"hook {hook!r} can't be called: give functions of the record")


def check_optimizer(name: str, optimizer: Optimizer, problem: Problem) -> None:
    """Check that the inner optimizer holds weights and no hyperparameters; or the outer one, the other way round."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is {describe_type(optimizer)}: give a torch.optim.Optimizer")
    if isinstance(getattr(optimizer, "problem", None), Problem):
        raise TypeError(f"{name} is {describe_type(optimizer)} already: give the optimizer inside it, as its .{name}")
    check_steps(name, optimizer)
    checked_problem(problem)
    weight, leaf = ("weight of the model", problem.model), ("hyperparameter", problem.hparams)
    (kind, own), (other_kind, other) = (weight, leaf) if name == "inner" else (leaf, weight)
    remedy = "model.parameters()" if name == "inner" else "hparams.parameters()"
    if name == "inner" and problem.is_sharded:
        remedy += " after the model was sharded, which replaces them; Accelerate does so in prepare(model, optimizer)"
    live = {id(p) for p in (problem.weights() if name == "inner" else problem.leaves()).values()}
    here, frozen = held(optimizer).keys(), {id(p) for p in own.parameters()} - live
    if wrong := [key for key, p in other.named_parameters() if id(p) in here and id(p) not in frozen]:  # which may be both
        raise ValueError(f"the {name} optimizer holds {wrong[0]!r}, a {other_kind}: build it on {remedy}")
    if not here & live:
        raise ValueError(f"the {name} optimizer holds no {kind} that requires a gradient: build it on {remedy}")
    if name == "outer" and not isinstance(optimizer, LevelAdam) and any("fall_after" in g for g in optimizer.param_groups):
        raise ValueError(
            "outer has param groups of hparams.optimizer(), without the levels that belong to them: give "
            "hoptim.outer_adam(hparams), which serves several recipes"
        )
    if name == "outer" and isinstance(optimizer, LBFGS):
        raise ValueError("outer is an LBFGS, which needs a closure that a hyperstep has not: take SGD or Adam")


def warn_of_unheld(held_by: Mapping[str, Optimizer], problem: Problem, known: Sequence[tuple[str, str]] = ()) -> Unheld:
    """Find tensors that require a gradient but are in neither optimizer; warn of those that are not ``known``."""
    found: Unheld = []
    for name, live in (("inner", problem.weights()), ("outer", problem.leaves())):
        here = held(held_by[name])
        unheld = [(name, key) for key, p in live.items() if id(p) not in here]
        if len(unheld) == len(live):
            check_optimizer(name, held_by[name], problem)
        if new := [key for which, key in unheld if (which, key) not in known]:
            warnings.warn(
                f"the {name} optimizer does not hold {listed(new)}, though they require a gradient: the hypergradient takes "
                "them as learned. That is right if another optimizer trains them; else add them, or freeze them with "
                "requires_grad_(False), also an average of the weights that is a part of the model",
                stacklevel=3,
            )
        found += unheld
    return found


def checked_group(param_group: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """A group to be added to the inner optimizer, after checking that it holds no hyperparameter."""
    params, leaves = param_group["params"], {id(p): name for name, p in problem.hparams.named_parameters()}
    if isinstance(params, Iterator):
        params = list(params)
    if wrong := [leaves[id(p)] for p in ([params] if isinstance(params, Tensor) else params) if id(p) in leaves]:
        raise ValueError(f"the added group holds {wrong[0]!r}, a hyperparameter: add it to the outer optimizer")
    return {**param_group, "params": params}


def check_fold_schedule(warmup: object, hypersteps: object) -> None:
    """Check that ``warmup`` is a share of the training, and ``hypersteps`` a positive number."""
    if not (is_finite(warmup) and 0 <= warmup < 1):  # type: ignore[operator]
        raise ValueError(
            f"warmup={warmup!r}: give the share of the training before the first hyperstep, at least 0, below 1"
        )
    if not (is_whole(hypersteps) and hypersteps >= 1):  # type: ignore[operator]
        raise ValueError(f"hypersteps={hypersteps!r}: give a whole number, 1 or more")


@contextmanager
def gradients(what: str) -> Iterator[None]:
    """Enable gradients inside, whatever is set around it.

    Raises:
        RuntimeError: under ``torch.inference_mode()``, where nothing can be trained.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{what} was called under torch.inference_mode(), where nothing can be trained: call it outside")
    with torch.enable_grad():
        yield
