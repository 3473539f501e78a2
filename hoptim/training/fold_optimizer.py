"""The optimizer of one fold, whose hypersteps wait for the other folds and move by the mean over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tree
from hoptim.methods.result import Hypergradient
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import Solution
from hoptim.training.in_turn import InTurn
from hoptim.training.progress import Ahead
from hoptim.training.record import Record
from hoptim.training.resumable import ResumableOptimizer, State


class Met(NamedTuple):
    """A fold's hypergradient, and the seconds it took."""

    result: Hypergradient
    seconds: float


def due_steps(steps: int, warmup: float, hypersteps: int) -> list[int]:
    """The inner steps after which hypersteps are due: at equal distances from the warm-up to the last step.

    Raises:
        ValueError: there are fewer steps after the warm-up than hypersteps.

    >>> due_steps(100, warmup=0.25, hypersteps=6)
    [37, 50, 62, 75, 87, 100]
    """
    begin = int(warmup * steps)
    if steps - begin < hypersteps:
        raise ValueError(
            f"steps={steps} with a warmup of {begin} leaves {steps - begin} for hypersteps={hypersteps}: give fewer "
            "hypersteps, a shorter warmup or more steps"
        )
    return [begin + (steps - begin) * number // hypersteps for number in range(1, hypersteps + 1)]


class FoldOptimizer(ResumableOptimizer):
    """A BilevelOptimizer that takes its hypersteps after given steps, together with the other folds.

    Args:
        due: the inner steps after which hypersteps follow, in order; the last one is the last of the training.
        **more: arguments of :class:`BilevelOptimizer`.
    """

    turn: InTurn

    def __init__(self, inner: Optimizer, outer: Optimizer, problem: Problem, *, due: Sequence[int], **more: Any) -> None:
        shortest = min(b - a for a, b in zip((0, *due), due, strict=False))
        super().__init__(inner, outer, problem, every=shortest, **more)
        self.due, self.steps = tuple(due), due[-1]
        self._progress.ahead = Ahead()  # the fit itself tells of a training that is too short
        self._await_next()

    def loss(self, batch: Any) -> Any:
        """The training loss of ``batch``; ends the training here if the fit has failed elsewhere."""
        self.turn.check()
        return super().loss(batch)

    def hyperstep(self, train_batch: Any = None, val_batch: Any = None) -> Record:
        """Hand over this fold's hypergradient, and wait until all folds have done so and the hyperparameters have moved."""
        self.every, begun = None, time.perf_counter()
        result = self._hypergradient(train_batch, val_batch)
        record = self.turn.pause(Met(result, time.perf_counter() - begun))
        if record is not None:
            self._progress.hyper_steps, self._progress.record = record.hyper_step, record
        self._await_next()
        return self._progress.record  # type: ignore[return-value]

    def put(self, saved: State) -> None:
        """Go to where a training was saved."""
        super().put(saved)
        self._await_next()

    def _await_next(self) -> None:
        """Set ``every`` and ``warmup`` so that the next hyperstep follows the next step that is due."""
        self.every = next((step for step in self.due if step > self.inner_steps), None)
        self.warmup = self.every or 0


def joined(met: Sequence[Met]) -> Hypergradient:
    """The hypergradients of K folds as the hypergradient of a vector of K validation losses.

    The status is that of the first fold whose solve failed, or else of the first with a remark; ``detail`` names the fold.
    """
    results = [one.result for one in met]
    return Hypergradient(
        grads=_stacked([result.combined() for result in results]),
        direct=_stacked([result.mixed_by(None, result.direct) for result in results]),
        indirect=_stacked([result.mixed_by(None, result.indirect) for result in results]),
        solution=_joined_solution([result.solution for result in results]),
        val_loss=torch.stack([result.val_loss.mean() for result in results]),
        train_loss=torch.stack([result.train_loss for result in results]).mean(),
        gradient_norm=torch.stack([result.gradient_norm for result in results]).mean(),
        untouched=tuple(name for name in results[0].untouched if all(name in result.untouched for result in results)),
    )


def _joined_solution(solutions: Sequence[Solution]) -> Solution:
    kinds = [("failed", "remark", "ok").index(solution.status.kind) for solution in solutions]
    worst = kinds.index(min(kinds))
    finals = [solution.residuals[-1].amax() for solution in solutions if len(solution.residuals)]
    of_fold = f"fold {worst + 1} of {len(solutions)}: {solutions[worst].detail or 'no detail'}"
    return Solution(
        value=_stacked([solution.value for solution in solutions]),
        status=solutions[worst].status,
        detail="" if solutions[worst].status.kind == "ok" else of_fold,
        converged=all(solution.converged for solution in solutions),
        negative_curvature=any(solution.negative_curvature for solution in solutions),
        residuals=torch.stack(finals)[None] if finals else torch.empty(0),
        products=sum(solution.products for solution in solutions),
    )


def _stacked(trees: Sequence[Tree]) -> dict[str, Tensor]:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
