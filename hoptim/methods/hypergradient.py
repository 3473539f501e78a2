"""One hypergradient, for any loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from hoptim.methods.implicit import Implicit, doubts
from hoptim.methods.learned_options import LearnedOption
from hoptim.methods.method import Method, checked
from hoptim.methods.result import Hypergradient
from hoptim.methods.unrolled import Unrolled
from hoptim.problem.data import Batches
from hoptim.problem.problem import Problem


def hypergradient(
    problem: Problem,
    train_batch: Any,
    val_batch: Any,
    method: Method | None = None,
    *,
    inner: Optimizer | None = None,
    options: Mapping[str, Any] | None = None,
    train_batches: Iterable[Any] | Callable[[], Any] | None = None,
) -> Hypergradient:
    """One hypergradient dL_V/dλ at the model's present weights, for any loop; it changes nothing.

    Args:
        problem: the bilevel problem.
        train_batch: the batch for the training loss.
        val_batch: the batch for the validation loss.
        method: how to compute it; default ``Implicit()``, or ``Unrolled()`` if an option of ``inner`` is learned.
        inner: the inner optimizer. ``Update``, ``Unrolled`` and ``SecondMoments`` need it, and so does every method if it
            has a weight decay of its own, which is a part of what "trained" means.
        options: the options of ``inner`` that are hyperparameters, such as ``{"lr": "rate"}``, as in
            :class:`BilevelOptimizer`: they have the values of these, whatever numbers ``inner`` has.
        train_batches: more training batches, for methods that average over several, draw a new one for each product, or
            take steps: ``Unrolled`` and ``PerTask`` take one for each step, from the first again after the last.

    Returns:
        The result; look at ``result.solution.status`` before using ``result.grads``.

    Raises:
        TypeError: ``problem`` is no :class:`Problem`, or ``method`` no method.
        ValueError: ``options`` names what is not there, neither loss depends on a hyperparameter, the training loss depends
            on no weight, or it is no scalar.

    Ridge regression with one weight, in closed form: w = sxy / (sxx + λ), and dL_V/dλ = −(w − y_V)·w / (sxx + λ).

    >>> import torch
    >>> from torch import nn
    >>> from hoptim import Implicit, Neumann, Problem
    >>> model = nn.Linear(1, 1, bias=False)
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(1.0)})
    >>> def train(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 4.0).square().sum() + 0.5 * hparams["decay"] * model.weight.square().sum()
    >>> def val(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 1.0).square().sum()
    >>> _ = model.weight.data.fill_(2.0)                             # stationary: 4 / (1 + 1)
    >>> one = torch.ones(1, 1)
    >>> result = hypergradient(Problem(model, hparams, train, val), one, one, Implicit(Neumann(terms=50)))
    >>> round(result.grads["decay"].item(), 6), result.solution.status.name
    (-1.0, 'FINISHED')
    """
    loop = checked(problem, method, inner, options)
    problem.check_ranks()
    draw = None if train_batches is None else Batches(train_batches, "train_batches").draw
    method = default_method(loop.learned) if method is None else method
    result = method(problem, train_batch, val_batch, loop=replace(loop, draw=draw))
    result.check_touched(loop.learned, sees_options=method.sees_options)
    for doubt in doubts(method, loop, problem.weights(), result.solution).values():
        warnings.warn(doubt, stacklevel=2)
    return result


def default_method(learned: Sequence[LearnedOption], every: int | None = None) -> Method:
    """``Implicit()``, or if options of the inner optimizer are learned ``Unrolled()``, over at most ``every`` steps.

    ``Implicit()`` sees the decays of single weights, but no other such option; with the condition ``Update`` the sign can
    be wrong on an untrained net.

    >>> default_method([]) == Implicit()
    True
    """
    if all(option.is_decay for option in learned):
        return Implicit()
    return Unrolled() if every is None else Unrolled(min(every, Unrolled.steps))
