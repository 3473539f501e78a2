"""K trainings of one model as a single training of K models, whose weights have a leading axis of K."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.func import functional_call, vmap
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from hoptim.linalg.vectors import Layout, Tensors
from hoptim.methods.inner_step import InnerState
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.functional import Joint, restore_tensors
from hoptim.problem.loss_checks import split_aux
from hoptim.problem.problem import Problem
from hoptim.solvers.blocks import Blocks
from hoptim.solvers.cg import CG
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.minres import MINRES

KRYLOV = (CG, MINRES, GMRES)  # take coefficients from inner products, so that each task needs its own
Fixed = Callable[[Any], Tensors]  # of the hyperparameters: the weights that are not trained, by name


class SideBySide(Problem):
    """The problem of K tasks, each of which has weights and buffers of its own: the sum of their losses.

    It has the modules of another problem, whose weights and buffers it replaces by K copies along a leading axis. Frozen
    weights and hyperparameters are shared.

    Args:
        one: the problem of one task.
        start: the weights that are trained, by name, as each task begins with them.
        fixed: the other weights that hyperparameters stand for.
        count: K; ``None`` for a single task without that axis.
        share: of each validation loss in their sum.
    """

    def __init__(self, one: Problem, start: Tensors, fixed: Fixed, count: int | None, share: float) -> None:
        vars(self).update(vars(one))
        self._live, self.process_group, self.has_aux, self.norms_by_batch = None, None, False, True

        def own(t: Tensor) -> Tensor:
            return t.detach().clone() if count is None else t.detach().expand(count, *t.shape).clone()

        weights = dict(one.named_parameters())
        self.own = {name: own(start[name]).requires_grad_() if name in start else p.detach() for name, p in weights.items()}
        self.own_buffers = {name: own(b) for name, b in one.model.named_buffers()}
        self.replaced = {name: p for name, p in weights.items() if p.requires_grad}
        self.is_stacked = count is not None
        over = partial(_over_tasks, trained=frozenset(start), fixed=fixed, is_one=not self.is_stacked)
        total = partial(_total, is_one=not self.is_stacked)
        train, val = (_without_aux(name, one) for name in ("train_loss", "val_loss"))
        self.val_loss = total("val_loss", over(val), share=share)
        self.train_loss = total("train_loss", over(train))
        if isinstance(train, CompositeLoss):
            criterion = train.criterion if count is None else _criterion_over_tasks(train.criterion)
            penalty = None if train.penalty is None else total("penalty", over(train.penalty))
            self.train_loss = CompositeLoss(over(train.predict), criterion, penalty)

    def solver_of(self, solver: Any, layout: Layout) -> Any:
        """A Krylov solver solves the system of each task by itself; others take the same polynomial for all."""
        return Blocks(solver=solver, layout=layout) if self.is_stacked and isinstance(solver, KRYLOV) else solver

    def named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        """Those of all tasks."""
        return self.own.items()

    def named_buffers(self) -> Iterable[tuple[str, Tensor]]:
        """Those of all tasks, and of the hyperparameters."""
        own = {f"model.{name}": b for name, b in self.own_buffers.items()}
        return (dict(super().named_buffers()) | own).items()


def _without_aux(name: str, problem: Problem) -> Any:
    loss = getattr(problem, name)
    if not problem.has_aux or isinstance(loss, CompositeLoss):
        return loss
    return lambda model, hparams, batch: split_aux(name, loss(model, hparams, batch))[0]


def _over_tasks(
    function: Callable[..., Tensor], *, trained: Collection[str], fixed: Fixed, is_one: bool
) -> Callable[..., Tensor]:
    """A function of (model, hparams, …) for all tasks at once: its values along a leading axis of K.

    The model and the batch of each task are slices of what is given, by ``torch.func.vmap``.
    """

    def over(model: Any, hparams: Any, *batch: Any) -> Tensor:
        joint, shared = Joint(model, hparams), _of_model(fixed(hparams))
        if is_one:
            called = partial(function, model, hparams, *batch)
            if not shared:
                return called()
            with restore_tensors(list(joint.modules())):
                return functional_call(joint, shared, (called,))
        all_own = _of_model(
            {name: p for name, p in model.named_parameters() if name in trained} | dict(model.named_buffers())
        )

        def of_one(own: Tensors, *batch: Any) -> tuple[Tensor, Tensors]:
            given = own | shared
            value = functional_call(joint, given, (partial(function, model, hparams, *batch),))  # updates ``given``
            return value, {name: given[name] for name, t in own.items() if given[name] is not t}

        with restore_tensors(list(joint.modules())):
            values, assigned = vmap(of_one, (0, *map(axes_of, batch)), randomness="different")(all_own, *batch)
        for name, t in assigned.items():  # buffers, in place of which the forward pass has put others
            owner, _, last = name.rpartition(".")
            joint.get_submodule(owner)._buffers[last] = t
        return values

    return over


def _criterion_over_tasks(criterion: Callable[[Tensor, Any, Any], Tensor]) -> Callable[[Tensor, Any, Any], Tensor]:
    def over(z: Tensor, hparams: Any, batch: Any) -> Tensor:
        return vmap(lambda z, batch: criterion(z, hparams, batch), (0, axes_of(batch)), randomness="different")(
            z, batch
        ).sum()

    return over


def _total(name: str, function: Callable[..., Tensor], *, is_one: bool, share: float = 1.0) -> Callable[..., Tensor]:
    """The sum over the tasks of what must be one number for each."""
    axes = 0 if is_one else 1

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
