"""The base class of methods for the hypergradient, and the checks of their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from hoptim.checks import describe_type
from hoptim.methods.learned_options import LearnedOption, in_stand_in
from hoptim.methods.result import Hypergradient, Terms, assemble
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """The training loop around a hypergradient, for methods that need more than the problem and two batches.

    Attributes:
        inner: the inner optimizer.
        learned: its options that are hyperparameters.
        draw: draws another training batch.
        trajectory: the last inner steps, if the method asked for them to be kept.
        unheld: ``("inner", name)`` for each weight of which a warning has said that the inner optimizer does not hold it.
    """

    inner: Optimizer | None = None
    learned: Sequence[LearnedOption] = ()
    draw: Callable[[], Any] | None = None
    trajectory: Any = None
    unheld: Sequence[tuple[str, str]] = ()


class Method(ABC):
    """A strategy for the hypergradient: a frozen dataclass that owns its options and keeps no state."""

    keeps_steps: int = 0  # how many of the last inner steps the optimizer has to keep for it
    keeps_every: int = 1  # the number of steps from one kept copy of the weights to the next
    takes_train_batch: bool = True  # whether it needs a training batch
    needs_inner: bool = False  # whether it repeats steps of the inner optimizer
    takes_tasks: bool = False  # whether its batches are of several tasks, whose trainings it runs itself
    sees_options: bool = True  # whether options of the inner optimizer, such as its learning rate, have a derivative

    def cut_short(self) -> Method:
        """A cheaper version, if there is one, for the dry run that shows whether the hypergradient can be computed."""
        return self

    def __call__(
        self,
        problem: Problem,
        train_batch: Any,
        val_batch: Any,
        state: State | None = None,
        loop: TrainingContext | None = None,
    ) -> Hypergradient:
        """The hypergradient at the model's present weights; ``state`` is that of the last call's solution.

        Raises:
            ValueError: the method needs the inner optimizer, and ``loop`` has none.
            TypeError: weights are sharded, and the method needs whole ones.
        """
        loop = loop or TrainingContext()
        if self.needs_inner and loop.inner is None:
            name = type(self).__name__
            raise ValueError(f"{name} needs the inner optimizer: call hypergradient(..., inner=optimizer)")
        if problem.is_sharded:
            self._check_sharded(loop)
        with problem.leave_no_trace():
            return assemble(self._compute(problem, train_batch, val_batch, state, loop), problem.leaves())

    def _check_sharded(self, loop: TrainingContext) -> None:
        """Raise ``TypeError`` if it does not work where weights are sharded."""
        raise TypeError(
            f"{type(self).__name__} repeats inner steps, and the weights are sharded over ranks: take hoptim.Implicit(), or "
            "DistributedDataParallel"
        )

    @abstractmethod
    def _compute(
        self, problem: Problem, train_batch: Any, val_batch: Any, state: State | None, loop: TrainingContext
    ) -> Terms:
        """The direct and the indirect term, inside ``problem.leave_no_trace()``."""


def checked(problem: object, method: object, inner: Any, options: Mapping[str, Any] | None) -> TrainingContext:
    """Check arguments of ``hypergradient`` and ``audit``; from a :class:`BilevelOptimizer`, take its inner optimizer."""
    problem = checked_problem(problem)
    problem.check_learned()
    check_method("method", method)
    return training_context(problem, inner, options)


def training_context(problem: Problem, inner: Any, options: Mapping[str, Any] | None = None) -> TrainingContext:
    """The checked inner optimizer, that of a :class:`BilevelOptimizer` if it is one, and its learned options."""
    inside = getattr(inner, "inner", None)
    learned: Sequence[LearnedOption] | None = [] if inner is None else None
    if isinstance(inner, Optimizer) and isinstance(inside, Optimizer):
        inner, learned = inside, getattr(inner, "learned_options", None)
    if options and learned is not None:
        raise ValueError(
            "options names options of the inner optimizer, and inner is "
            f"{'None' if inner is None else 'a BilevelOptimizer, which has its own'}: give inner=optimizer, the one of torch"
        )
    check_steps("inner", inner)
    if inner is not None and not isinstance(inner, Optimizer):
        raise TypeError(f"inner is {describe_type(inner)}: give the torch.optim.Optimizer of the model's weights")
    if inner is not None and not held(inner).keys() & {id(p) for _, p in problem.named_parameters()}:
        raise ValueError("inner holds no weight of the problem's model: give the optimizer that trains it")
    if inner is not None and learned is None:
        inner, learned = in_stand_in(inner, options or {}, problem.hparams, dict(problem.named_parameters()))
    return TrainingContext(inner=inner, learned=learned or ())


def checked_problem(problem: object) -> Problem:
    """The problem; raises ``TypeError`` if it is none."""
    if not isinstance(problem, Problem):
        raise TypeError(f"problem is {describe_type(problem)}: give hoptim.Problem(model, hparams, train_loss, val_loss)")
    return problem


def check_method(name: str, method: object) -> None:
    """Raise ``TypeError`` unless it is a method, or ``None`` for the default."""
    if method is not None and not isinstance(method, Method):
        raise TypeError(f"{name} is {describe_type(method)}: give a method, such as hoptim.Implicit()")


def check_one_training(name: str, method: Method | None) -> None:
    """Raise ``TypeError`` for a method that trains on several tasks itself, where there is a single training."""
    if method is not None and method.takes_tasks:
        raise TypeError(
            f"{name} is {method}, which trains on each task itself: call hypergradient and outer_step in a loop over "
            "batches of tasks"
        )


def check_steps(name: str, optimizer: object) -> None:
    """Raise ``TypeError`` if this is Accelerate's wrapper: it leaves steps out, and hides what kind of optimizer it is."""
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        raise TypeError(
            f"{name} is an AcceleratedOptimizer, which hides its kind, and takes no step while gradients accumulate: give "
            "the optimizer inside, as its .optimizer; or give accelerator.prepare() the BilevelOptimizer in its place"
        )


def held(optimizer: Optimizer) -> dict[int, None]:
    """The ids of the tensors that the optimizer holds, in its order."""
    return {id(p): None for group in optimizer.param_groups for p in group["params"]}
