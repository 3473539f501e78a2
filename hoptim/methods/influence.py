"""Influence: how much each example moves a validation loss, by one solve for any number of examples."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.optim import Optimizer

from hoptim.checks import describe_type
from hoptim.linalg import dicts
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.linalg.vjp import VJP
from hoptim.methods.implicit import Implicit, check_weights, doubts
from hoptim.methods.method import TrainingContext, checked_problem, training_context
from hoptim.methods.validation_loss import validate
from hoptim.problem.data import Batches
from hoptim.problem.loss_checks import check_takes
from hoptim.problem.problem import At, Problem
from hoptim.solvers.minres import MINRES
from hoptim.solvers.solution import Solution, worst

Losses = Callable[[Any, Any, Any], Tensor]
DEFAULT = Implicit(MINRES(terms=10))  # longer than for learning; chosen in scripts/studies/example_influence


@dataclass(frozen=True, kw_only=True)
class Influence:
    """The influence of examples, and the solve behind it.

    Attributes:
        scores: of shape (N,) for N examples, or (R, N) for R validation losses; NaN where the solve failed. More weight on
            the examples with the lowest scores lowers the validation loss, on those with the highest raises it.
        solution: x by the names of the weights, its status and its residuals; of several solves, the one that ended worst.
    """

    scores: Tensor
    solution: Solution


def influence(
    problem: Problem,
    losses: Losses,
    train_batch: Any,
    val_batch: Any,
    method: Implicit | None = None,
    *,
    examples: Iterable[Any] | None = None,
    inner: Optimizer | None = None,
) -> Influence:
    """The scores −xᵀ∇ℓ_i of examples i, where Aᵀx = g; it changes nothing.

    A is the curvature of the training loss, g = ∂L_V/∂w. This is the derivative of L_V in a weight of ℓ_i: if L_T has the
    mean of n losses, a training without example i ends with L_V higher by −score/n, to first order. One solve is for any
    number of examples, also of such that nobody trained on. Their gradients are not held: a batch of examples costs one to
    two gradients, and about one for each further validation loss.

    Args:
        problem: the model as trained, and both losses. A validation loss that returns a vector of R losses, such as one for
            each prediction, gives R scores to each example. Without hyperparameters, its ``hparams`` is ``None``.
        losses: ``losses(model, hparams, batch)``: the loss ℓ_i of each of the B examples of a batch, of shape (B,), without
            penalties. It may call ``model.eval()``.
        train_batch: the batch for the curvature, the larger the better: all training data, if they fit.
        val_batch: the batch for the validation loss.
        method: how to solve; default ``Implicit(MINRES(terms=10))``.
        examples: batches of the examples that get scores, one after the other; default: ``train_batch`` alone.
        inner: the optimizer that trained the model, if it has a weight decay of its own, which is a part of A.

    Raises:
        TypeError: ``problem`` or ``method`` is of the wrong kind, or weights are sharded.
        ValueError: there are no examples, ``losses`` returns no vector, or one that does not depend on the weights.

    Source: Koh and Liang 2017, Understanding black-box predictions via influence functions (arXiv 1703.04730), equation 2.

    A mean of three numbers, and L_V = w: without the last one the mean is 1.5, and by influence 3 − 3/3 = 2.

    >>> from torch import nn
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> model = nn.ParameterDict({"w": torch.tensor(3.0)})               # their mean
    >>> def losses(model, hparams, batch):
    ...     return 0.5 * (model["w"] - batch).square()
    >>> problem = Problem(model, None, lambda *given: losses(*given).mean(), lambda model, hparams, batch: model["w"])
    >>> influence(problem, losses, x, None).scores.round(decimals=4)
    tensor([-2., -1.,  3.])
    """
    problem, method, loop = _checked(problem, losses, method, inner)
    with problem.leave_no_trace(), problem.at() as at:
        validation = validate(at, val_batch)
        with method.linearize(at, train_batch, loop) as F:
            F = replace(F, value=F.value.new_empty(0))  # its memory is needed
            check_weights(F, loop)
            g = F.layout.flatten(validation.g, validation.loss.shape)
            del validation  # likewise
            solution = method.solver_of(F, problem, loop)(g)
        along = _along_each(_of_examples(at, losses), _batches(examples, train_batch), F.layout, solution.value)
        scores = [_scores(found, solution) for found in along]
    _warn_of_doubts(method, loop, problem, found := replace(solution, value=F.layout.views(solution.value)))
    return Influence(scores=torch.cat(scores, dim=-1), solution=found)


def self_influence(
    problem: Problem,
    losses: Losses,
    train_batch: Any,
    method: Implicit | None = None,
    *,
    examples: Iterable[Any] | None = None,
    inner: Optimizer | None = None,
) -> Influence:
    """The scores −xᵢᵀ∇ℓ_i of examples i, where Aᵀxᵢ = ∇ℓ_i: the influence of each example on its own loss.

    If A is positive definite all are negative, and the lowest are of examples that the model could fit by themselves alone:
    wrong labels, and rare cases. There is a solve for each example: those of a batch go together, with as many vectors of
    the size of the model at once as it has examples, so that batches have to be small where the model is large.

    Arguments and errors are those of :func:`influence`; it also raises ``TypeError`` on several ranks.

    Source: Koh and Liang 2017 (arXiv 1703.04730), section 5.4.

    >>> from torch import nn
    >>> x = torch.tensor([1.0, 2.0, 6.0])
    >>> model = nn.ParameterDict({"w": torch.tensor(3.0)})
    >>> def losses(model, hparams, batch):
    ...     return 0.5 * (model["w"] - batch).square()
    >>> problem = Problem(model, None, lambda *given: losses(*given).mean())
    >>> self_influence(problem, losses, x).scores.round(decimals=4)
    tensor([-4., -1., -9.])
    """
    problem, method, loop = _checked(problem, losses, method, inner)
    if problem.ranks.size > 1:
        raise TypeError(
            "self_influence solves for the examples of one process, and these ranks would solve for different ones: give "
            "Problem process_group=None and the model itself, and all training examples as train_batch"
        )
    scores: list[Tensor] = []
    found: list[Solution] = []  # the worst so far, since all of them take as much memory as all gradients
    with problem.leave_no_trace(), problem.at() as at, method.linearize(at, train_batch, loop) as F:
        F = replace(F, value=F.value.new_empty(0))  # its memory is needed
        check_weights(F, loop)
        own, solve = _of_examples(at, losses), method.solver_of(F, problem, loop)
        for batch in _batches(examples, train_batch):
            g = _gradients(own, batch, F.layout)
            solution = solve(g)
            scores.append(_scores((solution.value * g).sum(-1), solution))
            found.append(replace(solution, value=F.layout.views(solution.value)))
            found = [found[worst(found)]]
    _warn_of_doubts(method, loop, problem, found[0])
    return Influence(scores=torch.cat(scores), solution=found[0])


def _checked(
    problem: Problem, losses: Losses, method: Implicit | None, inner: Optimizer | None
) -> tuple[Problem, Implicit, TrainingContext]:
    problem = checked_problem(problem)
    problem.check_trained()
    check_takes("losses", losses, "model, hparams, batch")
    if not (method is None or isinstance(method, Implicit)):
        raise TypeError(f"method is {describe_type(method)}: influence is implicit, such as {DEFAULT}")
    if problem.is_sharded:
        raise TypeError("the weights are sharded over ranks, for which influence is not made: take DistributedDataParallel")
    problem.check_ranks()
    return problem, (method or DEFAULT).completed(problem), training_context(problem, inner)


def _batches(examples: Iterable[Any] | None, train_batch: Any) -> Iterator[Any]:
    """The batches of examples, of which there is at least one."""
    if examples is None:
        examples = [train_batch]
    elif not isinstance(examples, Iterator):
        Batches(examples, "examples")  # checks that they are batches
    count = 0
    for count, batch in enumerate(examples, 1):  # noqa: B007
        yield batch
    if not count:
        raise ValueError("examples is empty: it must give at least one batch")


def _of_examples(at: At, losses: Losses) -> At:
    """The same place, with these losses beside those of the problem."""
    own = copy.copy(at.problem)
    own.losses, own.has_aux, own.checked = losses, False, set()
    return replace(at, problem=own)


def _vector(losses: Tensor) -> Tensor:
    if losses.ndim != 1:
        raise ValueError("losses returned a scalar: return the loss of each example, as reduction='none' gives them")
    return losses


def _along_each(at: At, batches: Iterable[Any], layout: Layout, x: Tensor) -> Iterator[Tensor]:
    """xᵀ∇ℓ_i of batch after batch: by forward mode from the third on, if that is right on the second.

    Forward mode takes 0.7 to 0.9 gradients on a CNN and 1.3 to 1.5 on a transformer layer, where two backward passes take
    2.3 and 1.8, and it holds no graph. But some operations lack it, and it also differentiates what is under ``no_grad``.
    """
    quick = x.ndim == 1
    for index, batch in enumerate(batches):
        found = _along_by_forward_mode(at, batch, layout, x) if quick and index else None
        if found is None or index < 2:
            exact = _along(at, batch, layout, x)
            quick = quick and (index == 0 or (found is not None and _are_close(found, exact)))
            found = exact
        yield found


def _are_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max())


def _along_by_forward_mode(at: At, batch: Any, layout: Layout, x: Tensor) -> Tensor | None:
    """xᵀ∇ℓ_i of the examples of a batch, as the derivative of ℓ(w + tx) in t; ``None`` where an operation has none."""
    try:
        with torch.no_grad(), forward_ad.dual_level():
            moved = layout.unflatten(x)
            duals = {name: forward_ad.make_dual(at.weights[name].detach(), moved[name]) for name in layout.names}
            with at.problem.at(weights=duals) as there, there.loss("losses", batch) as (found, *_):
                return forward_ad.unpack_dual(_vector(found)).tangent
    except RuntimeError:
        return None


def _along(at: At, batch: Any, layout: Layout, x: Tensor) -> Tensor:
    """xᵀ∇ℓ_i of the examples of a batch, of shape (B,), or (R, B) for R vectors x.

    Σ_i u_i ∇ℓ_i is linear in u, and its derivative in u along x is what is asked for: two backward passes for all examples.
    """
    with at.loss("losses", batch) as (found, *_):
        u = torch.ones_like(_vector(found)).requires_grad_()
        weights = {name: at.weights[name] for name in layout.names}
        total = torch.autograd.grad(found, list(weights.values()), u, create_graph=True, allow_unused=True)
        by_weight = _touched(dict(zip(weights, total, strict=True)))
        along = VJP(by_weight, {"u": u})(layout.unflatten(x), x.ndim > 1)["u"]
    assert along is not None
    return along.detach()


def _gradients(at: At, batch: Any, layout: Layout) -> Tensor:
    """∇ℓ_i of the examples of a batch, of shape (B, n)."""
    with at.loss("losses", batch) as (found, *_):
        eye = torch.eye(len(_vector(found)), dtype=found.dtype, device=found.device)
        weights = {name: at.weights[name] for name in layout.names}
        return layout.flatten(_touched(VJP({"": found}, weights)({"": eye}, True)), (len(eye),)).detach()


def _touched(by_weight: OptionalTensors) -> Tensors:
    if found := dicts.present(by_weight):
        return found
    raise ValueError("losses depends on none of the weights: compute it with the model that it is given")


def _scores(along: Tensor, solution: Solution) -> Tensor:
    """−xᵀ∇ℓ_i; NaN if the solve failed, so that nobody takes them for an answer."""
    return -along if solution.status.ok else torch.full_like(along, math.nan)


def _warn_of_doubts(method: Implicit, loop: TrainingContext, problem: Problem, solution: Solution) -> None:
    """Warn if scores may be wrong though the solve went well."""
    for doubt in doubts(method, loop, problem.weights(), solution).values():
        warnings.warn(doubt, stacklevel=3)
