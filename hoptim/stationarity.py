"""F(w, λ) at one point, with A = ∂F/∂w and B = ∂F/∂λ: products from one graph that is built once and used many times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hoptim.operators import Operator, Symmetric, rows
from hoptim.problem import Parts, Problem
from hoptim.trees import Tree

Found = dict[str, Tensor | None]  # by name; None for what a loss does not touch
R = TypeVar("R")


def as_leaves(live: Tree) -> Tree:
    """Fresh leaves on the same memory: nothing computed from them can reach the live parameters' ``.grad`` or hooks."""
    return {name: value.detach().requires_grad_() for name, value in live.items()}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where F is linearised.

    Attributes:
        problem: the problem whose training loss it is.
        live: the live weights and hyperparameters, which the problem itself can't name while they are swapped.
        weights: w, fresh leaves on the live memory.
        leaves: λ, likewise.
        batch: the training batch.
        draw: gives another training batch; ``None`` where there is no source of more.
    """

    problem: Problem
    live: tuple[Tree, Tree]
    weights: Tree
    leaves: Tree
    batch: Any
    draw: Callable[[], Any] | None = None

    @classmethod
    def of(cls, problem: Problem, batch: Any, draw: Callable[[], Any] | None = None) -> Point:
        """The model's present weights and hyperparameters."""
        live = problem.weights(), problem.leaves()
        weights, leaves = as_leaves(live[0]), as_leaves(live[1])
        return cls(problem=problem, live=live, weights=weights, leaves=leaves, batch=batch, draw=draw)

    def another(self, who: str) -> Any:
        """Another training batch, for ``who`` asks."""
        if self.draw is None:
            raise ValueError(f"{who} needs more training batches: give train_batches")
        return self.draw()


@dataclass(frozen=True, kw_only=True)
class Linearized:
    """F and its derivatives at one point.

    Attributes:
        loss: L_T, detached.
        value: F, detached, by the names of the weights that the training loss touches.
        A: ∂F/∂w on these weights.
        mixed: x ↦ Bᵀx, shaped as λ, or R of them; ``None`` for a hyperparameter that F does not depend on.
        untouched: the weights that the training loss does not touch.
        fixed: the weights that it touches and the inner optimizer does not hold, where that is asked.
    """

    loss: Tensor
    value: Tree
    A: Operator
    mixed: Callable[[Tree], Found]
    untouched: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()


class Curvature(ABC):
    """A strategy for A = ∂F/∂w: a frozen dataclass that linearises F = ∇_w L_T at a point."""

    @staticmethod
    def check(curvature: object) -> None:
        """Raise unless it is one."""
        if not isinstance(curvature, Curvature):
            raise TypeError(f"curvature is a {type(curvature).__name__}: give a curvature, such as hoptim.Exact()")

    @abstractmethod
    def linearize(self, point: Point, then: Callable[[Linearized], R]) -> R:
        """``then`` of the linearised F: inside, because backward passes must find the tensors swapped as the loss did."""


class StationarityGraph:
    """F(w, λ) = ∇_w L_T with its graph kept: every product with A = ∂F/∂w and B = ∂F/∂λ is one backward pass through it.

    The graph costs one training gradient with ``create_graph=True``; a product costs 0.9 to 1.9 gradients more. Dropout
    masks are part of the graph: one mask for a whole solve.

    Args:
        loss: L_T, computed from the two that follow.
        weights: w, leaves that require a gradient.
        leaves: λ, likewise.
        parts: the loss taken apart, where it is a :class:`CompositeLoss`.

    Raises:
        TypeError: a weight has a sparse gradient.
    """

    def __init__(self, loss: Tensor, weights: Tree, leaves: Tree, parts: Parts | None = None) -> None:
        self.loss, self.parts = loss, parts
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        found = dict(zip(weights, gradients, strict=True))
        check_dense(found)
        self.value: Tree = {name: gradient for name, gradient in found.items() if gradient is not None}
        self.weights = {name: weights[name] for name in self.value}
        self.leaves = leaves
        self._outputs = {name: value for name, value in self.value.items() if value.requires_grad}
        self.untouched_weights = [name for name, gradient in found.items() if gradient is None]

    def vjp(self, v: Tree, inputs: Tree, *, batched: bool = False) -> Found:
        """vᵀ ∂F/∂inputs; ``None`` for an input that F does not depend on. ``batched``: R products in one vmapped pass."""
        outputs = self._outputs
        if not outputs or not inputs:
            return dict.fromkeys(inputs)
        return pulled_back(outputs, v, inputs, batched=batched)

    def jacobian(self) -> Operator:
        """A = ∂F/∂w = the Hessian of L_T: symmetric, so that vᵀA is A v."""

        def product(v: Tree, batched: bool) -> Tree:
            found = self.vjp(v, self.weights, batched=batched)
            return {name: torch.zeros_like(v[name]) if part is None else part for name, part in found.items()}

        return symmetric(product, self.weights, "Hessian")

    def mixed(self, x: Tree) -> Found:
        """Bᵀx, shaped as λ, or R of them; ``None`` for a hyperparameter that F does not depend on."""
        name, value = next(iter(x.items()))
        return self.vjp(x, self.leaves, batched=value.ndim > self.weights[name].ndim)


def check_dense(gradients: Mapping[str, Tensor | None]) -> None:
    """Raise where a gradient is sparse."""
    if sparse := [name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse]:
        raise TypeError(f"the weights {sparse} have sparse gradients: build their layers with sparse=False")


def check_twice_differentiable(problem: Problem, loss: Tensor) -> None:
    """Raise where autograd can't go back a second time: it would leave that way out without a word. Once a problem.

    A backward pass that is marked ``once_differentiable`` raises only if a second one runs through it to the end, and none
    does that asks for the weights alone.
    """
    if problem in _LOOKED_AT:
        return
    seen: set[Any] = set()
    todo: list[Any] = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    custom = [type(node)._forward_cls for node in seen if isinstance(node, BackwardCFunction)]  # type: ignore[attr-defined]
    if once := sorted({kind.__name__ for kind in custom if getattr(kind.backward, "__code__", None) is _ONCE}):
        raise TypeError(
            f"the training loss has no second derivative: the custom functions {once} are once_differentiable. Take "
            "curvature=hoptim.FiniteDifference()"
        )
    _LOOKED_AT.add(problem)


def check_once(point: Point) -> None:
    """The same, for those who build no graph of their own; it costs one loss, the first time."""
    if point.problem not in _LOOKED_AT:
        at = (point.weights, point.leaves, point.batch)
        with point.problem.untouched():
            point.problem.pure("train_loss", *at, lambda loss, _: check_twice_differentiable(point.problem, loss))


_LOOKED_AT: WeakSet[Problem] = WeakSet()  # problems whose graph has been looked through
_ONCE = once_differentiable(lambda _: None).__code__


def symmetric(product: Callable[[Tree, bool], Tree], weights: Tree, kind: str) -> Operator:
    """The symmetric operator of a product that is told whether its vector is one of R."""
    like = {name: value.detach() for name, value in weights.items()}
    key = (kind, *((name, value.shape, value.dtype, value.device) for name, value in like.items()))

    def apply(v: Tree) -> Tree:  # it names no operator: a cycle would keep the graph until a garbage collection
        name, value = next(iter(v.items()))
        if value.ndim == like[name].ndim:
            return product(v, False)
        return rows(lambda v: product(v, v[name].ndim > like[name].ndim), v, key)

    return Symmetric(apply, like)


def pulled_back(outputs: Tree, v: Tree, inputs: Tree, *, batched: bool) -> Found:
    """vᵀ ∂outputs/∂inputs through a graph that is kept; ``batched``: R products in one vmapped pass."""
    ends, vectors = tuple(outputs.values()), tuple(v[name] for name in outputs)
    if _engine is not None and not batched:  # autograd.grad without what it looks at each time: a tenth of a small product
        found = _engine(ends, vectors, True, False, tuple(inputs.values()), True, accumulate_grad=False)
    else:
        found = torch.autograd.grad(
            ends, list(inputs.values()), vectors, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
    return dict(zip(inputs, found, strict=True))


_engine = getattr(torch.autograd.graph, "_engine_run_backward", None)  # private; without it autograd.grad serves
