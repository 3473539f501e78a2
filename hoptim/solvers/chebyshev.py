"""Chebyshev semi-iteration: the best polynomial for a whole interval of curvatures, without inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hoptim.checks import is_finite
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import axpy_, scale_
from hoptim.solvers.base import Iterative, check_operator
from hoptim.solvers.monitor import NEGATIVE, Monitor
from hoptim.solvers.neumann import with_bound
from hoptim.solvers.solution import Solution, State, Status

SAFETY = 1.2  # the power iteration estimates from below, and components above the interval grow fast


@dataclass(frozen=True, kw_only=True)
class Chebyshev(Iterative):
    """Chebyshev semi-iteration for a symmetric curvature: the polynomial of A with the least residual over [a, b].

    The residual after K products is p(A) g with p(λ) = T_K((a + b − 2λ)/(b − a)) / T_K((a + b)/(b − a)), T_K being the
    Chebyshev polynomial. On [a, b] it is at most 1/cosh(K·arcosh((a + b)/(b − a))), about 2·exp(−2K√(a/b)). From a down to 0
    it rises to 1, so that directions with a curvature below a are solved only in part, which regularises. Outside [0, b] it
    grows as fast as it falls inside: if a residual exceeds 10·‖g‖, the solve has failed and stops.

    ``residuals`` are those of the iterates. Several right-hand sides stop independently.

    Args:
        terms: the largest number of products, ≥ 1, default 20; if it converges, one more checks the residual.
        tolerance: the relative residual at which to stop, ≥ 0, default 1e-5.
        interval: (a, b) with 0 < a ≤ b; ``None``, the default, takes b = 1.2·‖A‖₂, estimated by power iteration as for
            Neumann's step size, and a = b / coth²(2/terms), about 4b / terms²: the longest interval on which that many
            terms still bring the residual down to 1/cosh 4 = 3.7 %.

    Raises:
        ValueError: an option is out of its range.
        TypeError: when solving, A is not known to be symmetric, or changes from product to product.

    Source: Golub and Varga 1961, "Chebyshev semi-iterative methods"; Saad, "Iterative Methods for Sparse Linear Systems",
    algorithm 12.1.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: torch.tensor([1.0, 4.0]) * v, like=torch.ones(2))
    >>> solution = Chebyshev(terms=10, interval=(1.0, 4.0)).solve(A, torch.ones(2))
    >>> solution.value.round(decimals=3), bool(solution.residuals[-1] <= 1 / math.cosh(10 * math.acosh(5 / 3)))
    (tensor([1.0000, 0.2500]), True)
    """

    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval is not None:
            ends = tuple(self.interval) if isinstance(self.interval, Sequence) else ()
            if not (len(ends) == 2 and all(is_finite(end) for end in ends) and 0 < ends[0] <= ends[1]):
                raise ValueError(f"interval={self.interval!r}: give (a, b) with 0 < a <= b, or None to choose it")
            object.__setattr__(self, "interval", ends)  # a list, as a config gives, would make the solver unhashable

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """Iterate from x = 0; again with a longer interval if the power iteration has chosen one that is too short."""
        check_operator(self, A)
        if self.interval is not None:
            return self._iterate(A, g, *self.interval)
        ratio = 1 / math.tanh(2 / self.terms) ** 2
        return with_bound(A, g, state, lambda bound: self._iterate(A, g, SAFETY * bound / ratio, SAFETY * bound))

    def _iterate(self, A: Operator, g: Tensor, a: float, b: float) -> Solution:
        monitor = Monitor(A, g, self.terms, self.tolerance, stop_on_growth=True)
        theta, delta = (b + a) / 2, (b - a) / 2
        rho = 1 / theta  # Saad's ρ divided by δ, which may be zero
        x, r, d = torch.zeros_like(g), g.clone(), g / theta
        for _ in monitor:
            Ad = A @ d
            monitor.record_curvature(A.dot(d, Ad) / A.dot(d, d))
            axpy_(x, monitor.where_active(1.0), d)
            axpy_(r, monitor.where_active(-1.0), Ad)
            monitor.record_residual(A.norm(r))
            rho, rho_before = 1 / (2 * theta - delta**2 * rho), rho
            axpy_(scale_(d, delta**2 * rho * rho_before), 2 * rho, r)

        history, failed, carry = monitor.read(), None, State()
        if (growth := history.growth) is not None:
            failed = Status.STEP_TOO_LARGE if growth.curvature > 0 else Status.CURVATURE_TOO_NEGATIVE
            carry = {"direction": r.reshape(-1, A.size)[growth.side]}  # the power iteration has missed this one
        high = max(float(history.curvatures.max()), 0.0)
        return monitor.finish(
            x,
            history,
            failed=failed,
            negative=bool((history.curvatures < NEGATIVE * b).any()),
            remark=Status.GROWING if bool((history.residuals > 1 + 1e-5).any()) else None,  # on [0, b] none exceeds ‖g‖
            detail=f"on the interval [{a:.3g}, {b:.3g}], along curvatures from {history.lowest:.3g} to {high:.3g}",
            state=carry,
        )
