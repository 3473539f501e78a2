"""The answer of a solver, and how the solve ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]  # what a solver passes to its next call: "solution", and "direction" for the power iteration


class Status(Enum):
    """How a solve ended. ``status.ok`` says whether its answer may be used, ``status.message`` what to do.

    There are three kinds: ok; ok with a remark; failed. After a failed solve the hyperparameters do not move. If several
    apply, the order is: a failure, ``INEXACT``, ``NEGATIVE_CURVATURE``, ``CONVERGED``, the other remarks, ``LARGE_RESIDUAL``
    before ``FLAT_DIRECTIONS``. The flags ``converged`` and ``negative_curvature`` of the solution are set whichever is the
    status, and ``detail`` has the number of terms and the last residual.

    >>> Status.NEGATIVE_CURVATURE.ok, Status.STEP_TOO_LARGE.ok
    (True, False)
    """

    FINISHED = (
        "ok",
        "all terms or steps were used. How good the answer is, the last residual says: near 1, little is solved",
    )
    CONVERGED = "ok", "the true residual is below the tolerance"
    NEGATIVE_CURVATURE = (
        "remark",
        "the training loss curves downward along some direction, so that its stationary point is no minimum; the answer is "
        "bounded and used. If progress is poor, train longer before a hyperstep, add damping, or take fewer terms",
    )
    GROWING = (
        "remark",
        "the series grows, since the step size is too large for this curvature, but it is bounded; the answer is used. Take "
        "a smaller step_size, or step_size=None, which chooses one",
    )
    LARGE_RESIDUAL = (
        "remark",
        "zero would solve the system better: the curvature is nearly singular, or the rank too low; the answer is used. Add "
        "damping, or take MINRES, a higher rank or a larger rho",
    )
    FLAT_DIRECTIONS = (
        "remark",
        "the solve stopped early, since along the rest of the right-hand side the training loss has no curvature within "
        "rounding; the answer is used. If the last residual is large, add damping or a penalty, or compute in float64",
    )
    INEXACT = (
        "remark",
        "rounding, finite differences or fresh batches have made the true residual larger than the tracked one; the answer "
        "is used. Add damping or a preconditioner, or take a larger tolerance or fewer terms",
    )
    REPLAY_DIFFERS = (
        "remark",
        "the replayed inner steps do not end where the real ones did, or not all of them are known: something between loss "
        "and step is not seen, such as clipping, or gradients not cleared by optimizer.zero_grad(); the answer is used",
    )
    UNSEEN_WRITES = (
        "remark",
        "the forward pass writes what later losses read where autograd does not see it, as under no_grad() or by detach(): "
        "this part of the derivative is missing; the answer is used. How much it matters, hoptim.audit(inner=...) shows",
    )
    SENSITIVE = (
        "remark",
        "the derivative grows on the way back through the inner steps, whose end depends strongly on their start; the "
        "answer is used. Take fewer steps, or a smaller inner learning rate",
    )
    REPLAY_LOST = (
        "failed",
        "the replayed inner steps end far from where the real ones did: something between loss and step changes the "
        "gradients a lot, such as a GradScaler. Take an implicit method",
    )
    STEP_TOO_LARGE = (
        "failed",
        "the series diverged: the step size is too large, or the interval too short, for the largest curvature. Take a "
        "smaller step_size or a longer interval, or None, which chooses one",
    )
    CURVATURE_TOO_NEGATIVE = (
        "failed",
        "the series diverged along a direction of negative curvature. Train longer before a hyperstep, add damping above "
        "the most negative curvature, or take fewer terms",
    )
    NO_CURVATURE = (
        "failed",
        "the training loss has no curvature here, so the system has no solution. Add damping, or a penalty to the loss",
    )
    NON_FINITE_LOSS = (
        "failed",
        "a loss is infinite or NaN. Look at the batch and at the inner learning rate; the hyperparameters may be extreme",
    )
    NON_FINITE_GRADIENT = (
        "failed",
        "a gradient is infinite or NaN while its loss is finite. Look for sqrt, norm or log at zero in the losses",
    )
    NON_FINITE_PRODUCT = (
        "failed",
        "a product with the curvature is infinite or NaN while its vector is finite. Look for functions without a second "
        "derivative in the training loss, such as norm or sqrt at zero",
    )

    def __init__(self, kind: str, message: str) -> None:
        self.kind, self.message = kind, message

    @property
    def ok(self) -> bool:
        """Whether the answer may be used: true for ok and for ok with a remark."""
        return self.kind != "failed"


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The answer of a solver, and how far it can be trusted.

    Attributes:
        value: x. From a solver a vector of shape (n,), or (R, n) for R right-hand sides; from ``hypergradient`` and in the
            record a dict of tensors by weight name.
        status: how the solve ended.
        detail: the number of terms, the last residual and the figures behind the status, in words.
        converged: whether the true residual ‖g − Aᵀx‖ / ‖g‖, computed by a product with x, is within twice the tolerance for
            every right-hand side. Always false for a solver without a tolerance.
        negative_curvature: whether negative curvature was met on the way.
        residuals: ‖g − Aᵀx‖ / ‖g‖ after each term, on the device: shape (terms,) or (terms, R). The solver tracks them along
            the way; only the last one is the true residual, if the solver checked whether it has converged.
        products: the number of products with A, including those for the spectrum and for the true residual.
        step_size: the step size that was used; ``None`` for a solver without one.
        state: what the solver wants to see again at its next call, such as a vector for the spectrum under "direction".
    """

    value: Any
    status: Status
    residuals: Tensor
    products: int
    detail: str = ""
    converged: bool = False
    negative_curvature: bool = False
    step_size: float | None = None
    state: State = field(default_factory=dict)


def joined(solutions: Sequence[Solution], what: str) -> Solution:
    """Several solutions as one, without a value: as good as the worst of them, which ``detail`` names.

    Args:
        solutions: of systems that have nothing to do with each other.
        what: each of them is the solution of, such as "fold".
    """
    place = worst(solutions)
    finals = [solution.residuals[-1].amax() for solution in solutions if len(solution.residuals)]
    detail = f"{what} {place + 1} of {len(solutions)}: {solutions[place].detail or 'no detail'}"
    return Solution(
        value=None,
        status=solutions[place].status,
        detail="" if solutions[place].status.kind == "ok" else detail,
        converged=all(solution.converged for solution in solutions),
        negative_curvature=any(solution.negative_curvature for solution in solutions),
        residuals=torch.stack(finals)[None] if finals else torch.empty(0),
        products=sum(solution.products for solution in solutions),
    )


def worst(solutions: Sequence[Solution]) -> int:
    """The place of the solution that ended worst: the first that failed, else the first with a remark, else the first."""
    kinds = [("failed", "remark", "ok").index(solution.status.kind) for solution in solutions]
    return kinds.index(min(kinds))
