"""A curvature that needs first derivatives alone: central differences of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import Curvature, Linearization, Point, as_leaves, check_dense
from hoptim.linalg import trees, vectors
from hoptim.linalg.operators import Symmetric
from hoptim.linalg.vectors import Layout, OptionalTree, Tree
from hoptim.problem.mixed_precision import epsilon_of_losses
from hoptim.problem.problem import set_generators
from hoptim.validation import is_finite


@dataclass(frozen=True, kw_only=True)
class FiniteDifference(Curvature):
    """Central differences of gradients: A v = (∇L_T(w + εv) − ∇L_T(w − εv)) / 2ε, and Bᵀx likewise. No double backward.

    For models without second derivatives in torch. A product costs two gradients; each starts from the same random state, so
    that dropout masks agree.

    Args:
        step: the length of εv relative to that of w, > 0; ``None``, the default, for the cube root of the rounding error.

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

    @contextmanager
    def linearize(self, point: Point) -> Iterator[Linearization]:
        """F; each product evaluates two gradients at other weights."""
        states = point.problem.generators()  # saved here, since drawing a batch between products would change the masks
        loss, gradient, _ = gradients(point, point.weights)
        touched = trees.present(gradient)
        layout = Layout.of({name: point.weights[name] for name in touched})
        w = layout.flatten(point.weights).detach()
        length = vectors.norm(w)
        reach = torch.where(length > 0, length, 1.0) * (
            self.step or epsilon_of_losses(*(w.dtype for w in point.weights.values())) ** (1 / 3)
        )

        def difference(v: Tensor) -> tuple[OptionalTree, OptionalTree]:
            """(∂F/∂w v, ∂F/∂λᵀ v)."""
            along = vectors.norm(v)
            epsilon = reach / torch.where(along > 0, along, 1.0)
            (up, up_leaves), (down, down_leaves) = (
                gradients(point, point.weights | as_leaves(layout.unflatten(w + step * v)), states)[1:]
                for step in (epsilon, -epsilon)
            )
            return _quotient(up, down, 2 * epsilon), _quotient(up_leaves, down_leaves, 2 * epsilon)

        def product(v: Tensor) -> Tensor:
            if v.ndim > 1:
                return torch.stack([product(row) for row in v])
            return layout.flatten(difference(v)[0])

        def mixed(x: Tensor) -> OptionalTree:
            return trees.stack([difference(row)[1] for row in x]) if x.ndim > 1 else difference(x)[1]

        yield Linearization(
            loss=loss,
            layout=layout,
            value=layout.flatten(touched),
            A=Symmetric(product, like=w),
            mixed=mixed,
            untouched=tuple(name for name in gradient if name not in touched),
        )


def gradients(point: Point, weights: Tree, states: Tree | None = None) -> tuple[Tensor, OptionalTree, OptionalTree]:
    """L_T, ∂L_T/∂w and ∂L_T/∂λ at other weights, under these random states or else the present ones, which do not change."""

    def inside(loss: Tensor, _: Any) -> tuple[Tensor, OptionalTree, OptionalTree]:
        inputs = [*weights.values(), *point.leaves.values()]
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
        by_weight: OptionalTree = dict(zip(weights, found[: len(weights)], strict=True))
        by_leaf: OptionalTree = dict(zip(point.leaves, found[len(weights) :], strict=True))
        check_dense(by_weight)
        return loss.detach(), by_weight, by_leaf

    with point.problem.untouched():
        set_generators(states or {})
        return point.problem.pure("train_loss", weights, point.leaves, point.batch, inside)


def _quotient(up: OptionalTree, down: OptionalTree, width: Tensor) -> OptionalTree:
    """(up − down) / width; ``None`` where one is missing."""
    pairs = ((name, high, down[name]) for name, high in up.items())
    return {name: None if high is None or low is None else (high - low) / width for name, high, low in pairs}
