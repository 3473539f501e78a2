"""Whether the criterion of a CompositeLoss has a second derivative in z, without which Gauss-Newton sees nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from hoptim.problem.composite_loss import LossParts
from hoptim.problem.problem import At, Problem

_CHECKED: WeakSet[Problem] = WeakSet()


def check_criterion(at: At, batch: Any) -> None:
    """Raise ``ValueError`` if the criterion has no curvature in z anywhere. It costs one loss, once for each problem."""
    if at.problem in _CHECKED:
        return
    with at.problem.untouched(), at.loss("train_loss", batch) as (_, parts, _):
        assert parts is not None
        found = has_curvature(parts)
    if found is False:
        raise ValueError(
            "the criterion is linear in what predict returns, at least piecewise, as nll_loss, L1 and hinge losses are: it "
            "has no curvature, and GaussNewton would see nothing of the model. If predict ends in log_softmax, let it "
            "return the logits, and take cross_entropy as the criterion; else give Implicit(curvature=hoptim.Exact())"
        )
    if found:
        _CHECKED.add(at.problem)


def has_curvature(parts: LossParts) -> bool | None:
    """Whether ∂²c/∂z² is nonzero at z or elsewhere; ``None`` if this z can't tell, because ∂c/∂z is zero too.

    A zero at z alone proves nothing: it also occurs for a very confident softmax, or for a Huber loss far from its target.
    So it looks elsewhere: at random z, and along the entry of z with the steepest slope, downhill until the slope changes
    its sign. There a convex criterion is either curved or has a kink.

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
    """Whether the criterion is curved as one entry of z moves past its minimum, which is found by bisection."""
    entry = int(slope.abs().argmax())
    downhill = -float(slope.reshape(-1)[entry].sign())
    low, high, t = 0.0, torch.inf, 1.0  # the minimum is between low and high
    for _ in range(100):
        moved = z.reshape(-1).clone()
        moved[entry] += downhill * t
        there, is_curved = look(moved.view(z.shape))
        if is_curved:
            return True
        if float(there.reshape(-1)[entry]) * downhill < 0:
            low = t
        else:
            high = t
        t = 2 * t if high == torch.inf else (low + high) / 2
    return False
