"""A strategy for the curvature that differentiates once: central differences of gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import Curvature, Linearization, Point, R, check_dense, symmetric
from hoptim.linalg import trees
from hoptim.linalg.trees import Found, Tree
from hoptim.problem.mixed_precision import epsilon_of_losses
from hoptim.problem.problem import set_generators
from hoptim.validation import is_finite


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """Central differences of gradients: A v = (∇L_T(w + εv) − ∇L_T(w − εv)) / 2ε, and Bᵀx likewise. No double backward.

    For models whose second derivatives do not exist in torch. A product costs two gradients; the random state is replayed,
    so that the dropout masks of all gradients are the same.

    Args:
        step: the length of εv relative to that of w, > 0; ``None``, the default, for the cube root of the precision.

    Raises:
        ValueError: ``step`` is not positive.

    Source: Liu, Simonyan and Yang 2019 (arXiv 1806.09055), equation 8; the step: Nocedal and Wright, section 8.1.

    >>> FiniteDifference(step=1e-3)
    FiniteDifference(step=0.001)
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not (is_finite(self.step) and self.step > 0):
            raise ValueError(f"step={self.step!r}: give a positive number, or None to choose it")

    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
        """``then`` of F; each product evaluates two gradients elsewhere."""
        states = point.problem.generators()  # of the masks: a batch that is drawn between two products must not change them
        loss, gradient, _ = gradients(point, point.weights)
        touched = trees.present(gradient)
        weights = {name: point.weights[name].detach() for name in touched}
        length = trees.norm(weights) if weights else torch.ones(())
        reach = torch.where(length > 0, length, 1.0) * (self.step or epsilon_of_losses(length.dtype) ** (1 / 3))

        def difference(v: Tree) -> tuple[Found, Found]:
            along = trees.norm(v)
            epsilon = reach / torch.where(along > 0, along, 1.0)
            ends = []
            for sign in (1, -1):
                moved = {name: (value + sign * epsilon * v[name]).requires_grad_() for name, value in weights.items()}
                ends.append(gradients(point, {**point.weights, **moved}, states)[1:])
            (up, up_leaves), (down, down_leaves) = ends
            return _quotient(up, down, 2 * epsilon), _quotient(up_leaves, down_leaves, 2 * epsilon)

        def one(v: Tree) -> Tree:
            return trees.filled(difference(v)[0], v)

        def product(v: Tree, batched: bool) -> Tree:
            return trees.stack([one(trees.part(v, i)) for i in range(trees.length(v))]) if batched else one(v)

        def mixed(x: Tree) -> Found:
            name, value = next(iter(x.items()))
            if value.ndim == weights[name].ndim:
                return difference(x)[1]
            return trees.stack_found([difference(trees.part(x, i))[1] for i in range(len(value))])

        untouched = tuple(name for name in gradient if name not in touched)
        A = symmetric(product, weights, "finite differences")
        return then(Linearization(loss=loss, value=touched, A=A, mixed=mixed, untouched=untouched))


def gradients(point: Point, weights: Tree, states: Tree | None = None) -> tuple[Tensor, Found, Found]:
    """L_T, ∂L_T/∂w and ∂L_T/∂λ at other weights, from these random states, else the present ones, which are left alone."""

    def inside(loss: Tensor, _: Any) -> tuple[Tensor, Found, Found]:
        inputs = [*weights.values(), *point.leaves.values()]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        by_weight: Found = dict(zip(weights, found[: len(weights)], strict=True))
        by_leaf: Found = dict(zip(point.leaves, found[len(weights) :], strict=True))
        check_dense(by_weight)
        return loss.detach(), by_weight, by_leaf

    with point.problem.untouched():
        set_generators(states or {})
        return point.problem.pure("train_loss", weights, point.leaves, point.batch, inside)


def _quotient(up: Found, down: Found, width: Tensor) -> Found:
    """(up − down) / width, where both are there."""
    found: Found = {}
    for name, high in up.items():
        low = down[name]
        found[name] = None if high is None or low is None else (high - low) / width
    return found
