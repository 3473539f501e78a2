"""Whether autograd knows the second derivative of a training loss: checked once for each problem."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable

from hoptim.curvature.finite_difference import first_step
from hoptim.curvature.linearization import GradientGraph
from hoptim.linalg import vectors
from hoptim.linalg.random import gaussian_like
from hoptim.linalg.vectors import Layout
from hoptim.linalg.vjp import no_second_derivative, nodes
from hoptim.problem.problem import At, as_leaves

NAME = "second derivatives"  # of the check, which is done once for each problem
_ONCE = once_differentiable(lambda _: None).__code__


def check_twice_differentiable(at: At, loss: Tensor, batch: Any) -> None:
    """Raise ``TypeError`` for an operation whose second derivative autograd would silently leave out. Once for each problem.

    A backward pass marked ``once_differentiable`` raises only if a second backward pass runs through it to the end, which
    one for the weights alone does not. A backward pass that leaves autograd without that mark is found by differences of
    gradients, with a warning.
    """
    if NAME in at.problem.checked:
        return
    seen = nodes([loss])
    custom = [type(node)._forward_cls for node in seen if isinstance(node, BackwardCFunction)]  # type: ignore[attr-defined]
    if once := sorted({cls.__name__ for cls in custom if getattr(cls.backward, "__code__", None) is _ONCE}):
        raise no_second_derivative(f"the custom functions {once} are once_differentiable")
    if any(node.name() == "WeightNormInterfaceBackward0" for node in seen):
        raise no_second_derivative(
            "that of torch._weight_norm lacks a term. Use torch.nn.utils.parametrizations.weight_norm"
        )
    at.problem.checked.add(NAME)
    if custom and (error := _error_by_differences(at, batch)):
        warnings.warn(
            f"autograd's curvature is off by {error:.0%} from differences of gradients: the backward pass of "
            f"{sorted({cls.__name__ for cls in custom})} has no derivative or a wrong one; it may use detach(), .data, "
            "NumPy or a kernel. Take curvature=hoptim.FiniteDifference()",
            stacklevel=2,
        )


def check_once(at: At, batch: Any) -> None:
    """The same check for a curvature that does not evaluate the loss by itself; the first time it costs one loss."""
    if NAME not in at.problem.checked:
        with at.problem.leave_no_trace(), at.loss("train_loss", batch) as (loss, *_):
            check_twice_differentiable(at, loss, batch)


def _error_by_differences(at: At, batch: Any) -> float:
    """The relative error of A v against differences of gradients; 0 if it is small, or if two differences do not agree."""
    layout = Layout.of(at.weights)
    w = layout.flatten(at.weights).detach()
    v = gaussian_like(w)
    step = float(vectors.norm(w) / vectors.norm(v)) * first_step(at.problem.rounding(layout.dtypes))

    def there(place: Tensor, product: bool = False) -> Tensor:
        """∇L_T at these weights, or A v, from the same random state each time."""
        moved = as_leaves(layout.unflatten(place))
        with (
            at.problem.leave_no_trace(),
            at.problem.at(moved, at.leaves) as there,
            there.loss("train_loss", batch) as (loss, *_),
        ):
            graph = GradientGraph(loss, moved, at.leaves)
            found = graph.vjp(graph.weights)(layout.unflatten(v)) if product else graph.layout.unflatten(graph.value)
            return layout.flatten(found).detach()

    def difference(step: float) -> Tensor:
        return (there(w + step * v) - there(w - step * v)) / (2 * step)

    near, far = difference(step), difference(2 * step)
    error, noise, size = (float(vectors.norm(x)) for x in (there(w, product=True) - near, near - far, near))
    return error / size if error > 10 * noise + 0.01 * size else 0.0
