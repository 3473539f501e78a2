"""The identity in place of the inverse curvature."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hoptim.linalg.operators import Operator
from hoptim.solvers.base import Solver
from hoptim.solvers.run import Run
from hoptim.solvers.solution import Solution, State


@dataclass(frozen=True, kw_only=True)
class Identity(Solver):
    """The identity in place of the inverse curvature: x = g, without any product (T1–T2).

    Source: Luketina et al. 2016 (arXiv 1511.06727).

    >>> import torch
    >>> from hoptim.linalg.operators import Symmetric
    >>> Identity().solve(Symmetric(lambda v: v, like=torch.ones(1)), torch.ones(1)).value
    tensor([1.])
    """

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """A copy of g; its residual is unknown, since that would take a product."""
        run = Run(A, g, terms=0)
        return run.finish(g.clone(), run.read())
