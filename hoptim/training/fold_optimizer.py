"""The optimizer of one fold, whose hypersteps wait for the other folds and move by the mean over all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tensors
from hoptim.methods.result import Hypergradient
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.problem.random_stream import RandomStream
from hoptim.solvers.solution import joined as join_solutions
from hoptim.training.coroutine import Coroutine
from hoptim.training.folds import Fold
from hoptim.training.optimizer import BilevelOptimizer, FirstHyperstep, restart_lbfgs
from hoptim.training.record import Record
from hoptim.training.training_optimizer import Saved

Train = Callable[[nn.Module, Any, Tensor], Any]  # a loop may say that its optimizer is a BilevelOptimizer


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


class SavePoint(NamedTuple):
    """Where a fold pauses to be saved: the number of the save point, and the state there."""

    number: int
    state: Saved


class FoldOptimizer(BilevelOptimizer):
    """A BilevelOptimizer that takes its hypersteps after given steps, together with the other folds.

    Args:
        name: for errors, such as "fold 2 of 3".
        fold: the examples.
        stream: the random numbers of the fold.
        due: the inner steps after which hypersteps follow, in order; the last one is the last of the training.
        **more: arguments of :class:`BilevelOptimizer`.

    Attributes:
        steps: the length that the training is said to have.
        coroutine: the training, once it is begun.
        paused: what it has paused with: the hypergradient of a hyperstep, or a save point.
        seconds: the time that the last hypergradient took.
    """

    coroutine: Coroutine
    due: tuple[int, ...]
    paused: Hypergradient | SavePoint | None = None
    seconds = 0.0

    def __init__(
        self,
        inner: Optimizer,
        outer: Optimizer,
        problem: Problem,
        *,
        name: str,
        fold: Fold,
        stream: RandomStream,
        due: Sequence[int],
        **more: Any,
    ) -> None:
        self.name, self.fold, self.stream, self.due, self.steps = name, fold, stream, tuple(due), due[-1]
        shortest = min(b - a for a, b in zip((0, *due), due, strict=False))
        super().__init__(inner, outer, problem, every=shortest, **more)
        self._progress.first_hyperstep = FirstHyperstep()  # the fit itself tells of a training that is too short

    def begin(self, train: Train) -> None:
        """Prepare the training of the fold; :meth:`resume` starts it."""

        def training() -> None:
            with annotate_errors(f"in the training of {self.name}"):
                train(self.problem.wrapper, self, self.fold.train.clone())

        self.coroutine = Coroutine(training)

    def resume(self, record: Record | None = None) -> None:
        """Let the training run on, with its random numbers, until it pauses again or ends."""
        with self.stream.drawing():
            self.paused = self.coroutine.resume(record)

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
            if record.moved:
                restart_lbfgs(self.inner)
        return self._progress.record  # type: ignore[return-value]


def joined(results: Sequence[Hypergradient]) -> Hypergradient:
    """The hypergradients of K folds as the hypergradient of a vector of K validation losses.

    The status is that of the first fold whose solve failed, or else of the first with a remark; ``detail`` names the fold.
    """
    return Hypergradient(
        grads=_stacked([result.combined() for result in results]),
        direct=_stacked([result.mixed_by(None, result.direct) for result in results]),
        indirect=_stacked([result.mixed_by(None, result.indirect) for result in results]),
        solution=replace(
            join_solutions([result.solution for result in results], "fold"),
            value=_stacked([result.solution.value for result in results]),
        ),
        val_loss=torch.stack([result.val_loss.mean() for result in results]),
        train_loss=torch.stack([result.train_loss for result in results]).mean(),
        gradient_norm=torch.stack([result.gradient_norm for result in results]).mean(),
        untouched=tuple(name for name in results[0].untouched if all(name in result.untouched for result in results)),
    )


def _stacked(rows: Sequence[Tensors]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
