"""Strategies for the curvature of the training loss that differentiate twice: exact, and Gauss-Newton."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hoptim.curvature.linearization import (
    Curvature,
    Linearization,
    Point,
    R,
    StationarityGraph,
    check_once,
    check_twice_differentiable,
    symmetric,
)
from hoptim.linalg import trees
from hoptim.linalg.operators import Operator, Symmetric
from hoptim.linalg.trees import Tree
from hoptim.problem.composite_loss import LossParts

if TYPE_CHECKING:
    from hoptim.curvature.compiled.programs import Products


@dataclass(frozen=True, kw_only=True)
class _Graph(Curvature):
    """What is built on the cached graph of F, or on compiled ones."""

    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile={self.compile!r}: give True or False")

    @abstractmethod
    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""

    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
        """``then`` of the linearised F, from one graph."""
        if self.compile:
            from hoptim.curvature.compiled.programs import compiled_products  # what it needs of torch takes long to import

            check_once(point)
            gauss_newton = not isinstance(self, Exact)
            products = compiled_products(point.problem, point.weights, point.leaves, point.batch, gauss_newton=gauss_newton)
            if products is not None:
                return then(_from_compiled(products, point.weights))

        def inside(loss: Tensor, parts: LossParts | None) -> R:
            check_twice_differentiable(point.problem, loss, point.weights, point.leaves, point.batch)
            graph = StationarityGraph(loss, point.weights, point.leaves, parts)
            return then(
                Linearization(
                    loss=loss.detach(),
                    value=trees.map_tree(torch.Tensor.detach, graph.value),
                    A=self(graph) if graph.weights else symmetric(lambda v, _: v, {}, "nothing"),
                    mixed=graph.mixed,
                    untouched=tuple(graph.untouched_weights),
                )
            )

        return point.problem.pure("train_loss", point.weights, point.leaves, point.batch, inside)


def _from_compiled(products: Products, weights: Tree) -> Linearization:
    like = {name: weights[name].detach() for name in products.value}
    A = Symmetric(products.product, like)
    untouched = tuple(products.untouched)
    return Linearization(loss=products.loss, value=products.value, A=A, mixed=products.mixed, untouched=untouched)


@dataclass(frozen=True, kw_only=True)
class Exact(_Graph):
    """The exact curvature: A = ∂F/∂w by double backward through one cached graph.

    Args:
        compile: trace and compile the products, default ``False``: seconds once a run and once a shape of batch, then faster
            ones. What can't be traced goes on as without, with a warning that names the operation.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""
        return graph.jacobian()
