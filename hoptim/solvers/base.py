"""What every solver of Aᵀx = g shares: how a solve ended, what it returns, and what it must do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.solution import Solution, State, Status, Unread
from hoptim.validation import is_finite, is_whole

READ_EVERY = 16  # products between two looks of the host at the device's norms
GROWTH_LIMIT = 10.0  # what outgrows ‖g‖ by this factor has failed
NEGATIVE = -1e-6  # curvature below this share of the largest is negative, and no rounding
SLACK = 2.0  # a true residual above the tolerance by this factor has not converged


class Solver(ABC):
    """A strategy for Aᵀx = g: a frozen dataclass that owns its options, sees no model and keeps no state."""

    @abstractmethod
    def solve(self, A: Operator, g: Tree, state: State | None = None) -> Solution:
        """Solve Aᵀx = g for one right-hand side, or for R at once where ``g`` has a leading axis.

        Args:
            A: the curvature.
            g: the right-hand side, of the names and shapes of ``A.like``, or with a leading axis R.
            state: the ``state`` of the last solution on a similar operator, if any; what does not fit is ignored.
        """

    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """The same, with the last look at the device left to the caller, where the solver can leave it."""
        return Unread.known(self.solve(A, g, state))


class Deferring(Solver):
    """A solver that leaves its last look at the device to the caller: it needs ``unread`` alone."""

    @abstractmethod
    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """As :meth:`solve`, unread."""

    def solve(self, A: Operator, g: Tree, state: State | None = None) -> Solution:
        """Solve, and read."""
        return self.unread(A, g, state).solution()


@dataclass(frozen=True, kw_only=True)
class Iterative(Deferring):
    """A solver of at most ``terms`` products that stops at a relative residual of ``tolerance``, and then looks at it."""

    terms: int = 20
    tolerance: float = 1e-5

    @abstractmethod
    def iterated(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """As :meth:`unread`, before the look."""

    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Solve; where that converged, one product more is for the true residual."""
        return check_true_residual(self.iterated(A, g, state), A, g, self.tolerance)

    def __post_init__(self) -> None:
        if not (is_whole(self.terms) and self.terms >= 1):
            raise ValueError(f"terms={self.terms!r}: give a whole number of products, 1 or more")
        check_tolerance(self.tolerance)


def check_tolerance(tolerance: float) -> None:
    """Raise ``ValueError`` unless it is a finite number, 0 or more."""
    if not (is_finite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance={tolerance!r}: give a finite number, 0 or more")


def check_symmetric(solver: Solver, A: Operator) -> None:
    """Raise ``TypeError`` where A is not known to be symmetric and the solver would be wrong without a word."""
    if not A.symmetric:
        raise TypeError(
            f"{type(solver).__name__} solves symmetric systems only, and this curvature is not known to be symmetric: take "
            "hoptim.GMRES, hoptim.Neumann or hoptim.Identity"
        )


def carried(state: State | None, name: str, like: Tree) -> Tree | None:
    """The vector of that name, where it has the names, shapes, types and devices of ``like``: the model may have changed.

    >>> carried({"direction": {"w": torch.ones(2)}}, "direction", {"w": torch.zeros(2)})
    {'w': tensor([1., 1.])}
    >>> carried({"direction": {"w": torch.ones(2)}}, "direction", {"w": torch.zeros(3)})
    """
    found = (state or {}).get(name)
    if not isinstance(found, dict):
        return None
    kinds = [{key: (v.shape, v.dtype, v.device) for key, v in tree.items()} for tree in (found, like)]
    return found if kinds[0] == kinds[1] else None


def check_true_residual(tried: Unread, A: Operator, g: Tree, tolerance: float) -> Unread:
    """What is reckoned along the way drifts from ‖g − Aᵀx‖ by rounding, by κ of float's own or more, so x is put in once."""

    def read(figures: list[float]) -> Solution:
        solution = tried.read(figures)
        if solution.status is not Status.CONVERGED or not len(solution.residuals):
            return solution
        batched = A.is_batched(g)
        left = trees.add(g, A.T @ solution.value, alpha=-1.0)
        true = (trees.norm(left, batched=batched) * inverse(trees.norm(g, batched=batched))).to(solution.residuals)
        worst, reckoned = torch.stack([true.amax(), solution.residuals[-1].amax()]).tolist()
        found = replace(solution, residuals=torch.cat([solution.residuals[:-1], true[None]]), products=solution.products + 1)
        if not math.isfinite(worst):
            return replace(found, status=Status.NON_FINITE_PRODUCT, detail="with the solution")
        if worst > SLACK * tolerance:
            return replace(found, status=Status.INEXACT, detail=f"a residual of {worst:.3g}, reckoned to be {reckoned:.3g}")
        return found

    return replace(tried, read=read)


def should_check_convergence(term: int, terms: int, on: Tensor) -> bool:
    """On a CPU a look costs nothing; elsewhere the device would have to wait for the host."""
    return term < terms and (on.device.type == "cpu" or term % READ_EVERY == 0)


def ending(
    x: Tree, flags: dict[Status, Tensor], figures: Sequence[Tensor], then: Callable[[Status, list[float]], Solution]
) -> Unread:
    """``then`` of the first status that holds for any right-hand side, and of the figures, each one number."""
    packed = torch.cat([part.reshape(1).double() for part in (*(flag.any() for flag in flags.values()), *figures)])

    def read(found: list[float]) -> Solution:
        status = next((status for status, holds in zip(flags, found, strict=False) if holds), Status.CONVERGED)
        return then(status, found[len(flags) :])

    return Unread(value=x, figures=packed, read=read)


def ended(flags: dict[Status, Tensor], *figures: Tensor) -> tuple[Status, list[Tensor]]:
    """The first status that holds for any right-hand side, and the figures on the host, which looks at the device once."""
    held = [flag.any().reshape(1) for flag in flags.values()]
    read = torch.cat([part.flatten().double() for part in (*held, *figures)]).cpu()
    sizes = [figure.numel() for figure in figures]
    found = read[: len(held)].tolist()
    status = next((status for status, holds in zip(flags, found, strict=True) if holds), Status.CONVERGED)
    parts = read[len(held) :].split(sizes) if sizes else ()
    return status, [part.reshape(figure.shape) for part, figure in zip(parts, figures, strict=True)]


def inverse(a: Tensor) -> Tensor:
    """1 / a, and zero where a is zero."""
    return torch.where(a == 0, 0.0, a.reciprocal())


def rayleigh(v: Tree, product: Tree, batched: bool) -> Tensor:
    """⟨v, A v⟩ / ⟨v, v⟩: the curvature along v; zero where v is zero."""
    square = trees.dot(v, v, batched=batched)
    return trees.dot(v, product, batched=batched) / torch.where(square == 0, 1.0, square)
