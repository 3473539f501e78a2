"""What a method for the hypergradient is given and what it returns: Method, TrainingContext, Hypergradient."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.curvature.linearization import check_dense
from hoptim.linalg import trees
from hoptim.linalg.trees import Found, Tree
from hoptim.problem.distributed import Ranks
from hoptim.problem.mixed_precision import full_precision
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import Solution, State, Status, Unread
from hoptim.validation import describe_type


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """A hypergradient, its two terms and the solve behind it.

    After a failed solve ``indirect`` and ``grads`` are NaN throughout, so that they cannot pass as an answer. Where the
    validation loss returned R losses, ``val_loss`` is of shape (R,), and the three trees have a leading axis of R.

    Attributes:
        grads: dL_V/dλ = direct + indirect, by the names of ``hparams.named_parameters()``: with respect to the leaves.
        direct: ∂L_V/∂λ; a view of a single zero where the validation loss does not depend on it.
        indirect: −Bᵀx; the very tensors of ``grads`` where the validation loss does not depend on them.
        solution: x, its status and its residuals.
        val_loss: L_V, on the device.
        train_loss: L_T, a scalar on the device.
        gradient_norm: ‖F‖, for ``Gradient`` ‖∇_w L_T‖, a scalar on the device: zero where the formula is exact.
        untouched: the hyperparameters that neither loss depends on with these batches; their gradient is zero.
    """

    grads: Tree
    direct: Tree
    indirect: Tree
    solution: Solution
    val_loss: Tensor
    train_loss: Tensor
    gradient_norm: Tensor
    untouched: tuple[str, ...] = ()

    def check_touched(self) -> None:
        """Raise where a hyperparameter is touched by neither loss."""
        if self.untouched:
            raise ValueError(
                f"hyperparameters {list(self.untouched)} are touched by neither loss: the training loss's gradient and the "
                'validation loss do not depend on them. Use hparams["name"] in a loss, without detach(), or drop them'
            )

    def combined(self, weights: Sequence[float] | None = None) -> Tree:
        """One gradient for the outer optimizer: Σ_r weights[r] · grads[r], by default the mean; of a single loss, ``grads``.

        Raises:
            ValueError: there are not as many weights as validation losses.
        """
        return self.mixed_by(weights, self.grads)

    def mixed_by(self, weights: Sequence[float] | None, tree: Tree) -> Tree:
        """Σ_r weights[r] · tree[r] of ``grads``, ``direct`` or ``indirect``, or of ``{"": val_loss}``."""
        if not self.val_loss.ndim:
            if weights is not None:
                raise ValueError("val_weights are given, but the validation loss is a single one: return a vector of losses")
            return tree
        losses = len(self.val_loss)
        if weights is not None and len(weights) != losses:
            raise ValueError(f"{len(weights)} val_weights for {losses} validation losses: give one a loss")
        share = self.val_loss.new_tensor([1 / losses] * losses if weights is None else list(weights))
        with full_precision():
            return {name: torch.tensordot(share.to(value), value, dims=1) for name, value in tree.items()}


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What surrounds a hypergradient, for methods that ask for more than the problem and two batches.

    Attributes:
        inner: the inner optimizer.
        draw: gives another training batch.
        trajectory: the last inner steps, where the method asked for them to be kept.
    """

    inner: Optimizer | None = None
    draw: Callable[[], Any] | None = None
    trajectory: Any = None


class Method(ABC):
    """A strategy for the hypergradient: a frozen dataclass that owns its options and keeps no state."""

    keeps_steps: int = 0  # how many of the last inner steps the optimizer has to remember for it

    @abstractmethod
    def __call__(
        self,
        problem: Problem,
        train_batch: Any,
        val_batch: Any,
        state: State | None = None,
        loop: TrainingContext | None = None,
    ) -> Hypergradient:
        """The hypergradient at the model's present weights; ``state`` is that of the last call's solution."""


def checked(problem: object, method: object, inner: Any) -> Optimizer | None:
    """What a hypergradient and an audit are given, looked at; of a :class:`BilevelOptimizer` the optimizer inside."""
    problem = checked_problem(problem)
    problem.check_learned()
    check_method("method", method)
    inside = getattr(inner, "inner", None)
    inner = inside if isinstance(inner, Optimizer) and isinstance(inside, Optimizer) else inner
    if inner is not None and not isinstance(inner, Optimizer):
        raise TypeError(f"inner is {describe_type(inner)}: give the torch.optim.Optimizer of the model's weights")
    if inner is not None and not held(inner).keys() & {id(p) for p in problem.model.parameters()}:
        raise ValueError("inner holds no weight of the problem's model: give the optimizer that trains it")
    return inner


def checked_problem(problem: object) -> Problem:
    """It, if it is one."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is {describe_type(problem)}: give hoptim.Problem(model, hparams, train_loss, val_loss)")
    return problem


def check_method(name: str, method: object) -> None:
    """Raise unless it is one, or None for the default."""
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"{name} is {describe_type(method)}: give a method, such as hoptim.Implicit()")


def held(optimizer: Optimizer) -> dict[int, None]:
    """The ids of the tensors that the optimizer holds, in its order."""
    return {id(p): None for group in optimizer.param_groups for p in group["params"]}


@dataclass(frozen=True, kw_only=True)
class Validation:
    """L_V and its first derivatives at one point; all with a leading axis of R where it is a vector."""

    loss: Tensor
    g: Tree
    direct: Found


def validate(problem: Problem, weights: Tree, leaves: Tree, batch: Any) -> Validation:
    """L_V, g = ∂L_V/∂w with zeros where it is not touched, and ∂L_V/∂λ, in one backward pass for each loss."""

    def inside(loss: Tensor, _: Any) -> Validation:
        rows = (
            [_gradients(loss, weights, leaves, last=True)]
            if not loss.ndim
            else [_gradients(one, weights, leaves, last=i == len(loss) - 1) for i, one in enumerate(loss)]
        )
        _check_seen(rows)
        g = {name: _rows([row[0][name] for row in rows], value, loss.ndim) for name, value in weights.items()}
        direct: Found = {
            name: None
            if all(row[1][name] is None for row in rows)
            else _rows([row[1][name] for row in rows], leaf, loss.ndim)
            for name, leaf in leaves.items()
        }
        return Validation(loss=loss.detach(), g=g, direct=direct)

    return _over_ranks(problem.pure("val_loss", weights, leaves, batch, inside), problem.ranks, leaves)


def _over_ranks(local: Validation, ranks: Ranks, leaves: Tree) -> Validation:
    """The means over the ranks, by one all-reduce."""
    if ranks.size == 1:
        return local
    g = {f"w:{name}": value for name, value in local.g.items()}
    like = {f"l:{name}": leaf for name, leaf in trees.expanded(leaves, local.loss.shape).items()}
    direct = {f"l:{name}": value for name, value in local.direct.items()}
    loss, found = ranks.mean_with_loss(local.loss, {**g, **direct}, {**g, **like})
    return Validation(
        loss=loss,
        g=trees.present({name: found[f"w:{name}"] for name in local.g}),
        direct={name: found[f"l:{name}"] for name in leaves},
    )


def _gradients(loss: Tensor, weights: Tree, leaves: Tree, last: bool) -> tuple[Found, Found]:
    """∂loss/∂w and ∂loss/∂λ in one backward pass; ``None`` for what the loss does not touch."""
    inputs = [*weights.values(), *leaves.values()]
    found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=not last)
    return (
        dict(zip(weights, found[: len(weights)], strict=True)),
        dict(zip(leaves, found[len(weights) :], strict=True)),
    )


def _check_seen(rows: list[tuple[Found, Found]]) -> None:
    """Raise where L_V depends on nothing that is given, and warn where it does not depend on the weights."""
    of_weights, of_leaves = ([part for row in rows for part in row[which].values() if part is not None] for which in (0, 1))
    for of_weight, _ in rows:
        check_dense(of_weight)
    if not of_weights and not of_leaves:
        raise ValueError(
            "the validation loss touches none of the weights and hyperparameters: compute it with the model it is given"
        )
    if not of_weights:
        warnings.warn(
            "the validation loss touches none of the weights: the hypergradient is its direct term alone. Is it computed "
            "with the model it is given?",
            stacklevel=2,
        )


def _rows(parts: list[Tensor | None], like: Tensor, vector: int) -> Tensor:
    whole = [torch.zeros_like(like) if part is None else part for part in parts]
    return torch.stack(whole) if vector else whole[0]


def assembled(
    validation: Validation,
    leaves: Tree,
    unread: Unread,
    pulled: Callable[[Tree], Found],
    train_loss: Tensor,
    value: Tree,
) -> Hypergradient:
    """∂L_V/∂λ + ``pulled(x)``, which is −Bᵀx, with zeros for what was not touched; ``value`` is F.

    The host looks once, also at what the solver left for it; a failed one is filled with NaN.
    """
    found = pulled(unread.value)
    direct, indirect = (_whole(part, leaves, validation.loss) for part in (validation.direct, found))
    both = {name: part for name, part in direct.items() if validation.direct[name] is not None}
    grads = indirect | (trees.add(both, indirect) if both else {})
    norms = [trees.norm_parts(list(tree.values())) for tree in (value, grads)]
    tensors = [validation.loss.sum(), train_loss, *norms[0], *norms[1]]
    device = unread.figures.device  # hyperparameters may live on another one
    small = torch.stack([t if t.device == device else t.to(device) for t in tensors])
    figures = torch.cat([unread.figures, small]).tolist()
    rest = figures[len(unread.figures) :]
    solution = unread.read(figures[: len(unread.figures)])
    if solution.value is not unread.value:  # what was read asked for another attempt
        return assembled(validation, leaves, Unread.known(solution), pulled, train_loss, value)
    gradient, length = math.hypot(*rest[2 : 2 + len(norms[0])]), math.hypot(*rest[2 + len(norms[0]) :])
    result = Hypergradient(
        grads=grads,
        direct=direct,
        indirect=indirect,
        solution=solution,
        val_loss=validation.loss,
        train_loss=train_loss,
        gradient_norm=train_loss.new_tensor(gradient, dtype=torch.promote_types(train_loss.dtype, torch.float32)),
        untouched=tuple(name for name in leaves if validation.direct[name] is None and found[name] is None),
    )
    return _judged(result, rest[0], rest[1], gradient, length)


def _whole(found: Found, leaves: Tree, loss: Tensor) -> Tree:
    """With zeros, of one number each, for what is not there, and a leading axis where the losses have one."""

    def zeros(leaf: Tensor) -> Tensor:
        return leaf.new_zeros(()).expand((*loss.shape, *leaf.shape))

    return {name: zeros(leaf) if (value := found[name]) is None else value.detach() for name, leaf in leaves.items()}


def _judged(result: Hypergradient, val_loss: float, train_loss: float, gradient: float, grads: float) -> Hypergradient:
    """The result, given both losses, ‖F‖ and ‖grads‖ on the host; a failed one filled with NaN."""
    solution = result.solution
    if not math.isfinite(gradient):
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail="of the training loss")
    for name, loss in (("validation", val_loss), ("training", train_loss)):
        if not math.isfinite(loss):
            solution = replace(solution, status=Status.NON_FINITE_LOSS, detail=f"the {name} loss is {loss}")
    if solution.status.ok and not math.isfinite(grads):
        term = "indirect" if bool(trees.norm(result.direct).isfinite()) else "direct"
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail=f"in the {term} term")
    if solution.status.ok:
        return result
    nan = {name: torch.full_like(value, math.nan) for name, value in result.direct.items()}
    return replace(result, grads=nan, indirect=nan, solution=replace(solution, state={}))
