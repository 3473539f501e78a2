"""A solver for a block-diagonal system that solves each block by itself, all of them side by side."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hoptim.linalg.operators import Operator, Wrapped
from hoptim.linalg.vectors import Layout
from hoptim.solvers.base import Solver
from hoptim.solvers.solution import Solution, State


@dataclass(frozen=True, kw_only=True)
class Blocks(Solver):
    """Solves A = diag(A_1, …, A_K) block by block, as the weights of K models that have nothing to do with each other.

    A Krylov solver takes its coefficients from inner products. With those of the whole vector, it would look for one
    polynomial that suits all blocks, where each has its own.

    Args:
        solver: that of a block.
        layout: of the whole vector, whose tensors have a leading axis of K.

    >>> import torch
    >>> from hoptim.linalg.operators import Symmetric
    >>> from hoptim.solvers.cg import CG
    >>> diagonal, g = torch.tensor([1.0, 1.0, 5.0, 5.0]), torch.ones(4)           # two blocks, each a multiple of I
    >>> A, layout = Symmetric(lambda v: diagonal * v, like=g), Layout.of({"w": torch.zeros(2, 2)})
    >>> CG(terms=1).solve(A, g).value, Blocks(solver=CG(terms=1), layout=layout).solve(A, g).value
    (tensor([0.3333, 0.3333, 0.3333, 0.3333]), tensor([1.0000, 1.0000, 0.2000, 0.2000]))
    """

    solver: Solver
    layout: Layout

    def solve(self, A: Operator, g: Tensor, state: State | None = None) -> Solution:
        """The blocks as right-hand sides of their own."""
        blocks = InBlocks(A, self.layout)
        solution = self.solver.solve(blocks, blocks.apart(g))
        return replace(solution, value=blocks.together(solution.value), state={})


class InBlocks(Wrapped):
    """A block-diagonal operator on K rows at once, each of which meets its own block.

    Args:
        base: the operator on whole vectors.
        layout: of a whole vector, whose tensors have a leading axis of K.
    """

    def __init__(self, base: Operator, layout: Layout) -> None:
        super().__init__(base)
        self.whole, self.count = layout, layout.shapes[0][0]
        self.one = replace(layout, shapes=tuple(shape[1:] for shape in layout.shapes))
        self.size = self.one.size

    total, gaussian = Operator.total, Operator.gaussian  # of its own size

    def apart(self, v: Tensor) -> Tensor:
        """A whole vector as K rows."""
        return self.one.flatten(self.whole.views(v), (self.count,))

    def together(self, rows: Tensor) -> Tensor:
        """K rows as a whole vector."""
        return self.whole.flatten(self.one.views(rows))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apart(self.base @ self.together(v))
