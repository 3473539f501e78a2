"""The identity in place of the inverse curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import (
    Deferring,
    ending,
)
from hoptim.solvers.solution import Solution, State, Status, Unread

FIRST_PRODUCTS, LATER_PRODUCTS = 10, 2  # of the power iteration: from a fresh vector, and from a carried one


@dataclass(frozen=True, kw_only=True)
class Identity(Deferring):
    """The identity in place of the inverse curvature: x = g, without a product (T1–T2).

    Source: Luketina et al. 2016 (arXiv 1511.06727).

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: v, like={"w": torch.ones(1)})
    >>> Identity().solve(A, {"w": torch.ones(1)}).value
    {'w': tensor([1.])}
    """

    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Return g itself; the residual is not known, since no product was spent."""
        x, start = trees.clone(g), trees.norm(g, batched=A.is_batched(g))
        none = start.new_empty((0, *start.shape))

        def then(status: Status, _: list[float]) -> Solution:
            return Solution(value=x, status=status, residuals=none, products=0, state={})

        flags = {Status.NON_FINITE_GRADIENT: ~start.isfinite(), Status.FINISHED: torch.ones_like(start, dtype=torch.bool)}
        return ending(x, flags, [], then)
