"""The exact curvature: the Hessian of the training loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hoptim.curvature.linearization import Curvature, Draw, GradientGraph, Linearization
from hoptim.curvature.second_derivatives import check_once, check_twice_differentiable
from hoptim.linalg.operators import Operator
from hoptim.problem.problem import At


@dataclass(frozen=True, kw_only=True)
class DoubleBackward(Curvature):
    """A curvature that goes back through a graph of F = ∇_w L_T, cached or compiled."""

    compile: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool):
            raise TypeError(f"compile={self.compile!r}: give True or False")

    @abstractmethod
    def of(self, graph: GradientGraph) -> Operator:
        """The curvature at the point where ``graph`` was built."""

    @contextmanager
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> Iterator[Linearization]:
        """F and its derivatives from one graph."""
        if self.compile:
            from hoptim.curvature.compiled.programs import compiled_linearization  # here, since inductor is slow to import

            check_once(at, batch)
            found = compiled_linearization(at, batch, self)
            if found is not None:
                yield found
                return
        with at.loss("train_loss", batch) as (loss, parts, _):
            check_twice_differentiable(at, loss, batch)
            yield self._linearized(GradientGraph(loss, at.weights, at.leaves, parts, at.passes(loss)))

    def _linearized(self, graph: GradientGraph) -> Linearization:
        return graph.linearization(self.of(graph))


@dataclass(frozen=True, kw_only=True)
class Exact(DoubleBackward):
    """The exact curvature, A = ∂F/∂w = ∇²_w L_T, by double backward through one cached graph.

    Args:
        compile: trace and compile the products, default ``False``. That takes seconds, once for each run and shape of batch,
            and makes the products faster. A loss that cannot be traced is not compiled, with a warning that says why.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    >>> Exact()
    Exact(compile=False)
    """

    def of(self, graph: GradientGraph) -> Operator:
        """The Hessian."""
        return graph.hessian()
