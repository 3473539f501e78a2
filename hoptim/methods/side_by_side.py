"""K trainings of one model as a single training of K models, whose weights have a leading axis of K."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from hoptim.linalg.vectors import Tensors
from hoptim.methods.inner_step import InnerState
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.functional import Attributes, Joint
from hoptim.problem.loss_checks import split_aux
from hoptim.problem.problem import Loss, Problem

Fixed = Callable[[Any], Tensors]  # of the hyperparameters: the weights that are not trained, by name


def copied(problem: Problem, start: Tensors, fixed: Fixed, count: int | None, share: float) -> Problem:
    """The problem of K tasks, each of which has a model of its own: the sum of their losses.

    Each has its own copies of the weights in ``start`` and of the buffers, along a leading axis of K. Frozen weights and
    hyperparameters are shared. Nothing that is trained or written to is the user's own.

    Args:
        problem: the problem of one task.
        start: the weights that are trained, by name, as each task begins with them.
        fixed: the other weights that hyperparameters stand for.
        count: K; ``None`` for a single task without that axis.
        share: of each validation loss in their sum.
    """

    def own(t: Tensor) -> Tensor:
        return t.detach().clone() if count is None else t.detach().expand(count, *t.shape).clone()

    memo: dict[int, Any] = {**Attributes(list(problem.model.modules())).copies()}
    memo |= {id(b): own(b) for b in problem.model.buffers()}
    for name, p in problem.model.named_parameters():
        memo[id(p)] = nn.Parameter(own(start[name])) if name in start else nn.Parameter(p.detach(), requires_grad=False)
    model = copy.deepcopy(problem.model, memo)
    axes = 0 if count is None else 1
    over = partial(_over_tasks, fixed=fixed, is_one=count is None)
    train, val = (_without_aux(name, problem) for name in ("train_loss", "val_loss"))
    train_loss: Loss = _total("train_loss", over(train), axes)
    if isinstance(train, CompositeLoss):
        criterion = train.criterion if count is None else _criterion_over_tasks(train.criterion)
        penalty = None if train.penalty is None else _total("penalty", over(train.penalty), axes)
        train_loss = CompositeLoss(over(train.predict), criterion, penalty)
    val_loss = _total("val_loss", over(val), axes, share)
    found = Problem(model, problem.hparams, train_loss, val_loss, process_group=None)
    found.checked, found.norms_by_batch = problem.checked, True
    return found


def _without_aux(name: str, problem: Problem) -> Any:
    loss = getattr(problem, name)
    if not problem.has_aux or isinstance(loss, CompositeLoss):
        return loss
    return lambda model, hparams, batch: split_aux(name, loss(model, hparams, batch))[0]


def _over_tasks(function: Callable[..., Tensor], *, fixed: Fixed, is_one: bool) -> Callable[..., Tensor]:
    """A function of (model, hparams, …) for all tasks at once: its values along a leading axis of K.

    The model and the batch of each task are slices of what is given, by ``torch.func.vmap``.
    """

    def over(model: Any, hparams: Any, *batch: Any) -> Tensor:
        joint, shared = Joint(model, hparams), _of_model(fixed(hparams))
        if is_one:
            return functional_call(joint, shared, (lambda: function(model, hparams, *batch),))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())

        def of_one(own: Tensors, *batch: Any) -> Tensor:
            return functional_call(joint, _of_model(own) | shared, (lambda: function(model, hparams, *batch),))

        return vmap(of_one, (0, *map(axes_of, batch)), randomness="different")(trained, *batch)

    return over


def _criterion_over_tasks(criterion: Callable[[Tensor, Any, Any], Tensor]) -> Callable[[Tensor, Any, Any], Tensor]:
    def over(z: Tensor, hparams: Any, batch: Any) -> Tensor:
        return vmap(lambda z, batch: criterion(z, hparams, batch), (0, axes_of(batch)), randomness="different")(
            z, batch
        ).sum()

    return over


def _total(name: str, function: Callable[..., Tensor], axes: int, share: float = 1.0) -> Callable[..., Tensor]:
    """The sum over the tasks of what must be one number for each; ``axes`` is 1 if there are several tasks, else 0."""

    def total(*given: Any) -> Tensor:
        values = function(*given)
        if isinstance(values, Tensor) and values.ndim != axes:
            raise ValueError(
                f"{name} returned a tensor of shape {tuple(values.shape[axes:])} for a task: return a scalar, as its mean()"
            )
        return values.sum() * share if isinstance(values, Tensor) else values

    return total


def _of_model(tensors: Tensors) -> Tensors:
    return {f"model.{name}": t for name, t in tensors.items()}


def axes_of(batch: Any) -> Any:
    """The axis of the tasks in each part of a batch: the first one of each tensor."""
    return pytree.tree_map(lambda part: 0 if isinstance(part, Tensor) else None, batch)


def stand_in(inner: Optimizer, weights: Tensors, own: Tensors, state: InnerState) -> Optimizer:
    """The inner optimizer as that of other tensors, with a state of theirs.

    Args:
        inner: the optimizer, which does not change.
        weights: the user's weights by name, as it holds them.
        own: the tensors in their place.
        state: of the optimizer, by weight name.
    """
    in_place = {id(p): own[name] for name, p in weights.items() if name in own}
    groups = [
        {**group, "params": [in_place[id(p)] for p in group["params"] if id(p) in in_place]} for group in inner.param_groups
    ]
    other = object.__new__(type(inner))
    states = defaultdict(dict, {own[name]: entries for name, entries in state.items()})
    vars(other).update(vars(inner), param_groups=groups, state=states)
    return other
