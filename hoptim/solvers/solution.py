"""How a solve ended, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from hoptim.linalg.trees import Tree

State = dict[str, Tree]  # what a solver carries to its next call, by kind: {"direction": …}


class Status(Enum):
    """How a solve ended. ``status.ok`` says whether its answer may be used, ``status.message`` what to do.

    Three kinds: ok; ok with a remark; failed. After a failed solve the hyperparameters do not move.

    >>> Status.NEGATIVE_CURVATURE.ok, Status.STEP_TOO_LARGE.ok
    (True, False)
    """

    FINISHED = ("ok", "all terms were used and the answer is sane")
    CONVERGED = ("ok", "the residual is below the tolerance")
    NEGATIVE_CURVATURE = (
        "remark",
        "the training loss curves downward along some direction, so its stationary point is no minimum there; the answer "
        "is bounded and used. Train longer before a hyperstep, add damping, or take fewer terms, if progress is poor",
    )
    GROWING = (
        "remark",
        "the step size is too large for this curvature and the series grows, though it is still bounded; the answer is "
        "used. Take a smaller step_size, or step_size=None, which chooses one",
    )
    LARGE_RESIDUAL = (
        "remark",
        "the answer leaves a residual longer than the right-hand side, so that it solves the system less well than zero "
        "does: the curvature is nearly singular there, or a low rank misses what curves well above rho. Add damping, take "
        "MINRES, a higher rank or a larger rho, if progress is poor",
    )
    INEXACT = (
        "remark",
        "the residual that the solver reckons with is below the tolerance, the true one is not: rounding, differences or "
        "fresh batches change the products, which adds up where the curvature is ill-conditioned; the answer is used. Add "
        "damping or a preconditioner, or take a larger tolerance or fewer terms",
    )
    REPLAY_DIFFERS = (
        "remark",
        "the inner steps, taken again, do not end where they did, or not all are known: something between loss and step is "
        "not seen, such as clipping, or gradients cleared elsewhere than by optimizer.zero_grad(); the answer is used",
    )
    SENSITIVE = (
        "remark",
        "the derivative grows backwards through the inner steps: the end depends strongly on where they began. Take fewer "
        "steps, or a smaller inner learning rate; the answer is used",
    )
    REPLAY_LOST = (
        "failed",
        "the inner steps, taken again, end nowhere near where they did: something between loss and step changes the "
        "gradients by much, such as a GradScaler. Take an implicit method",
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
        "the training loss has no curvature at this point, so the system has no solution. Add damping, or a penalty to "
        "the training loss",
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
        value: x by weight name; with a leading axis where the right-hand side had one.
        status: how the solve ended.
        detail: the figures behind the status, in words; empty where there is nothing to add.
        residuals: ‖g − Aᵀx‖ / ‖g‖, one a term, on the device: shape (terms,) or (terms, R). They are reckoned along the way,
            but for the last one of a solve that converged: that is by a product with x.
        products: how many products with A were spent, those for the spectrum and for that last residual included.
        step_size: the step that was used; ``None`` for a solver without one.
        state: what the solver wants to see again at its next call, such as a vector for the spectrum under "direction";
            may be empty.
    """

    value: Tree
    status: Status
    residuals: Tensor
    products: int
    detail: str = ""
    step_size: float | None = None
    state: State


@dataclass(frozen=True, kw_only=True)
class Unread:
    """A solve whose last figures are still on the device: the host looks at them when it has more to look at.

    Attributes:
        value: x, unless what is read asks for another attempt.
        figures: what the status depends on, flat, on the device.
        read: the solution, from the figures on the host; its value is ``value`` itself, or another after another attempt.
    """

    value: Tree
    figures: Tensor
    read: Callable[[list[float]], Solution]

    @classmethod
    def known(cls, solution: Solution) -> Unread:
        """Of a solution whose figures the host has seen."""
        return cls(value=solution.value, figures=solution.residuals.new_empty(0), read=lambda _: solution)

    def solution(self) -> Solution:
        """Read now."""
        return self.read(self.figures.tolist())

    def mapped(self, function: Callable[[Tree], Tree]) -> Unread:
        """The same for ``function`` of x."""
        value = function(self.value)

        def read(found: list[float]) -> Solution:
            solution = self.read(found)
            return replace(solution, value=value if solution.value is self.value else function(solution.value))

        return Unread(value=value, figures=self.figures, read=read)
