"""Solvers that build a Krylov space: conjugate gradients and minimal residuals."""

from __future__ import annotations

from torch import Tensor

from hoptim.linalg.trees import Tree
from hoptim.solvers.base import ending
from hoptim.solvers.solution import Solution, Status, Unread


def _krylov(x: Tree, history: Tensor, flags: dict[Status, Tensor], lowest: Tensor, met: str) -> Unread:
    products = len(history)

    def then(status: Status, figures: list[float]) -> Solution:
        detail = f"{met} {figures[0]:.3g}, within {products} products" if status is Status.NEGATIVE_CURVATURE else ""
        return Solution(value=x, status=status, detail=detail, residuals=history, products=products, state={})

    return ending(x, flags, [lowest.amin()], then)
