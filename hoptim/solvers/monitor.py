"""What an iterative solve records and how it ends, so that the code of a solver is the algorithm alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.solvers.solution import Solution, Status

Numbers = NDArray[np.float64]  # on the host, where NumPy takes a third of torch's time for so few
CHECK_EVERY = 16  # products between two reads of the norms from a device
GROWTH_LIMIT = 10.0  # a series whose residual grows to this many times ‖g‖ has failed
LARGE = 1 + 1e-5  # a residual above 1, beyond rounding: zero would solve the system better
NEGATIVE = -1e-6  # a curvature below this share of the largest one is negative, beyond rounding
ROUNDING = 10.0  # units in the last place: a residual below this many is rounding alone, also at a tolerance of 0
DOUBT = 0.1  # of the recorded residual: if rounding may have taken it as far as this from the true one, that one is computed
SLACK = 2.0  # if the true residual exceeds the tolerance by this factor, the solve has not converged


def should_check_convergence(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU each term is checked, which costs nothing; a device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % CHECK_EVERY == 0)


class Monitor:
    """Counts the terms of a solve, knows which right-hand sides are still active, and says how the solve ended.

    A solver iterates over it, and in each term records a residual and, if it knows one, a curvature, of shape () or (R,).
    ``where_active`` sets the coefficients of a right-hand side that has stopped to zero, so that the host need not read from
    the device. At the end ``read`` brings all records to the host at once, and ``finish`` makes a solution of them. With
    ``stop_on_growth`` all right-hand sides stop once a residual exceeds 10·‖g‖: the solve has failed.

    Attributes:
        g_norm: ‖g‖, and ``scale`` the same with 1 for 0.
        active: which right-hand sides have not stopped; ``flat``: which have stopped for want of curvature.
        largest: ‖A‖, if a solver knows more than the curvatures.
        drift: how far rounding may have taken the recorded residual from the true one, relative to ‖g‖.
        norms: ‖g − Aᵀx‖ after each term.
        curvatures: ⟨v, A v⟩ / ⟨v, v⟩ for some vector v of each term.
    """

    def __init__(
        self, A: Operator, g: Tensor, terms: int, tolerance: float | None = None, stop_on_growth: bool = False
    ) -> None:
        least = ROUNDING * torch.finfo(g.dtype).eps
        self.A, self.g, self.terms, self.tolerance = A, g, terms, None if tolerance is None else max(tolerance, least)
        self.g_norm = A.norm(g)
        self._is_one_on_cpu = not self.g_norm.ndim and self.g_norm.device.type == "cpu"
        length = self.number(self.g_norm)
        self.active = length > 0  # as all below a tensor, or a plain number
        self.scale = (length if length > 0 else 1.0) if self._is_one_on_cpu else torch.where(self.active, length, 1.0)
        self.largest = self.drift = self._zero = self.number(torch.zeros_like(self.g_norm))
        self.flat = self.active & False
        self.norms: list[Any] = []
        self.curvatures: list[Any] = []
        self._goal = self.scale * (-math.inf if self.tolerance is None else self.tolerance)
        self._ceiling = self.scale * GROWTH_LIMIT if stop_on_growth else math.inf

    def __iter__(self) -> Iterator[int]:
        """The terms 1, 2, …, until the host sees that all right-hand sides have stopped."""
        for term in range(1, self.terms + 1):
            yield term
            is_looked_at = should_check_convergence(term, self.terms, self.g_norm)
            if is_looked_at and not (self.active if self._is_one_on_cpu else self.active.any()):
                return

    def number(self, a: Tensor) -> Any:
        """A plain number for one right-hand side on a CPU, which takes a tenth of a tensor's time; else the tensor."""
        return a.item() if self._is_one_on_cpu else a

    def where_active(self, a: Any, otherwise: Any = None) -> Any:
        """The coefficient a; for right-hand sides that have stopped the other one, by default zero."""
        otherwise = self._zero if otherwise is None else otherwise
        if self._is_one_on_cpu:
            return a if self.active else otherwise
        return torch.where(self.active, a, otherwise)

    def stop(self, where: Any) -> None:
        """Stop these right-hand sides, whose rest lies where the curvature is flat within rounding."""
        self.flat = self.flat | (self.active & where)
        self.active = self.active & (where ^ True)

    def record_curvature(self, curvature: Any) -> None:
        """Note ⟨v, A v⟩ / ⟨v, v⟩ for some vector v of this term."""
        self.curvatures.append(self.where_active(curvature))

    def record_residual(self, norm: Any) -> None:
        """Note ‖g − Aᵀx‖ after this term, and stop right-hand sides that have converged, or all if one has grown too far."""
        self.norms.append(norm)
        if self._is_one_on_cpu:  # compared as plain numbers, in a fifth of the time
            self.active = self.active and self._goal < float(norm) <= self._ceiling
        else:
            self.active = self.active & (norm > self._goal)
            if self._ceiling is not math.inf:
                self.active = self.active & (norm <= self._ceiling).all()

    @property
    def residuals(self) -> Tensor:
        """‖g − Aᵀx‖ / ‖g‖ after each term, on the device."""
        if self._is_one_on_cpu:
            return self.g_norm.new_tensor([float(norm) for norm in self.norms]) / self.scale
        return torch.stack(self.norms) / self.scale if self.norms else self.g_norm.new_empty((0, *self.g_norm.shape))

    def read(self) -> History:
        """What was recorded, on the host."""
        rows = [self.g_norm, self.scale, self.largest, self.drift, self.flat, *self.norms, *self.curvatures]
        if self._is_one_on_cpu:
            found = np.array([float(row) for row in rows])
        else:
            found = torch.stack([row.to(self.g_norm) for row in rows]).double().cpu().numpy()
        g_norm, scale, largest, drift, flat = found[:5]
        norms, curvatures = found[5 : 5 + len(self.norms)], found[5 + len(self.norms) :]
        if len(curvatures):
            largest = np.maximum(largest, abs(curvatures).max(0))
        return History(g_norm, largest, norms / scale, curvatures, drift, bool(flat.any()))

    def finish(
        self,
        x: Tensor,
        history: History | None = None,
        *,
        failed: Status | None = None,
        negative: bool | None = None,
        remark: Status | None = None,
        spent: str = "",
        met: str = "met a curvature of",
        detail: str = "",
        **rest: Any,
    ) -> Solution:
        """The solution x with its status; if it seems to have converged, its true residual is checked.

        Args:
            x: the answer.
            history: what ``read`` gave; default: it is read now.
            failed: a failure that the solver has found.
            negative: whether the curvature was negative; ``None`` to take it from the recorded curvatures.
            remark: a remark of the solver.
            spent: the words for what the residual was reached with, if not the terms.
            met: the words before the lowest curvature, if it is negative.
            detail: the figures behind the status.
            rest: other fields of the solution.
        """
        history = history or self.read()
        if negative is None and (negative := history.is_negative):
            detail = joined(f"{met} {history.lowest:.3g}", detail)
        last = history.residuals[-1] if len(history.residuals) else np.zeros_like(history.g_norm)
        worst, goal = float(last.max()), self.tolerance or 0.0
        gravest_first = [
            (Status.NON_FINITE_GRADIENT, not math.isfinite(history.g_norm.max())),
            (Status.NON_FINITE_PRODUCT, not math.isfinite(worst)),
            (failed, failed),
            (Status.NO_CURVATURE, history.has_no_curvature),
            (Status.NEGATIVE_CURVATURE, negative),
            (remark, remark),
            (Status.LARGE_RESIDUAL, worst > LARGE),
            (Status.FLAT_DIRECTIONS, history.flat),
            (Status.FINISHED, True),
        ]
        status = next(status for status, holds in gravest_first if status and holds)
        facts = {"products": len(self.norms), "negative_curvature": negative, **rest}
        solution = Solution(value=x, status=status, residuals=self.residuals, detail=detail, **facts)
        if not (status.ok and len(self.norms)):
            return solution
        spent = spent or f"{len(self.norms)} of {self.terms} terms"
        is_solved = self.tolerance is not None and worst <= goal * (1 + 1e-6)
        if is_solved or bool((DOUBT * last < history.drift).any()):
            return self._check_true_residual(solution, last, goal, spent)
        return replace(solution, detail=joined(f"{spent}, residual {worst:.3g}", detail))

    def _check_true_residual(self, solution: Solution, recorded: Numbers, goal: float, spent: str) -> Solution:
        """Check ‖g − Aᵀx‖ by a product with x, since rounding makes the recorded residuals drift away from it."""
        true = self.A.norm(self.A.T.product_onto_(self.g.clone(), -1.0, solution.value)) / self.scale
        last = true.double().cpu().numpy()
        worst, status, words = float(last.max()), solution.status, f"{spent}, residual {float(last.max()):.3g}"
        is_far = bool((last > SLACK * np.maximum(recorded, goal)).any())
        converged = not is_far and worst <= SLACK * goal
        if not worst < float("inf"):
            status, words = Status.NON_FINITE_PRODUCT, "with the solution"
        elif is_far:
            status, words = Status.INEXACT, f"{spent}, a residual of {worst:.3g}, recorded as {float(recorded.max()):.3g}"
        elif converged and not solution.negative_curvature:
            status = Status.CONVERGED
        elif not converged and worst > LARGE and status.kind == "ok":
            status = Status.LARGE_RESIDUAL
        return replace(
            solution,
            status=status,
            converged=converged,
            residuals=torch.cat([solution.residuals[:-1], true[None]]),
            products=solution.products + 1,
            detail=joined(words, "" if status is Status.NON_FINITE_PRODUCT else solution.detail),
        )


def joined(*words: str) -> str:
    """The words that are there, for a solution's ``detail``."""
    return "; ".join(filter(None, words))


@dataclass(frozen=True)
class History:
    """The records of a solve, in float64 on the host: ‖g‖, a lower bound on ‖A‖, and a row for each term.

    Residuals are relative to ‖g‖; curvatures are zero for right-hand sides that had stopped. ``drift`` bounds how far the
    last residual may be from the true one, ``flat`` says whether a right-hand side has stopped for want of curvature.
    """

    g_norm: Numbers
    largest: Numbers
    residuals: Numbers
    curvatures: Numbers
    drift: Numbers | float = 0.0
    flat: bool = False

    @property
    def lowest(self) -> float:
        """The lowest curvature, or zero."""
        return float(min(self.curvatures.min(), 0.0)) if self.curvatures.size else 0.0

    @property
    def is_negative(self) -> bool:
        """Whether a curvature was negative, relative to the largest one of its right-hand side."""
        return bool((self.curvatures < NEGATIVE * self.largest).any())

    @property
    def has_no_curvature(self) -> bool:
        """Whether all products of a nonzero right-hand side were zero."""
        return bool(len(self.curvatures)) and bool(((self.g_norm > 0) & (self.largest == 0)).any())

    @property
    def growth(self) -> Growth | None:
        """The first term at which a residual exceeded the limit, for the worst right-hand side; ``None`` if none did."""
        residuals, curvatures = (rows.reshape(len(rows), self.g_norm.size) for rows in (self.residuals, self.curvatures))
        over = ~(residuals <= GROWTH_LIMIT).all(1)
        if not bool(over.any()):
            return None
        row = int(over.argmax())
        side = int(residuals[row].argmax())  # NumPy takes NaN for the largest
        return Growth(row + 1, side, float(residuals[row, side]), float(curvatures[: row + 1][-1, side]))


class Growth(NamedTuple):
    """How a residual exceeded the limit: at which term, for which right-hand side, how far, and along which curvature."""

    term: int
    side: int
    residual: float
    curvature: float
