"""The optimizer of one fold, whose hypersteps wait for the other folds and move by the mean over all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tree
from hoptim.methods.result import Hypergradient
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import Solution
from hoptim.training.coroutine import Coroutine
from hoptim.training.optimizer import BilevelOptimizer, FirstHyperstep
from hoptim.training.record import Record


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


class FoldOptimizer(BilevelOptimizer):
    """A BilevelOptimizer that takes its hypersteps after given steps, together with the other folds.

    Args:
        due: the inner steps after which hypersteps follow, in order; the last one is the last of the training.
        **more: arguments of :class:`BilevelOptimizer`.

    Attributes:
        coroutine: the training, which pauses at hypersteps.
        seconds: the time that the last hypergradient took.
    """

    coroutine: Coroutine
    due: tuple[int, ...]
    seconds = 0.0

    def __init__(self, inner: Optimizer, outer: Optimizer, problem: Problem, *, due: Sequence[int], **more: Any) -> None:
        self.due, self.steps = tuple(due), due[-1]
        shortest = min(b - a for a, b in zip((0, *due), due, strict=False))
        super().__init__(inner, outer, problem, every=shortest, **more)
        self._progress.first_hyperstep = FirstHyperstep()  # the fit itself tells of a training that is too short

    def _steps_left(self, step: int) -> float:
        return next((due - step for due in self.due if due >= step), math.inf)

    def loss(self, batch: Any) -> Tensor:
        """The training loss of ``batch``; ends the training here if the fit has failed elsewhere."""
        self.coroutine.check()
        return super().loss(batch)

    def hyperstep(self, train_batch: Any = None, val_batch: Any = None) -> Record:
        """Hand over this fold's hypergradient, and wait until all folds have done so and the hyperparameters have moved."""
        begun = time.perf_counter()
        result = self._hypergradient(train_batch, val_batch)
        self.seconds = time.perf_counter() - begun
        record = self.coroutine.pause(result)
        if record is not None:
            self._progress.hyper_steps, self._progress.record = record.hyper_step, record
        return self._progress.record  # type: ignore[return-value]


def joined(results: Sequence[Hypergradient]) -> Hypergradient:
    """The hypergradients of K folds as the hypergradient of a vector of K validation losses.

    The status is that of the first fold whose solve failed, or else of the first with a remark; ``detail`` names the fold.
    """
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
