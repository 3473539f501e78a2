"""The hypergradient dL_V/dλ = ∂L_V/∂λ − Bᵀx with Aᵀx = g: formula (1), read top to bottom."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hoptim import trees
from hoptim.operators import Curvature, Exact, StationarityGraph, in_float32
from hoptim.options import is_finite
from hoptim.problem import Parts, Problem
from hoptim.solvers.base import Solution, Solver, Status
from hoptim.solvers.stationary import Neumann
from hoptim.trees import Tree

Found = dict[str, Tensor | None]  # by name; None for what a loss does not touch


@dataclass(frozen=True, kw_only=True)
class Hypergradient:
    """A hypergradient, its two terms and the solve behind it.

    After a failed solve ``indirect`` and ``grads`` are NaN throughout, so that they cannot pass as an answer.

    Attributes:
        grads: dL_V/dλ = direct + indirect, by the names of ``hparams.named_parameters()``: with respect to the leaves.
        direct: ∂L_V/∂λ.
        indirect: −Bᵀx.
        solution: x, its status and its residuals.
        val_loss: L_V, a scalar on the device.
        train_loss: L_T, a scalar on the device.
        gradient_norm: ‖∇_w L_T‖, a scalar on the device: zero at a stationary point, where the formula is exact.
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


class Method(ABC):
    """A strategy for the hypergradient: a frozen dataclass that owns its options and keeps no state."""

    @abstractmethod
    def __call__(self, problem: Problem, train_batch: Any, val_batch: Any, state: Tree | None = None) -> Hypergradient:
        """The hypergradient at the model's present weights; ``state`` is that of the last call's solution."""


@dataclass(frozen=True)
class Implicit(Method):
    """Implicit differentiation of a stationary point of the training loss: dL_V/dλ = ∂L_V/∂λ − Bᵀx, (A + damping·I)ᵀx = g.

    F = ∇_w L_T, A = ∂F/∂w, B = ∂F/∂λ, g = ∂L_V/∂w, all at the model's present weights.

    Args:
        solver: how far to go in solving for x; default ``Neumann()``.
        curvature: which matrix stands for A; default ``Exact()``.
        damping: added to A's diagonal, ≥ 0, default 0.

    Raises:
        ValueError: ``damping`` is negative or not finite; when called, a training loss that touches no weight.
        TypeError: ``solver`` is no :class:`Solver`, or ``curvature`` no ``Curvature``.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), theorem 1 and algorithm 2.
    """

    solver: Solver = field(default_factory=Neumann)
    _: KW_ONLY
    curvature: Curvature = field(default_factory=Exact)
    damping: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver is a {type(self.solver).__name__}: give a solver, such as hoptim.Neumann(terms=20)")
        if not isinstance(self.curvature, Curvature):
            raise TypeError(f"curvature is a {type(self.curvature).__name__}: give a curvature, such as hoptim.Exact()")
        if not (is_finite(self.damping) and self.damping >= 0):
            raise ValueError(f"damping={self.damping!r}: give a finite number, 0 or more")

    def __call__(self, problem: Problem, train_batch: Any, val_batch: Any, state: Tree | None = None) -> Hypergradient:
        """The hypergradient at the model's present weights; ``state`` is that of the last call's solution."""
        weights, leaves = _as_leaves(problem.weights()), _as_leaves(problem.leaves())

        def validate(loss: Tensor, _: Parts | None) -> tuple[Tensor, Found, Found]:
            return loss.detach(), *_gradients(loss, weights, leaves)

        def implicit(loss: Tensor, parts: Parts | None) -> Hypergradient:
            graph = StationarityGraph(loss, weights, leaves, parts)
            _check_weights(graph)
            A = in_float32(self.curvature(graph)) + self.damping
            rhs = trees.widened({name: _or_zero(g[name], weights[name]) for name in graph.weights})
            solution = self.solver.solve(A, rhs, state)
            x = trees.cast(solution.value, graph.weights)
            return _assembled(val_loss, direct, graph, solution, graph.mixed(x))

        with problem.untouched():
            val_loss, g, direct = problem.pure("val_loss", weights, leaves, val_batch, validate)
            return _judged(problem.pure("train_loss", weights, leaves, train_batch, implicit))


def hypergradient(problem: Problem, train_batch: Any, val_batch: Any, method: Method | None = None) -> Hypergradient:
    """One hypergradient dL_V/dλ at the model's present weights, for any loop; it touches nothing.

    Args:
        problem: the bilevel problem.
        train_batch: the batch for the training loss.
        val_batch: the batch for the validation loss.
        method: how to compute it; default ``Implicit()``.

    Returns:
        The result; look at ``result.solution.status`` before using ``result.grads``.

    Raises:
        TypeError: ``problem`` is no :class:`Problem`, or ``method`` no method.
        ValueError: a hyperparameter that neither loss touches, no weight that the training loss touches, or a loss that is
            no scalar.

    Ridge regression with one weight, in closed form: w = sxy / (sxx + λ), and dL_V/dλ = −(w − y_V)·w / (sxx + λ).

    >>> from torch import nn
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
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is a {type(problem).__name__}: give hoptim.Problem(model, hparams, train_loss, val_loss)")
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"method is a {type(method).__name__}: give a method, such as hoptim.Implicit(solver)")
    result = (Implicit() if method is None else method)(problem, train_batch, val_batch)
    result.check_touched()
    return result


def _as_leaves(live: Tree) -> Tree:
    """Fresh leaves on the same memory: nothing computed from them can reach the live parameters' ``.grad`` or hooks."""
    return {name: value.detach().requires_grad_() for name, value in live.items()}


def _gradients(loss: Tensor, weights: Tree, leaves: Tree) -> tuple[Found, Found]:
    """g = ∂loss/∂w and ∂loss/∂λ in one backward pass; ``None`` for what the loss does not touch."""
    found = torch.autograd.grad(loss, [*weights.values(), *leaves.values()], allow_unused=True)
    return (
        dict(zip(weights, found[: len(weights)], strict=True)),
        dict(zip(leaves, found[len(weights) :], strict=True)),
    )


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _check_weights(graph: StationarityGraph) -> None:
    names = graph.untouched_weights
    if not graph.weights:
        raise ValueError(f"the training loss touches none of the weights {names}: compute it with the model it is given")
    if names:
        warnings.warn(
            f"the training loss does not touch the weights {names}: they are left out of the hypergradient. Freeze them "
            "with requires_grad_(False), or use them in the training loss",
            stacklevel=4,
        )


def _assembled(val_loss: Tensor, direct: Found, graph: StationarityGraph, solution: Solution, mixed: Found) -> Hypergradient:
    """∂L_V/∂λ − Bᵀx, with zeros for what was not touched."""
    leaves = graph.leaves
    indirect = {name: -_or_zero(mixed[name], leaf) for name, leaf in leaves.items()}
    whole = {name: _or_zero(direct[name], leaf) for name, leaf in leaves.items()}
    return Hypergradient(
        grads={name: whole[name] + indirect[name] for name in leaves},
        direct=whole,
        indirect=indirect,
        solution=solution,
        val_loss=val_loss,
        train_loss=graph.loss.detach(),
        gradient_norm=trees.norm(graph.value).detach(),
        untouched=tuple(name for name in leaves if direct[name] is None and mixed[name] is None),
    )


def _judged(result: Hypergradient) -> Hypergradient:
    """Look at the finished result once, and fill a failed one with NaN."""
    tensors = [
        result.val_loss,
        result.train_loss,
        result.gradient_norm,
        trees.norm(result.direct),
        trees.norm(result.indirect),
    ]
    device = tensors[0].device  # hyperparameters may live on another one
    val_loss, train_loss, gradient, direct, indirect = torch.stack([t.float().to(device) for t in tensors]).tolist()
    solution = result.solution
    if not math.isfinite(gradient):
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail="of the training loss")
    for name, loss in (("validation", val_loss), ("training", train_loss)):
        if not math.isfinite(loss):
            solution = replace(solution, status=Status.NON_FINITE_LOSS, detail=f"the {name} loss is {loss}")
    if solution.status.ok and not (math.isfinite(direct) and math.isfinite(indirect)):
        term = "direct" if math.isfinite(indirect) else "indirect"
        solution = replace(solution, status=Status.NON_FINITE_GRADIENT, detail=f"in the {term} term")
    if solution.status.ok:
        return result
    nan = {name: torch.full_like(value, math.nan) for name, value in result.direct.items()}
    return replace(result, grads=nan, indirect=nan, solution=replace(solution, state={}))
