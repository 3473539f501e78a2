"""Unrolled: the hypergradient by differentiating through the last inner steps."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from hoptim.checks import is_whole
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.result import Terms
from hoptim.methods.reverse import through_steps
from hoptim.methods.trajectory import Trajectory, look_ahead
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State


@dataclass(frozen=True)
class Unrolled(Method):
    """Differentiate through the last inner steps: dL_V/dλ at w_T(λ), reached in ``steps`` steps from a fixed w_{T−steps}.

    :class:`BilevelOptimizer` keeps copies of the weights and of the inner optimizer's state from before each of the last
    ``steps`` steps, with their batches, options and random states. Going back from the last step, each is repeated with a
    graph, by torch's own optimizers. ``hypergradient(..., inner=optimizer)`` alone differentiates through the steps that
    would come next from the present weights, on ``train_batches``, or else with the same training batch in each step.

    Only one step has a graph at a time. The cost is about three gradients a step, or four without a BilevelOptimizer. In the
    result ``solution.residuals`` are ‖∂L_V/∂w_{T−j}‖ / ‖g‖, and ``solution.value`` is ∂L_V/∂w_{T−steps}, from which one
    could go on to the steps before these.

    Args:
        steps: inner steps, ≥ 1, default 20.
        checkpoint: whether to keep a copy only at every √steps-th step, and repeat the steps from there. Then memory and
            checkpoints on disk grow like √steps, at one more gradient a step. Default ``False``.

    Raises:
        ValueError: ``steps`` is no positive whole number; when called, no inner optimizer.
        TypeError: when called, an inner optimizer that torch can't differentiate.

    Source: Shaban et al. 2019 (arXiv 1810.10667); memory: Griewank and Walther, "Evaluating Derivatives", section 12.

    >>> Unrolled(5)
    Unrolled(steps=5, checkpoint=False)
    """

    steps: int = 20
    _: KW_ONLY
    checkpoint: bool = False

    needs_inner = True

    def __post_init__(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ValueError(f"steps={self.steps!r}: give a whole number of inner steps, 1 or more")
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"checkpoint={self.checkpoint!r}: give True or False")

    def cut_short(self) -> Unrolled:
        """A single step."""
        return replace(self, steps=1)

    @property
    def keeps_steps(self) -> int:  # type: ignore[override]
        """How many of the last inner steps the optimizer has to keep."""
        return self.steps

    @property
    def keeps_every(self) -> int:  # type: ignore[override]
        """The number of steps from one kept copy of the weights to the next."""
        return -(-self.steps // self.segments(self.steps))

    def segments(self, steps: int) -> int:
        """Into how many segments so many steps are divided, each with a kept copy of the weights at its start."""
        return math.isqrt(steps - 1) + 1 if self.checkpoint else steps

    def _compute(self, problem: Problem, train_batch: Any, val_batch: Any, _: State | None, loop: TrainingContext) -> Terms:
        """Through the steps kept in ``loop.trajectory``, or else through those that would come next."""
        assert loop.inner is not None
        taken: Trajectory | None = loop.trajectory
        draw = loop.draw or (lambda: train_batch)
        trajectory = taken or look_ahead(problem, loop.inner, draw, self.steps, loop.learned)
        segments = self.segments(len(trajectory.steps))
        return through_steps(problem, trajectory, segments, val_batch, live=taken is not None, expected=self.steps)
