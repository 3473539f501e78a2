"""The bookkeeping of an iterative solve and how it ends, so that the code of a solver is the algorithm alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.solvers.solution import Solution, Status

CHECK_EVERY = 16  # products between two reads of the norms from a device
GROWTH_LIMIT = 10.0  # an answer whose residual is this many times ‖g‖ is of no use
NEGATIVE = -1e-6  # a curvature below this share of the largest one is negative, beyond rounding
SLACK = 2.0  # if the true residual exceeds the tolerance by this factor, the solve has not converged


def should_check_convergence(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU each term is checked, which costs nothing; a device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % CHECK_EVERY == 0)


class Run:
    """A solve in progress: it counts the terms and knows which right-hand sides are still active.

    A solver iterates over it, and in each term records a residual and, if it knows one, a curvature, of shape () or (R,).
    ``where_active`` sets the coefficients of a right-hand side that has stopped to zero, so that the host need not read from
    the device. At the end ``read`` brings all records to the host at once, and ``finish`` makes a solution of them. With
    ``stop_on_growth`` all right-hand sides stop once a residual exceeds 10·‖g‖: the solve has failed.
    """

    def __init__(
        self, A: Operator, g: Tensor, terms: int, tolerance: float | None = None, stop_on_growth: bool = False
    ) -> None:
        self.A, self.g, self.terms, self.tolerance = A, g, terms, tolerance
        self.start = A.norm(g)
        self.active = self.start > 0
        self.scale = torch.where(self.active, self.start, 1.0)
        self.largest = self._zero = torch.zeros_like(self.start)  # ‖A‖, if a solver knows more than the curvatures
        self.norms: list[Tensor] = []
        self.curvatures: list[Tensor] = []
        self._goal = None if tolerance is None else tolerance * self.scale
        self._ceiling = GROWTH_LIMIT * self.scale if stop_on_growth else None
        self._is_one_on_cpu = not self.start.ndim and self.start.device.type == "cpu"

    def __iter__(self) -> Iterator[int]:
        """The terms 1, 2, …, until the host sees that all right-hand sides have stopped."""
        for term in range(1, self.terms + 1):
            yield term
            if should_check_convergence(term, self.terms, self.start) and not bool(self.active.any()):
                return

    def where_active(self, a: Tensor) -> Tensor:
        """The coefficient a; zero for right-hand sides that have stopped."""
        if self._is_one_on_cpu:
            return a if self.active else self._zero
        return torch.where(self.active, a, self._zero)

    def stop(self, where: Tensor) -> None:
        """Stop these right-hand sides."""
        self.active = self.active & ~where

    def record_curvature(self, curvature: Tensor) -> None:
        """Note ⟨v, A v⟩ / ⟨v, v⟩ for some vector v of this term."""
        self.curvatures.append(self.where_active(curvature))

    def record_residual(self, norm: Tensor) -> None:
        """Note ‖g − Aᵀx‖ after this term, and stop right-hand sides that have converged, or all if one has grown too far."""
        self.norms.append(norm)
        if self._goal is not None:
            self.active = self.active & (norm > self._goal)
        if self._ceiling is not None:
            bounded = norm <= self._ceiling
            self.active = self.active & (bounded.all() if bounded.ndim else bounded)

    @property
    def residuals(self) -> Tensor:
        """‖g − Aᵀx‖ / ‖g‖ after each term, on the device."""
        return torch.stack(self.norms) / self.scale if self.norms else self.start.new_empty((0, *self.start.shape))

    def read(self) -> SolveHistory:
        """What was recorded, on the host."""
        found = torch.stack([self.start, self.scale, self.largest, *self.norms, *self.curvatures]).double().cpu()
        start, scale, largest = found[:3]
        norms, curvatures = found[3:].split([len(self.norms), len(self.curvatures)])
        if len(curvatures):
            largest = torch.maximum(largest, curvatures.abs().amax(0))
        return SolveHistory(start=start, largest=largest, residuals=norms / scale, curvatures=curvatures)

    def finish(
        self,
        x: Tensor,
        history: SolveHistory,
        *,
        failed: Status | None = None,
        negative: bool | None = None,
        remark: Status | None = None,
        met: str = "met a curvature of",
        detail: str = "",
        **rest: Any,
    ) -> Solution:
        """The solution x with its status; if it seems to have converged, its true residual is checked.

        Args:
            x: the answer.
            history: what ``read`` gave.
            failed: a failure that the solver has found.
            negative: whether the curvature was negative; ``None`` to take it from the recorded curvatures.
            remark: a remark of the solver.
            met: the words before the lowest curvature, if it is negative.
            detail: the figures behind the status.
            rest: other fields of the solution.
        """
        if negative is None and (negative := history.is_negative):
            detail = "; ".join(filter(None, [f"{met} {history.lowest:.3g}, within {len(self.norms)} products", detail]))
        last = history.residuals[-1] if len(history.residuals) else torch.ones_like(history.start)
        candidates = [
            (Status.NON_FINITE_GRADIENT, not bool(history.start.isfinite().all())),
            (Status.NON_FINITE_PRODUCT, not bool(last.isfinite().all())),
            (failed, failed is not None),
            (Status.NO_CURVATURE, history.is_flat),
            (Status.NEGATIVE_CURVATURE, negative),
            (remark, remark is not None),
            (Status.LARGE_RESIDUAL, bool((last > GROWTH_LIMIT).any())),
        ]
        status = next((status for status, holds in candidates if status and holds), Status.FINISHED)
        facts = {"products": len(self.norms), "negative_curvature": negative, "detail": detail, **rest}
        solution = Solution(value=x, status=status, residuals=self.residuals, **facts)
        if status.ok and self.tolerance is not None and bool((last <= self.tolerance * (1 + 1e-6)).all()):
            return self._check_true_residual(solution, float(last.amax()), self.tolerance)
        return solution

    def _check_true_residual(self, solution: Solution, recorded: float, tolerance: float) -> Solution:
        """Check ‖g − Aᵀx‖ by a product with x, since rounding makes the recorded residuals drift away from it."""
        true = self.A.norm(self.g - self.A.T @ solution.value) / self.scale
        residuals = torch.cat([solution.residuals[:-1], true[None]])
        solution = replace(solution, residuals=residuals, products=solution.products + 1)
        worst = float(true.amax())
        if not worst < float("inf"):
            return replace(solution, status=Status.NON_FINITE_PRODUCT, detail="with the solution")
        if worst > SLACK * tolerance:
            detail = f"a residual of {worst:.3g}, recorded as {recorded:.3g}"
            return replace(solution, status=Status.INEXACT, detail="; ".join(filter(None, [detail, solution.detail])))
        status = solution.status if solution.negative_curvature else Status.CONVERGED
        return replace(solution, status=status, converged=True)


@dataclass(frozen=True, kw_only=True)
class SolveHistory:
    """The records of a solve, in float64 on the host: ‖g‖, a lower bound on ‖A‖, and a row for each term.

    Residuals are relative to ‖g‖; curvatures are zero for right-hand sides that had stopped.
    """

    start: Tensor
    largest: Tensor
    residuals: Tensor
    curvatures: Tensor

    @property
    def lowest(self) -> float:
        """The lowest curvature, or zero."""
        return float(self.curvatures.amin().clamp(max=0.0)) if self.curvatures.numel() else 0.0

    @property
    def is_negative(self) -> bool:
        """Whether a curvature was negative, relative to the largest one of its right-hand side."""
        return bool((self.curvatures < NEGATIVE * self.largest).any())

    @property
    def is_flat(self) -> bool:
        """Whether all products of a nonzero right-hand side were zero."""
        return bool(len(self.curvatures)) and bool(((self.start > 0) & (self.largest == 0)).any())

    @property
    def growth(self) -> Growth | None:
        """The first term at which a residual exceeded the limit, for the worst right-hand side; ``None`` if none did."""
        residuals, curvatures = (rows.reshape(len(rows), self.start.numel()) for rows in (self.residuals, self.curvatures))
        over = ~(residuals <= GROWTH_LIMIT).all(1)
        if not bool(over.any()):
            return None
        row = int(over.nonzero()[0])
        side = int(residuals[row].nan_to_num(nan=torch.inf).argmax())
        return Growth(row + 1, side, float(residuals[row, side]), float(curvatures[: row + 1][-1, side]))


class Growth(NamedTuple):
    """How a residual exceeded the limit: at which term, for which right-hand side, how far, and along which curvature."""

    term: int
    side: int
    residual: float
    curvature: float
