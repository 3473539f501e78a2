"""F(w, λ) at one point, with A = ∂F/∂w and B = ∂F/∂λ: products from one graph that is built once and used many times."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator, Symmetric, rows
from hoptim.linalg.trees import Found, Tree
from hoptim.linalg.vjp import VJP, nodes, not_twice
from hoptim.problem.composite_loss import LossParts
from hoptim.problem.distributed import OverRanks, Ranks
from hoptim.problem.mixed_precision import epsilon_of_losses
from hoptim.problem.problem import Problem
from hoptim.validation import describe_type

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
class Linearization:
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


def over_ranks(local: Linearization, ranks: Ranks, at: Point) -> Linearization:
    """F and its derivatives averaged over the ranks; a weight counts where any of them touches it."""
    if ranks.size == 1:
        return local
    loss, found = ranks.mean_with_loss(local.loss, local.value, at.weights)
    value = trees.present(found)

    def mixed(x: Tree) -> Found:
        name, first = next(iter(x.items()))
        lead = first.shape[: first.ndim - at.weights[name].ndim]
        here = local.mixed({name: x[name] for name in local.A.like}) if local.A.like else {}
        return ranks.mean_of_found(here, trees.expanded(at.leaves, lead))

    return Linearization(
        loss=loss,
        value=value,
        A=OverRanks(local.A, {name: at.weights[name].detach() for name in value}, ranks),
        mixed=mixed,
        untouched=tuple(name for name in at.weights if name not in value),
    )


class Curvature(ABC):
    """A strategy for A = ∂F/∂w: a frozen dataclass that linearises F = ∇_w L_T at a point."""

    @staticmethod
    def check(curvature: object) -> None:
        """Raise unless it is one."""
        if not isinstance(curvature, Curvature):
            raise TypeError(f"curvature is {describe_type(curvature)}: give a curvature, such as hoptim.Exact()")

    @abstractmethod
    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
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

    def __init__(self, loss: Tensor, weights: Tree, leaves: Tree, parts: LossParts | None = None) -> None:
        self.loss, self.parts = loss, parts
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        found = dict(zip(weights, gradients, strict=True))
        check_dense(found)
        self.value = trees.present(found)
        self.weights = {name: weights[name] for name in self.value}
        self.leaves = leaves
        self._outputs = {name: value for name, value in self.value.items() if value.requires_grad}
        self.untouched_weights = [name for name, gradient in found.items() if gradient is None]

    def vjp(self, inputs: Tree) -> VJP:
        """v ↦ vᵀ ∂F/∂inputs; ``None`` for an input that F does not depend on."""
        return VJP(self._outputs, inputs)

    def jacobian(self) -> Operator:
        """A = ∂F/∂w = the Hessian of L_T: symmetric, so that vᵀA is A v."""
        vjp = self.vjp(self.weights)

        def product(v: Tree, batched: bool) -> Tree:
            return trees.filled(vjp(v, batched), v)

        return symmetric(product, self.weights, "Hessian")

    def mixed(self, x: Tree) -> Found:
        """Bᵀx, shaped as λ, or R of them; ``None`` for a hyperparameter that F does not depend on."""
        name, value = next(iter(x.items()))
        return self.vjp(self.leaves)(x, value.ndim > self.weights[name].ndim)


def check_dense(gradients: Mapping[str, Tensor | None]) -> None:
    """Raise where a gradient is sparse."""
    if sparse := [name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse]:
        raise TypeError(f"the weights {sparse} have sparse gradients: build their layers with sparse=False")


def check_twice_differentiable(problem: Problem, loss: Tensor, weights: Tree, leaves: Tree, batch: Any) -> None:
    """Raise where autograd can't go back a second time: it would leave that way out without a word. Once a problem.

    A backward pass that is marked ``once_differentiable`` raises only if a second one runs through it to the end, and none
    does that asks for the weights alone. One that is not marked, and takes a way round autograd, is found by its answers.
    """
    if problem in _LOOKED_AT:
        return
    seen = nodes([loss])
    custom = [type(node)._forward_cls for node in seen if isinstance(node, BackwardCFunction)]  # type: ignore[attr-defined]
    if once := sorted({kind.__name__ for kind in custom if getattr(kind.backward, "__code__", None) is _ONCE}):
        raise not_twice(f"the custom functions {once} are once_differentiable")
    if any(node.name() == "WeightNormInterfaceBackward0" for node in seen):
        raise not_twice("that of torch._weight_norm lacks a term. Use torch.nn.utils.parametrizations.weight_norm")
    _LOOKED_AT.add(problem)
    if custom and (off := _off_differences(problem, weights, leaves, batch)):
        warnings.warn(
            f"autograd's curvature is off by {off:.0%} from differences of gradients: a custom function's backward pass, in "
            f"{sorted({kind.__name__ for kind in custom})}, has no derivative or a wrong one; it may use detach(), .data, "
            "NumPy or a kernel. Take curvature=hoptim.FiniteDifference()",
            stacklevel=2,
        )


def _off_differences(problem: Problem, weights: Tree, leaves: Tree, batch: Any) -> float:
    """How far A v is from two differences of gradients that agree; 0 where it is near, or where they do not agree."""
    draw = torch.Generator().manual_seed(0)
    v = {name: torch.randn(w.shape, generator=draw).to(w) for name, w in weights.items()}
    length = trees.norm(weights).detach() / trees.norm(v)
    reach = length * epsilon_of_losses(length.dtype) ** (1 / 3)

    def at(moved: Tree, twice: bool) -> Tree:
        def inside(loss: Tensor, _: Any) -> Tree:
            graph = StationarityGraph(loss, moved, leaves)
            found = graph.vjp(graph.weights)(v) if twice else graph.value
            return trees.map_tree(torch.Tensor.detach, trees.filled(found, weights))

        with problem.untouched():  # from the same random state each time
            return problem.pure("train_loss", moved, leaves, batch, inside)

    def difference(step: Tensor) -> Tree:
        up, down = (at(as_leaves(trees.add(weights, trees.times(v, dict.fromkeys(v, e)))), False) for e in (step, -step))
        return trees.map_tree(lambda d: d / (2 * step), trees.add(up, down, -1.0))

    product, near, far = at(weights, True), difference(reach), difference(2 * reach)
    off, noise, size = (trees.norm(x) for x in (trees.add(product, near, -1.0), trees.add(near, far, -1.0), near))
    return float(off / size) if off > 10 * noise + 0.01 * size else 0.0


def check_once(point: Point) -> None:
    """The same, for those who build no graph of their own; it costs one loss, the first time."""
    if point.problem not in _LOOKED_AT:
        at = (point.weights, point.leaves, point.batch)
        with point.problem.untouched():
            point.problem.pure("train_loss", *at, lambda loss, _: check_twice_differentiable(point.problem, loss, *at))


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
