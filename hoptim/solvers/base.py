"""What every solver of Aᵀx = g shares: how a solve ended, what it returns, and what it must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from hoptim.operators import Operator
from hoptim.trees import Tree


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
    STEP_TOO_LARGE = (
        "failed",
        "the series diverged: the step size is more than twice the inverse of the largest curvature. Take a smaller "
        "step_size, or step_size=None, which chooses one",
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
        residuals: ‖g − Aᵀx‖ / ‖g‖, one a product of the series, on the device: shape (products,) or (products, R).
        products: how many products with A were spent, those for the spectrum included.
        step_size: the step that was used; ``None`` for a solver without one.
        state: what the solver wants to see again at its next call (a vector for the spectrum); may be empty.
    """

    value: Tree
    status: Status
    residuals: Tensor
    products: int
    detail: str = ""
    step_size: float | None = None
    state: Tree


class Solver(ABC):
    """A strategy for Aᵀx = g: a frozen dataclass that owns its options, sees no model and keeps no state."""

    @abstractmethod
    def solve(self, A: Operator, g: Tree, state: Tree | None = None) -> Solution:
        """Solve Aᵀx = g for one right-hand side, or for R at once where ``g`` has a leading axis.

        Args:
            A: the curvature.
            g: the right-hand side, of the names and shapes of ``A.like``, or with a leading axis R.
            state: the ``state`` of the last solution on a similar operator, if any.
        """
