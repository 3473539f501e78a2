"""The Neumann series, its first term alone, and the bound on the spectrum from which its step size is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from hoptim.linalg.lanczos import spectral_norm, start_vector
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, scale_
from hoptim.solvers.base import Iterative, Solver, carried, check_positive, rayleigh
from hoptim.solvers.monitor import Growth, History, Monitor
from hoptim.solvers.solution import Solution, State, Status

FIRST_PRODUCTS, LATER_PRODUCTS = 10, 2  # of the power iteration: from a new vector, and from that of the last solve


@dataclass(frozen=True, kw_only=True)
class Identity(Solver):
    """The identity in place of the inverse curvature: x = g, without any product (T1–T2).

    Source: Luketina et al. 2016 (arXiv 1511.06727).

    >>> from hoptim.linalg.operators import Symmetric
    >>> Identity().solve(Symmetric(lambda v: v, like=torch.ones(1)), torch.ones(1)).value
    tensor([1.])
    """

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """A copy of g; its residual is unknown, since that would take a product."""
        return Monitor(A, g, terms=0).finish(g.clone())


@dataclass(frozen=True, kw_only=True)
class Neumann(Iterative):
    """The Neumann series for the inverse: x_K = α Σ_{j=0..K} (I − αAᵀ)^j g.

    It converges to A⁻ᵀg if every eigenvalue of αA lies in (0, 2); for an unsymmetric A, if |1 − αμ| < 1 for every
    eigenvalue μ, that is α < 2 Re μ / |μ|². K terms cost K products and sum K+1 vectors; ``terms=0`` gives αg. With plain
    SGD of learning rate α, x_K is what differentiating through the last K+1 steps would give.

    The vector after j products, (I − αAᵀ)^j g, is the residual of x_{j−1} and costs nothing extra. So ``residuals`` ends
    with that of x_{K−1}. If the vectors exceed 10·‖g‖, the series has failed and stops. The curvature may take a fresh batch
    for each product: in expectation over the batches this is the series of the mean curvature.

    Args:
        terms: K ≥ 0, default 20; with a tolerance, the largest K, and if it converges, one more product checks the residual.
        step_size: α > 0; ``None``, the default, takes 1/‖A‖₂, estimated by power iteration: 10 products at first, then 2
            each time, from the vector of the last solve. For an unsymmetric A it takes 1 / max ‖Aᵀv‖/‖v‖ over the iterates,
            between the inverses of norm and spectral radius; eigenvalues far from the real axis may need less, and if the
            series grows for that reason, the status says so.
        tolerance: the relative residual at which a right-hand side stops, ≥ 0; 0, the default, takes all terms.

    Raises:
        ValueError: ``terms`` or ``tolerance`` is negative, or ``step_size`` is not positive.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), algorithm 3, with the sign corrected.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: 2 * v, like=torch.ones(1))
    >>> solution = Neumann(terms=2, step_size=0.25).solve(A, torch.ones(1))
    >>> solution.value, solution.residuals, solution.status.ok
    (tensor([0.4375]), tensor([0.5000, 0.2500]), True)
    """

    tolerance: float = 0.0
    step_size: float | None = None
    least_terms: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            check_positive("step_size", self.step_size, ", or None to choose it")

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Sum the series; again with a smaller step if the power iteration has chosen one that is too large."""
        if self.step_size is not None:
            return self._series(A, g, self.step_size)
        return with_bound(A, g, state, lambda bound: self._series(A, g, 1 / bound))

    def _series(self, A: Operator, g: Tensor, alpha: float) -> Solution:
        monitor = Monitor(A, g, self.terms, self.tolerance or None, stop_on_growth=True)
        A_T, v, x = A.T, g.clone(), g.clone()
        for _ in monitor:
            Av = A_T @ v
            step = monitor.where_active(-alpha)
            axpy_(v, step, Av)
            axpy_(x, monitor.where_active(1.0), v)
            monitor.record_residual(A.norm(v))
        scale_(x, alpha)

        if not monitor.norms:
            return monitor.finish(x, step_size=alpha)
        before = axpy_(v.clone(), -step, Av)  # the last vector that A was applied to
        monitor.curvatures, monitor.largest = [rayleigh(A, before, Av)], torch.full_like(monitor.g_norm, 1 / alpha)
        history = monitor.read()
        if (growth := history.growth) is not None:
            stretch = float((A.norm(Av) / A.norm(before)).reshape(-1)[growth.side])
            facts = _failure(A, alpha, growth, stretch)
            if facts["failed"] is Status.STEP_TOO_LARGE:
                facts["state"] = {"direction": v.reshape(-1, A.size)[growth.side]}
        else:
            facts = {} if history.is_negative else _remark(A, alpha, history)
        spent = f"{len(monitor.norms)} of {monitor.terms} terms, before the last of which"
        return monitor.finish(x, history, spent=spent, met="the curvature along the last term is", step_size=alpha, **facts)


def _remark(A: Operator, alpha: float, history: History) -> dict[str, Any]:
    """The remark on a bounded series, if its vectors do not shrink steadily, as they do for eigenvalues of αA in [0, 1]."""
    lengths = np.concatenate([np.ones_like(history.g_norm)[None], history.residuals])
    if not bool((lengths[1:] > lengths[:-1] * (1 + 1e-5)).any()):
        return {}
    step, longer = f"step size {alpha:.3g}", "a term is longer than the one before it"
    high = float(history.curvatures.max())
    if high * alpha > 1:
        return {"remark": Status.GROWING, "detail": f"{step}, curvature along the last term {high:.3g}"}
    if A.is_symmetric:
        return {"negative": True, "detail": f"{longer}, though the step is small enough"}
    return {"remark": Status.GROWING, "detail": f"{step}: {longer}, since A is not symmetric"}


def _failure(A: Operator, alpha: float, growth: Growth, stretch: float) -> dict[str, Any]:
    """Why the series has exceeded the limit, from the curvature along its last vector and ``stretch`` = ‖Av‖ / ‖v‖."""
    term, _, length, curvature = growth
    if not math.isfinite(length):
        return {"failed": Status.NON_FINITE_PRODUCT, "negative": False, "detail": f"at term {term}"}
    grown = f"the series grew to {length:.3g} times its start at term {term}"
    if alpha * curvature <= 1 and (curvature <= 0 or A.is_symmetric):
        detail = f"{grown}, along a curvature of {curvature:.3g}"
        return {"failed": Status.CURVATURE_TOO_NEGATIVE, "negative": True, "detail": detail}
    allowed = 2 * curvature / stretch**2  # with a larger step than this, v − αAᵀv is longer than v
    advice = f"step size {alpha:.3g} against a curvature of {curvature:.3g}, which allows less than {allowed:.3g}"
    return {"failed": Status.STEP_TOO_LARGE, "negative": False, "detail": f"{grown}: {advice}"}


def with_bound(A: Operator, g: Tensor, state: State | None, attempt: Callable[[float], Solution]) -> Solution:
    """``attempt(‖A‖₂)``, estimated from the direction of the last solve; again if the estimate turns out too low."""
    direction, first = carried(state, "direction", A), LATER_PRODUCTS
    if direction is None:
        direction, first = start_vector(A, g.sum(0) if g.ndim > 1 else g), FIRST_PRODUCTS
    spent = 0
    for products in (first, FIRST_PRODUCTS, FIRST_PRODUCTS):
        norm, direction = spectral_norm(A.T, direction, products)
        spent += products
        length, bound = torch.stack([A.norm(g).sum(), norm]).tolist()
        if not (math.isfinite(length) and math.isfinite(bound) and bound > 0):
            flat = Status.NO_CURVATURE if length else None  # x = 0 is right where g is zero
            failed = flat if math.isfinite(bound) else Status.NON_FINITE_PRODUCT
            return Monitor(A, g, terms=0).finish(torch.zeros_like(g), failed=failed, products=spent)
        solution = attempt(bound)
        spent += solution.products
        if solution.status is not Status.STEP_TOO_LARGE or not A.is_symmetric:  # else complex eigenvalues may be the cause
            break
        direction = solution.state["direction"]
    return replace(solution, products=spent, state={"direction": direction})
