"""The Gauss-Newton curvature: Jᵀ (criterion's Hessian) J + the penalty's Hessian, J being the Jacobian of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.exact import DoubleBackward
from hoptim.curvature.linearization import Draw, GradientGraph, Linearization
from hoptim.curvature.second_derivatives import check_once
from hoptim.linalg import dicts
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.linalg.vjp import VJP
from hoptim.problem.composite_loss import CompositeLoss, LossParts
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
        with ExitStack() as stack:  # no name for it, which would hold its value
            yield stack.enter_context(super().linearize(at, batch, draw))

    def of(self, graph: GradientGraph) -> Operator:
        """Jᵀ (∂²c/∂z²) J + ∂²penalty/∂w²."""
        weights, parts = graph.weights, graph.parts
        assert parts is not None  # linearize has checked that the loss has parts
        at = {"z": parts.z.detach().requires_grad_()}
        slope = _gradient(parts.criterion(at["z"]), at)
        u = {"z": torch.zeros_like(parts.z).requires_grad_()}
        with graph.passing(is_wanted=False):
            JT_u = _gradient(parts.z, weights, u["z"])  # linear in u, so that its derivative along v is J v
            penalty_slope = {} if parts.penalty is None else _gradient(parts.penalty, weights)

        J, H = VJP(JT_u, u), VJP(slope, at)
        JT = graph.to_weights({"z": parts.z} if parts.z.requires_grad else {})
        penalty_H = graph.to_weights(penalty_slope)

        def product(v: Tensors, batched: bool) -> OptionalTensors:
            penalty: OptionalTensors = penalty_H(v, batched)
            Jv = J(v, batched)["z"]
            HJv = None if Jv is None else H({"z": Jv}, batched)["z"]
            return penalty if HJv is None else dicts.add(penalty, JT({"z": HJv}, batched))

        return graph.symmetric(product)


def _gradient(output: Tensor, inputs: Tensors, v: Tensor | None = None) -> Tensors:
    """vᵀ ∂output/∂inputs with its graph, for the inputs for which it has one."""
    if not output.requires_grad:
        return {}
    found = torch.autograd.grad(output, list(inputs.values()), v, create_graph=True, allow_unused=True)
    return {name: t for name, t in zip(inputs, found, strict=True) if t is not None and t.requires_grad}


def check_criterion(at: At, batch: Any) -> None:
    """Raise ``ValueError`` if the criterion has no curvature in z anywhere. It costs one loss, once for each problem."""
    if "criterion" in at.problem.checked:
        return
    with at.problem.leave_no_trace(), at.loss("train_loss", batch) as (_, parts, _):
        assert parts is not None
        found = has_curvature(parts)
    if found is False:
        raise ValueError(
            "the criterion is linear in what predict returns, at least piecewise, as nll_loss, L1 and hinge losses are: it "
            "has no curvature, and GaussNewton would see nothing of the model. If predict ends in log_softmax, let it "
            "return the logits, and take cross_entropy as the criterion; else give Implicit(curvature=hoptim.Exact())"
        )
    if found:
        at.problem.checked.add("criterion")


def has_curvature(parts: LossParts) -> bool | None:
    """Whether ∂²c/∂z² is nonzero at z or elsewhere; ``None`` if this z can't tell, because ∂c/∂z is zero too.

    A zero at z alone proves nothing: it also occurs for a very confident softmax, or for a Huber loss far from its target.
    So it looks elsewhere: at random z, and downhill until the slope changes its sign. There a convex criterion is either
    curved or has a kink.

    >>> def parts(criterion):
    ...     return LossParts(z=torch.tensor([3.0, 100.0]), criterion=criterion, penalty=None)
    >>> square, huber = torch.square, torch.nn.HuberLoss()
    >>> [has_curvature(parts(f)) for f in (lambda z: z.sum(), lambda z: z.abs().sum(), lambda z: 0 * square(z).sum())]
    [False, False, None]
    >>> has_curvature(parts(lambda z: square(z).mean())), has_curvature(parts(lambda z: huber(z, torch.full((2,), -55.5))))
    (True, True)
    """
    z = parts.z.detach()
    v = torch.randn_like(z)

    def look(place: Tensor) -> tuple[Tensor, bool]:
        """∂c/∂z at this z, and whether ∂²c/∂z² is nonzero there."""
        place = place.detach().requires_grad_()
        value = parts.criterion(place)
        if not value.requires_grad:
            return torch.zeros_like(place), False
        (slope,) = torch.autograd.grad(value, place, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return slope, False
        (Hv,) = torch.autograd.grad(slope, place, v, materialize_grads=True)
        return slope.detach(), bool(Hv.any())

    slope, is_curved = look(z)
    if is_curved or z.is_complex() or not slope.isfinite().all():
        return True
    if not slope.any():
        return None
    try:
        return look(torch.randn_like(z))[1] or _is_curved_downhill(look, z, slope)
    except Exception:  # a criterion that refuses other z
        return None


def _is_curved_downhill(look: Callable[[Tensor], tuple[Tensor, bool]], z: Tensor, slope: Tensor) -> bool:
    """Whether the criterion is curved near its minimum along the way down, which is found by bisection."""
    down = -slope.sign()
    low, high, t = 0.0, torch.inf, 1.0  # the minimum is between low and high
    for _ in range(100):
        there, is_curved = look(z + t * down)
        if is_curved:
            return True
        low, high = (t, high) if (there * down).sum() < 0 else (low, t)
        t = 2 * t if high == torch.inf else (low + high) / 2
    return False
