"""The Gauss-Newton curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hoptim.curvature.linearization import (
    Linearization,
    Point,
    R,
    StationarityGraph,
    symmetric,
)
from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Found, Tree
from hoptim.linalg.vjp import VJP
from hoptim.problem.composite_loss import CompositeLoss

if TYPE_CHECKING:
    pass

from hoptim.curvature.exact import _Graph

NO_PARTS = (
    "GaussNewton needs a training loss that shows its parts: build it as hoptim.CompositeLoss(predict, criterion, penalty), "
    "or take hoptim.Exact()"
)


@dataclass(frozen=True, kw_only=True)
class GaussNewton(_Graph):
    """The Gauss-Newton curvature of the criterion plus the exact Hessian of the penalty: A = Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w².

    J = ∂z/∂w is the derivative of the model's output. Positive semidefinite where the criterion is convex in z and the
    penalty in w, however curved the model is. Products go through cached graphs: J v by a double backward pass, the
    criterion's Hessian on z alone, Jᵀ by one more backward pass; no output Hessian is formed.

    Args:
        compile: trace and compile the products, default ``False``, as in :class:`Exact`.

    Raises:
        ValueError: when called, the training loss is no :class:`CompositeLoss`.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".
    """

    def linearize(self, point: Point, then: Callable[[Linearization], R]) -> R:
        """``then`` of the linearised F."""
        if not isinstance(point.problem.train_loss, CompositeLoss):
            raise ValueError(NO_PARTS)
        return super().linearize(point, then)

    def __call__(self, graph: StationarityGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""
        if graph.parts is None:
            raise ValueError(NO_PARTS)
        weights, parts = graph.weights, graph.parts
        z = {"z": parts.z}
        at = {"z": parts.z.detach().requires_grad_()}
        slope = {"z": _gradient(parts.criterion(at["z"]), at)["z"]}
        u = {"z": torch.zeros_like(parts.z).requires_grad_()}  # Jᵀu is linear in u, so that its derivative along v is J v
        pulled = trees.present(_graph_of(z, u, weights)) if parts.z.requires_grad else {}
        penalty = {} if parts.penalty is None else _penalty_gradient(parts.penalty, weights)

        along, curved, back, second = (VJP(*ends) for ends in ((pulled, u), (slope, at), (z, weights), (penalty, weights)))
        bends = bool(pulled) and slope["z"].requires_grad

        def product(v: Tree, batched: bool) -> Tree:
            found: Found = dict.fromkeys(v)
            Jv = along(v, batched)["z"] if bends else None
            HJv = None if Jv is None else curved({"z": Jv}, batched)["z"]
            if HJv is not None:
                found = back({"z": HJv}, batched)
            if penalty:
                found = {name: trees.sum_of(found[name], part) for name, part in second(v, batched).items()}
            return trees.filled(found, v)

        return symmetric(product, weights, "Gauss-Newton")


def _gradient(value: Tensor, inputs: Tree) -> Tree:
    """∂value/∂inputs with its graph; zeros where there is no dependence."""
    if not value.requires_grad:
        return trees.zeros_like(inputs)
    found = torch.autograd.grad(value, list(inputs.values()), create_graph=True, materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def _graph_of(outputs: Tree, v: Tree, inputs: Tree) -> Found:
    """vᵀ ∂outputs/∂inputs, as a function of v."""
    found = torch.autograd.grad(
        list(outputs.values()), list(inputs.values()), list(v.values()), create_graph=True, allow_unused=True
    )
    return dict(zip(inputs, found, strict=True))


def _penalty_gradient(penalty: Tensor, weights: Tree) -> Tree:
    """∂penalty/∂w with its graph, where it depends on a weight."""
    if not penalty.requires_grad:
        return {}
    found = torch.autograd.grad(penalty, list(weights.values()), create_graph=True, allow_unused=True)
    return {name: part for name, part in trees.present(dict(zip(weights, found, strict=True))).items() if part.requires_grad}
