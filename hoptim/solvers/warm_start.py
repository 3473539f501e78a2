"""Warm starts: each solve begins at the solution of the last one, or is one step on from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import GROWTH_LIMIT, NEGATIVE, Solver, carried, ended, inverse, rayleigh
from hoptim.solvers.neumann import Neumann
from hoptim.solvers.solution import Solution, State, Status
from hoptim.validation import describe_type, is_finite


@dataclass(frozen=True)
class WarmStart(Solver):
    """Any solver, started at the last solution x₀: Aᵀd = g − Aᵀx₀ by that solver, and x = x₀ + d.

    Over hypersteps A and g change little, so that a few terms each time go as far as many at once. The first solve, and one
    whose model or right-hand side has another shape, is the inner solver's own, from zero. A warm one costs one product
    more; ``residuals`` begin with that of x₀ and are relative to ‖g‖ throughout, and so is the inner solver's tolerance.

    A start whose residual is more than 10·‖g‖, from a diverging sequence or since g has shrunk, is dropped with a remark:
    that right-hand side is solved from zero. After a failed solve nothing is carried. Negative curvature along x₀ is
    a remark.

    ``WarmStart(Neumann(terms=0, step_size=ρ))`` is :class:`SOBA` with the newest v.

    Args:
        solver: the inner solver, which sees its own state as without the warm start.

    Raises:
        TypeError: ``solver`` is no ``Solver``, or is a warm start itself.

    Source: Arbel and Mairal 2022, "Amortized implicit differentiation for stochastic bilevel optimization" (AmIGO).

    >>> from hoptim.linalg.operators import Symmetric
    >>> from hoptim.solvers.neumann import Neumann
    >>> A = Symmetric(lambda v: {"w": 2 * v["w"]}, like={"w": torch.ones(1)})
    >>> solver, g = WarmStart(Neumann(terms=0, step_size=0.25)), {"w": torch.ones(1)}
    >>> first = solver.solve(A, g)
    >>> second = solver.solve(A, g, first.state)
    >>> first.value["w"], second.value["w"], second.products
    (tensor([0.2500]), tensor([0.3750]), 1)
    """

    solver: Solver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver) or isinstance(self.solver, WarmStart):
            raise TypeError(f"solver is {describe_type(self.solver)}: give a solver to start, such as hoptim.CG(terms=5)")

    def solve(self, A: Operator, g: Tree, state: State | None = None) -> Solution:
        """One product for the residual of the start, and the inner solver on what is left."""
        rest = {name: vector for name, vector in (state or {}).items() if name != "solution"}
        last = carried(state, "solution", g)
        if last is None:
            return _remembered(self.solver.solve(A, g, rest))
        batched = A.is_batched(g)
        start = trees.norm(g, batched=batched)
        scale = torch.where(start > 0, start, 1.0)
        x = trees.scaled(last, (start > 0).to(start.dtype))
        product = A.T @ x
        along = rayleigh(x, product, batched)
        begun = trees.norm(trees.add(g, product, alpha=-1.0), batched=batched) / scale
        dropped = begun > GROWTH_LIMIT
        kept = (~dropped).to(start.dtype)
        x = trees.scaled(x, kept)
        r = trees.axpy_(trees.clone(g), product, -kept)
        left = torch.where(dropped, 1.0, begun)
        inner = self._solved(A, r, rest, left)

        value = trees.add(x, inner.value)
        residuals = torch.cat([begun[None], inner.residuals * left])
        spent = replace(inner, value=value, residuals=residuals, products=1 + inner.products)
        if not inner.status.ok:
            return replace(spent, state={}, **_renamed(inner, start))
        size = trees.norm(product, batched=batched) * inverse(trees.norm(last, batched=batched))
        flags = {
            Status.NON_FINITE_PRODUCT: ~left.isfinite(),
            Status.NEGATIVE_CURVATURE: along < NEGATIVE * size,
            Status.GROWING: dropped,
        }
        status, (worst, low) = ended(flags, begun.amax(), along.amin())
        if not status.ok:
            return replace(spent, state={}, status=status)
        if status is not Status.CONVERGED and inner.status.kind == "ok":
            words = {
                Status.NEGATIVE_CURVATURE: f"the curvature along the start is {low:.3g}",
                Status.GROWING: f"a start was dropped, whose residual was {worst:.3g} times ‖g‖",
            }
            spent = replace(spent, status=status, detail=words[status])
        return _remembered(spent)

    def _solved(self, A: Operator, r: Tree, rest: State, left: Tensor) -> Solution:
        """The inner solver on what the start left over, its tolerance taken relative to ‖g‖."""
        solver: Any = self.solver
        if not getattr(solver, "tolerance", 0.0):
            return self.solver.solve(A, r, rest)
        worst = float(left.amax())
        if worst <= solver.tolerance:
            none = left.new_empty((0, *left.shape))
            return Solution(value=trees.zeros_like(r), status=Status.CONVERGED, residuals=none, products=0, state=rest)
        finite = worst < float("inf")
        return replace(solver, tolerance=solver.tolerance / worst if finite else solver.tolerance).solve(A, r, rest)


def _renamed(inner: Solution, start: Tensor) -> dict[str, Any]:
    """A right-hand side that only the product with the start made infinite or NaN is no fault of the gradient."""
    if inner.status is Status.NON_FINITE_GRADIENT and bool(start.isfinite().all()):
        return {"status": Status.NON_FINITE_PRODUCT, "detail": "with the solution that was carried over"}
    return {}


def _remembered(solution: Solution) -> Solution:
    return replace(solution, state={"solution": solution.value, **solution.state} if solution.status.ok else {})


@dataclass(frozen=True, kw_only=True)
class SOBA(Solver):
    """One step towards the solution a hyperstep, v ← v − ρ(Aᵀv − g), and x = v from before it; v = 0 at first.

    So x is known before its product is, and one product gives its residual and the next v. With ``every=None`` and
    ``hyperstep()`` after the backward pass but before ``step()``, weights, v and hyperparameters all move from the same
    point, as in the paper. The first hyperstep sees the direct term alone. Starts are watched as in :class:`WarmStart`:
    one whose residual is more than 10·‖g‖ is dropped, and v begins again at ρg.

    Args:
        step_size: ρ > 0, less than 2/‖A‖₂; in the paper the inner learning rate.

    Raises:
        ValueError: ``step_size`` is not positive.

    Source: Dagréou, Ablin, Vaiter and Moreau 2022, "A framework for bilevel optimization that enables stochastic and global
    variance reduction algorithms" (arXiv 2201.13409), algorithm 1; its v has the other sign.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": 2 * v["w"]}, like={"w": torch.ones(1)})
    >>> first = SOBA(step_size=0.25).solve(A, {"w": torch.ones(1)})
    >>> second = SOBA(step_size=0.25).solve(A, {"w": torch.ones(1)}, first.state)
    >>> second.value["w"], second.residuals, second.state["solution"]["w"]
    (tensor([0.2500]), tensor([0.5000]), tensor([0.3750]))
    """

    step_size: float

    def __post_init__(self) -> None:
        if not (is_finite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size={self.step_size!r}: give a positive number")

    def solve(self, A: Operator, g: Tree, state: State | None = None) -> Solution:
        """The carried v, and its step for the next time."""
        moved = WarmStart(Neumann(terms=0, step_size=self.step_size)).solve(A, g, state)
        last = carried(state, "solution", g)
        if last is None:
            return replace(moved, value=trees.zeros_like(g))
        begun = moved.residuals[0]
        kept = (trees.norm(g, batched=A.is_batched(g)) > 0) & ~(begun > GROWTH_LIMIT)
        return replace(moved, value=trees.scaled(last, kept.to(begun.dtype)))
