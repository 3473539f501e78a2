"""The Gauss-Newton curvature: Jᵀ (criterion's Hessian) J + the penalty's Hessian, J being the Jacobian of the output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.exact import DoubleBackward
from hoptim.curvature.flatness import check_criterion
from hoptim.curvature.linearization import Draw, GradientGraph, Linearization, symmetric
from hoptim.curvature.second_derivatives import check_once
from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import OptionalTree, Tree
from hoptim.linalg.vjp import VJP
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.problem import At


@dataclass(frozen=True, kw_only=True)
class GaussNewton(DoubleBackward):
    """The Gauss-Newton curvature of the criterion plus the exact Hessian of the penalty: A = Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w².

    J = ∂z/∂w is the derivative of the model's output. A is positive semidefinite if the criterion is convex in z and the
    penalty in w, however curved the model is. Products go through cached graphs: J v by a double backward pass, the
    criterion's Hessian on z alone, Jᵀ by one more backward pass. The Hessian in z is never formed.

    Args:
        compile: trace and compile the products, default ``False``, as in :class:`Exact`.

    Raises:
        ValueError: when used, the training loss is no :class:`CompositeLoss`, or its criterion is linear in z, so that
            ∂²c/∂z² is zero, such as ``nll_loss`` of a model that ends in ``log_softmax``.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    >>> GaussNewton()
    GaussNewton(compile=False)
    """

    @contextmanager
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> Iterator[Linearization]:
        """F and its derivatives from one graph."""
        if not isinstance(at.problem.train_loss, CompositeLoss):
            raise ValueError(
                "GaussNewton needs a training loss that shows its parts: build it as "
                "hoptim.CompositeLoss(predict, criterion, penalty), or take hoptim.Exact()"
            )
        check_once(at, batch)
        check_criterion(at, batch)
        with super().linearize(at, batch, draw) as found:
            yield found

    def of(self, graph: GradientGraph) -> Operator:
        """Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w²."""
        weights, parts = graph.weights, graph.parts
        assert parts is not None  # linearize has checked that the loss has parts
        at = {"z": parts.z.detach().requires_grad_()}
        slope = _gradient(parts.criterion(at["z"]), at)
        u = {"z": torch.zeros_like(parts.z).requires_grad_()}
        JT_u = _gradient(parts.z, weights, u["z"])  # linear in u, so that its derivative along v is J v
        penalty_slope = {} if parts.penalty is None else _gradient(parts.penalty, weights)

        J, H = VJP(JT_u, u), VJP(slope, at)
        JT = VJP({"z": parts.z} if parts.z.requires_grad else {}, weights)
        penalty_H = VJP(penalty_slope, weights)

        def product(v: Tree, batched: bool) -> OptionalTree:
            penalty: OptionalTree = penalty_H(v, batched)
            Jv = J(v, batched)["z"]
            HJv = None if Jv is None else H({"z": Jv}, batched)["z"]
            return penalty if HJv is None else trees.add(penalty, JT({"z": HJv}, batched))

        return symmetric(product, graph.layout)


def _gradient(output: Tensor, inputs: Tree, v: Tensor | None = None) -> Tree:
    """vᵀ ∂output/∂inputs with its graph, for the inputs for which it has one."""
    if not output.requires_grad:
        return {}
    found = torch.autograd.grad(output, list(inputs.values()), v, create_graph=True, allow_unused=True)
    return {name: t for name, t in zip(inputs, found, strict=True) if t is not None and t.requires_grad}
