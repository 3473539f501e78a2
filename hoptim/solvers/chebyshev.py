"""Chebyshev semi-iteration: the best polynomial for a whole interval of curvatures, without inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import (
    GROWTH_LIMIT,
    NEGATIVE,
    Iterative,
    check_symmetric,
    ending,
    rayleigh,
    should_check_convergence,
)
from hoptim.solvers.neumann import with_bound
from hoptim.solvers.solution import Solution, State, Status, Unread
from hoptim.validation import is_finite

SAFETY = 1.2  # the power iteration estimates from below, and what lies above the interval grows fast


@dataclass(frozen=True, kw_only=True)
class Chebyshev(Iterative):
    """Chebyshev semi-iteration for a symmetric curvature: the polynomial of A with the least residual over [a, b].

    The residual after K products is p(A) g with p(λ) = T_K((a + b − 2λ)/(b − a)) / T_K((a + b)/(b − a)), T_K being the
    Chebyshev polynomial. On [a, b] it is at most 1/cosh(K·arcosh((a + b)/(b − a))), about 2·exp(−2K√(a/b)); below, from a
    down to 0, it rises to 1, so that a curvature between 0 and a is only solved in part: as a regulariser would. Outside
    [0, b] it grows as fast as it falls inside: a right-hand side whose residual outgrows 10·‖g‖ has failed, and stops.

    ``residuals`` holds that of the returned iterate. Each of several right-hand sides stops for itself.

    Args:
        terms: the most products, ≥ 1, default 20; one more is for the residual of what converged.
        tolerance: the relative residual at which to stop, ≥ 0, default 1e-5.
        interval: (a, b) with 0 < a ≤ b; ``None``, the default, takes b = 1.2·‖A‖₂, estimated by power iteration as Neumann's
            step is, and a = b / ratio.
        ratio: b / a of a chosen interval, ≥ 1; ``None``, the default, takes coth²(2/terms), about (terms/2)²: the longest
            interval on which that many terms still bring the residual down to 1/cosh 4 = 3.7 %.

    Raises:
        ValueError: an option is out of its range, or ``ratio`` is given with an ``interval``.
        TypeError: when solving, A is not known to be symmetric.

    Source: Golub and Varga 1961, "Chebyshev semi-iterative methods"; Saad, "Iterative Methods for Sparse Linear Systems",
    algorithm 12.1.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([1.0, 4.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> solution = Chebyshev(terms=10, interval=(1.0, 4.0)).solve(A, {"w": torch.ones(2)})
    >>> solution.value["w"].round(decimals=3), bool(solution.residuals[-1] <= 1 / math.cosh(10 * math.acosh(5 / 3)))
    (tensor([1.0000, 0.2500]), True)
    """

    interval: tuple[float, float] | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interval is not None:
            ends = tuple(self.interval) if isinstance(self.interval, Sequence) else ()
            if not (len(ends) == 2 and all(is_finite(end) for end in ends) and 0 < ends[0] <= ends[1]):
                raise ValueError(f"interval={self.interval!r}: give (a, b) with 0 < a <= b, or None to choose it")
            if self.ratio is not None:
                raise ValueError(f"ratio={self.ratio!r}: leave it out where an interval is given, which has its own")
            object.__setattr__(self, "interval", ends)  # a list, as a config gives, would make the solver unhashable
        if self.ratio is not None and not (is_finite(self.ratio) and self.ratio >= 1):
            raise ValueError(f"ratio={self.ratio!r}: give a finite number, 1 or more, or None to choose it")

    def iterated(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Iterate from x = 0; an interval chosen too short, which a poor start of the power iteration allows, anew."""
        check_symmetric(self, A)
        if self.interval is not None:
            return self._iterate(A, g, *self.interval)
        ratio = self.ratio or 1 / math.tanh(2 / self.terms) ** 2
        return with_bound(A, g, state, lambda bound: self._iterate(A, g, SAFETY * bound / ratio, SAFETY * bound))

    def _iterate(self, A: Operator, g: Tree, a: float, b: float) -> Unread:
        batched = A.is_batched(g)
        middle, half = (b + a) / 2, (b - a) / 2
        x, r, weight = trees.zeros_like(g), trees.clone(g), 1 / middle
        d = trees.scale_(trees.clone(g), weight)
        start = trees.norm(g, batched=batched)
        scale = torch.where(start > 0, start, 1.0)
        active = start > 0
        along = lowest = highest = torch.zeros_like(start)
        residuals = []
        for term in range(1, self.terms + 1):
            product = A @ d
            along = torch.where(active, rayleigh(d, product, batched), along)
            lowest, highest = torch.minimum(lowest, along), torch.maximum(highest, along)
            trees.axpy_(x, d, active.to(start.dtype))
            trees.axpy_(r, product, -active.to(start.dtype))
            residuals.append(trees.norm(r, batched=batched) / scale)
            active = active & (residuals[-1] > self.tolerance) & (residuals[-1] <= GROWTH_LIMIT)
            if should_check_convergence(term, self.terms, start) and not bool(
                active.any() & (residuals[-1] <= GROWTH_LIMIT).all()
            ):
                break
            last, weight = weight, 1 / (2 * middle - half**2 * weight)
            trees.add_(trees.scale_(d, half**2 * weight * last), r, alpha=2 * weight)
        history = torch.stack(residuals)
        grown = history[-1] > GROWTH_LIMIT
        outside = (history > 1 + 1e-5).any(0)  # inside [0, b] no residual is longer than g
        flags = {
            Status.NON_FINITE_GRADIENT: ~start.isfinite(),
            Status.NON_FINITE_PRODUCT: ~history[-1].isfinite(),
            Status.STEP_TOO_LARGE: grown & (along > 0),
            Status.CURVATURE_TOO_NEGATIVE: grown,
            Status.NO_CURVATURE: (start > 0) & (lowest == 0) & (highest == 0),
            Status.NEGATIVE_CURVATURE: lowest < NEGATIVE * b,
            Status.GROWING: outside,
            Status.FINISHED: history[-1] > self.tolerance,
        }

        def then(status: Status, figures: list[float]) -> Solution:
            low, high, longest = figures
            detail, told = f"on the interval [{a:.3g}, {b:.3g}]", State()
            if status is not Status.FINISHED and status is not Status.CONVERGED:
                detail += f", along curvatures from {low:.3g} to {high:.3g}; the residual ends at {longest:.3g}"
            if status is Status.STEP_TOO_LARGE:  # what has grown is the direction that the power iteration overlooked
                worst = int(history[-1].argmax())
                told = {"direction": trees.unit(trees.map_tree(lambda value: value[worst], r) if batched else r)}
            products = len(history)
            return Solution(value=x, status=status, detail=detail, residuals=history, products=products, state=told)

        return ending(x, flags, [lowest.amin(), highest.amax(), history[-1].amax()], then)
