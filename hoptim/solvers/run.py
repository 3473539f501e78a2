"""The bookkeeping of an iterative solve, so that a solver's own code is the algorithm: one place for how a solve ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.solvers.solution import Solution, Status

CHECK_EVERY = 16  # products between two looks of the host at the norms on a device
GROWTH_LIMIT = 10.0  # a residual that outgrows ‖g‖ by this factor is no use
NEGATIVE = -1e-6  # a curvature below this share of the largest is negative, and no rounding
SLACK = 2.0  # a true residual above the tolerance by this factor has not converged


def should_check_convergence(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU a look costs nothing; elsewhere the device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % CHECK_EVERY == 0)


class Run:
    """A solve under way: it counts the terms, and knows which right-hand sides still move.

    A solver iterates over it, and records a residual and, where it knows one, a curvature in each term, of shape () or (R,).
    A right-hand side that has converged stays as it is, since ``where_active`` makes its coefficients zero, so that the host
    need not look at a device. In the end ``read`` brings what was recorded to the host, at once, and ``finish`` makes the
    solution of it. With a ``limit``, all stop where a relative residual has outgrown it: the solve has failed.
    """

    def __init__(
        self, A: Operator, g: Tensor, terms: int, tolerance: float | None = None, limit: float | None = None
    ) -> None:
        self.A, self.g, self.terms, self.tolerance = A, g, terms, tolerance
        self.start = A.norm(g)
        self.active = self.start > 0
        self.scale = torch.where(self.active, self.start, 1.0)
        self.largest = self._zero = torch.zeros_like(self.start)  # ‖A‖, where a solver knows more than the curvatures
        self.norms: list[Tensor] = []
        self.curvatures: list[Tensor] = []
        self._goal = None if tolerance is None else tolerance * self.scale
        self._ceiling = None if limit is None else limit * self.scale
        self._is_at_hand = not self.start.ndim and self.start.device.type == "cpu"

    def __iter__(self) -> Iterator[int]:
        """The terms 1, 2, …, until the host sees that nothing moves."""
        for term in range(1, self.terms + 1):
            yield term
            looks = should_check_convergence(term, self.terms, self.start)
            if looks and not bool(self.active if self._is_at_hand else self.active.any()):
                return

    def where_active(self, a: Tensor) -> Tensor:
        """The coefficient, and zero for right-hand sides that have stopped."""
        if self._is_at_hand:
            return a if self.active else self._zero
        return torch.where(self.active, a, self._zero)

    def stop(self, where: Tensor) -> None:
        """Let these right-hand sides move no more."""
        self.active = self.active & ~where

    def record_curvature(self, curvature: Tensor) -> None:
        """Note ⟨v, A v⟩ / ⟨v, v⟩ of a vector on the way."""
        self.curvatures.append(self.where_active(curvature))

    def record_residual(self, norm: Tensor) -> None:
        """Note ‖g − Aᵀx‖ after this term; what has converged stops, and all do where one has outgrown the limit."""
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
        """The solution x with its status; where it seems to have converged, x is put into the system first.

        A solver adds to the ``history`` a failure or a remark of its own, or that the curvature was ``negative`` where
        the recorded ones do not tell; ``met`` says how it met them. What is left are other fields of the solution.
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
        """What is recorded along the way drifts from ‖g − Aᵀx‖ by rounding, so x is put into the system once."""
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
    """What was recorded of a solve, in float64 on the host: ‖g‖, ‖A‖ as far as it is known, and a row for each term.

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
        """Whether a curvature was negative beside the largest of its right-hand side."""
        return bool((self.curvatures < NEGATIVE * self.largest).any())

    @property
    def is_flat(self) -> bool:
        """Whether A took a right-hand side, and all that came of it, to zero."""
        return bool(len(self.curvatures)) and bool(((self.start > 0) & (self.largest == 0)).any())

    @property
    def growth(self) -> Growth | None:
        """Where a residual has first outgrown the limit, of the right-hand side that is worst there."""
        residuals, curvatures = (rows.reshape(len(rows), self.start.numel()) for rows in (self.residuals, self.curvatures))
        over = ~(residuals <= GROWTH_LIMIT).all(1)
        if not bool(over.any()):
            return None
        row = int(over.nonzero()[0])
        side = int(residuals[row].nan_to_num(nan=torch.inf).argmax())
        return Growth(row + 1, side, float(residuals[row, side]), float(curvatures[: row + 1][-1, side]))


class Growth(NamedTuple):
    """How a residual has outgrown the limit: at which term, of which right-hand side, and along which curvature."""

    term: int
    side: int
    residual: float
    curvature: float
