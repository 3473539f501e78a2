"""Warm starts: each solve starts at the last solution, or takes one step from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.checks import describe_type
from hoptim.linalg.operators import Operator
from hoptim.linalg.vectors import inverse
from hoptim.solvers.base import Solver, carried, check_positive, rayleigh
from hoptim.solvers.monitor import GROWTH_LIMIT, LARGE, NEGATIVE, joined
from hoptim.solvers.neumann import Neumann
from hoptim.solvers.nystrom import Nystrom
from hoptim.solvers.solution import Solution, State, Status

LIMIT = 3.0  # a start or an answer whose residual is this many times ‖g‖ is of no use


@dataclass(frozen=True)
class WarmStart(Solver):
    """Any solver, started at the last solution x₀: the solver solves Aᵀd = g − Aᵀx₀, and x = x₀ + d.

    A and g change little from one hyperstep to the next, so a few terms each time go as far as many at once. The first solve
    starts at zero, and so does one after the shape of the model or of the right-hand side has changed. A warm start costs
    one more product; ``residuals`` begin with that of x₀. They and the inner solver's tolerance are relative to ‖g‖.

    Along negative curvature it is the early stop that bounds x, and starting at the last solution would undo it. So if the
    inner solver met negative curvature, or failed, the next solve starts at zero. A start x₀ with x₀ᵀAx₀ < 0 or a residual
    above 3·‖g‖ is dropped: that right-hand side is solved from zero, with a remark. A step d that would leave a residual
    above 3·‖g‖ or 10·‖g − Aᵀx₀‖ is not taken, with a remark.

    ``WarmStart(Neumann(terms=0, step_size=ρ))`` is :class:`SOBA` with the newest v.

    Args:
        solver: the inner solver, which sees its own state as without the warm start.

    Raises:
        TypeError: ``solver`` is no ``Solver``, is a warm start itself, or is ``Nystrom``, whose ρ it would undo too.

    Source: Arbel and Mairal 2022, "Amortized implicit differentiation for stochastic bilevel optimization" (AmIGO).

    >>> from hoptim.linalg.operators import Symmetric
    >>> A, g = Symmetric(lambda v: 2 * v, like=torch.ones(1)), torch.ones(1)
    >>> solver = WarmStart(Neumann(terms=0, step_size=0.25))
    >>> first = solver.solve(A, g)
    >>> second = solver.solve(A, g, first.state)
    >>> first.value, second.value, second.products
    (tensor([0.2500]), tensor([0.3750]), 1)
    """

    solver: Solver

    def __post_init__(self) -> None:
        if isinstance(self.solver, Nystrom):
            raise TypeError(
                f"solver is {self.solver!r}: repeated warm starts would solve the system without its rho. Take it alone, or "
                "hoptim.WarmStart(hoptim.CG(terms=5)) with damping"
            )
        if not isinstance(self.solver, Solver) or isinstance(self.solver, (WarmStart, SOBA)):
            raise TypeError(f"solver is {describe_type(self.solver)}: give a solver to start, such as hoptim.CG(terms=5)")

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """One product for the residual of the start, and the inner solver on what is left."""
        last = carried(state, "solution", g)
        if last is None:
            return _carrying(self.solver.solve(A, g, state))
        start, r, kept, worst = _begin(A, g, last)
        if not start.status.ok:
            return start
        inner = self._solve_rest(A, r, worst, state)
        left = torch.where(kept, start.residuals[0], 1.0)
        ended = inner.residuals[-1] if len(inner.residuals) else torch.zeros_like(left)
        refused = kept & (ended > (LIMIT / left).clamp(max=GROWTH_LIMIT))
        residuals = torch.cat([start.residuals, inner.residuals.where(~refused, 1.0) * left])
        status, words = inner.status, inner.detail
        if status in (Status.LARGE_RESIDUAL, Status.GROWING) or (status.kind != "failed" and worst > LARGE):
            not_taken, large = torch.stack([refused.any(), (residuals[-1] > LARGE).any()]).tolist()
            words = joined("a step was not taken" if not_taken else "", words)
            if status.kind == "ok" or status is Status.LARGE_RESIDUAL:  # whose residual is relative to the rest
                status = Status.LARGE_RESIDUAL if not_taken or large else self._how_it_ended(inner)
        if start.status.kind == "remark" and status.kind == "ok":
            status = start.status
        return replace(
            _carrying(replace(inner, value=start.value + torch.where(refused[..., None], 0.0, inner.value))),
            status=status,
            detail=joined(start.detail, words and f"of the rest: {words}"),
            residuals=residuals,
            products=1 + inner.products,
            negative_curvature=start.negative_curvature or inner.negative_curvature,
        )

    def _how_it_ended(self, inner: Solution) -> Status:
        all_terms = len(inner.residuals) >= getattr(self.solver, "terms", 0)
        return Status.FINISHED if all_terms else Status.FLAT_DIRECTIONS

    def _solve_rest(self, A: Operator, r: Tensor, worst: float, state: State | None) -> Solution:
        """The inner solver on the residual r of the start, at most ``worst`` times ‖g‖; its tolerance is relative to ‖g‖."""
        solver: Any = self.solver
        tolerance = getattr(solver, "tolerance", 0.0)
        if not tolerance:
            return self.solver.solve(A, r, state)
        if worst > tolerance:
            return replace(solver, tolerance=tolerance / worst).solve(A, r, state)
        none = r.new_empty((0, *r.shape[:-1]))
        status, value = Status.CONVERGED, torch.zeros_like(r)
        return Solution(value=value, status=status, converged=True, residuals=none, products=0, state=state or {})


@dataclass(frozen=True, kw_only=True)
class SOBA(Solver):
    """One step towards the solution for each hyperstep, v ← v − ρ(Aᵀv − g), where x is v before the step; v = 0 at first.

    One product gives both the residual of x and the next v. With ``every=None`` and ``hyperstep()`` after the backward pass
    but before ``step()``, weights, v and hyperparameters all move from the same point, as in the paper. The first hyperstep
    uses the direct term alone. As in :class:`WarmStart`, a v with negative curvature or a residual above 3·‖g‖ is dropped;
    v then starts again at ρg.

    Args:
        step_size: ρ > 0, less than 2/‖A‖₂; in the paper the inner learning rate.

    Raises:
        ValueError: ``step_size`` is not positive.

    Source: Dagréou, Ablin, Vaiter and Moreau 2022, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms" (arXiv 2201.13409), algorithm 1; its v has the other sign.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: 2 * v, like=torch.ones(1))
    >>> first = SOBA(step_size=0.25).solve(A, torch.ones(1))
    >>> second = SOBA(step_size=0.25).solve(A, torch.ones(1), first.state)
    >>> second.value, second.residuals, second.state["solution"]
    (tensor([0.2500]), tensor([0.5000]), tensor([0.3750]))
    """

    step_size: float

    def __post_init__(self) -> None:
        check_positive("step_size", self.step_size)

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """The v of the last call as the answer, and the next v in ``state``."""
        last = carried(state, "solution", g)
        if last is None:
            first = Neumann(terms=0, step_size=self.step_size).solve(A, g)
            return replace(_carrying(first), value=torch.zeros_like(g), detail="the first call, which starts at zero")
        start, r, _, worst = _begin(A, g, last)
        if not start.status.ok:
            return start
        if worst > LARGE and start.status.kind == "ok":
            start = replace(start, status=Status.LARGE_RESIDUAL)
        return replace(start, step_size=self.step_size, state={"solution": start.value + self.step_size * r})


def _begin(A: Operator, g: Tensor, last: Tensor) -> tuple[Solution, Tensor, Tensor, float]:
    """The last solution as an answer x to this system, with zero for right-hand sides where it is of no use.

    Also r = g − Aᵀx, for which right-hand sides x was kept, and the largest ‖r‖ / ‖g‖ on the host.
    """
    length, product = A.norm(g), A.T @ last
    r = g - product
    residual = torch.where(length == 0, 0.0, A.norm(r) / length)
    curvature = rayleigh(A, last, product)
    negative = curvature < NEGATIVE * A.norm(product) * inverse(A.norm(last))
    kept = (length > 0) & ~(residual > LIMIT) & ~negative
    figures = [
        length.amax(),
        residual.amax(),
        torch.where(kept, residual, 1.0).amax(),
        torch.where(negative, curvature, 0.0).amin(),
    ]
    longest, highest, worst, lowest = torch.stack(figures).tolist()
    status, detail = Status.FINISHED, f"the start has a residual of {worst:.3g}"
    if not math.isfinite(longest):
        status, detail = Status.NON_FINITE_GRADIENT, ""
    elif not math.isfinite(highest):
        status, detail = Status.NON_FINITE_PRODUCT, "with the solution that was carried over"
    elif lowest < 0:
        status, detail = Status.NEGATIVE_CURVATURE, f"a start was dropped, along which the curvature is {lowest:.3g}"
    elif highest > LIMIT:
        status, detail = Status.GROWING, f"a start was dropped, whose residual was {highest:.3g} times ‖g‖"
    x, r = torch.where(kept[..., None], last, 0.0), torch.where(kept[..., None], r, g)
    facts = {"residuals": residual[None], "products": 1, "negative_curvature": lowest < 0}
    return Solution(value=x, status=status, detail=detail, **facts), r, kept, worst


def _carrying(solution: Solution) -> Solution:
    """The solution with x in its state for the next call, unless the solve failed or met negative curvature."""
    if not solution.status.ok:
        return replace(solution, state={})
    state = {name: vector for name, vector in solution.state.items() if name != "solution"}
    return replace(solution, state=state if solution.negative_curvature else {**state, "solution": solution.value})
