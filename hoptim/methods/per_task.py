"""PerTask: many tasks, each with a training of its own that begins at λ. MAML, implicit MAML, ANIL, Meta-SGD."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from hoptim.checks import describe_type, is_whole, listed
from hoptim.linalg import dicts
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.methods.implicit import Implicit, doubts
from hoptim.methods.method import Method, TrainingContext, checked
from hoptim.methods.preconditioners import Jacobi, SecondMoments
from hoptim.methods.result import Terms
from hoptim.methods.reverse import Reverse, through_steps, unseen_by_one_graph
from hoptim.methods.side_by_side import KRYLOV
from hoptim.methods.tasks import Part, Tasks
from hoptim.methods.trajectory import Snapshot
from hoptim.methods.unrolled import Unrolled
from hoptim.methods.validation_loss import Validation
from hoptim.methods.whole_graph import through_whole_graph
from hoptim.problem.distributed import Ranks
from hoptim.problem.functional import renormed_weights
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem, as_leaves
from hoptim.solvers.chebyshev import Chebyshev
from hoptim.solvers.neumann import Identity, Neumann
from hoptim.solvers.solution import State, Status, joined
from hoptim.solvers.warm_start import SOBA, WarmStart

SERIES = (Identity, Neumann, Chebyshev)  # the same polynomial for all tasks


@dataclass(frozen=True)
class PerTask(Method):
    """The mean hypergradient of K tasks, each with a short training of its own: (1/K) Σ_k dL_V(k)/dλ.

    Give :func:`hypergradient` batches of K tasks: tensors with a leading axis of K, in tuples, lists or dicts. The losses
    are those of a single task. For each of them the weights that ``inner`` holds begin at λ, if ``hparams`` has a
    :class:`~hoptim.recipes.Initialization` or another module with a method ``initial_weights() -> {name: tensor}``, else at
    the model's present weights. They take ``steps`` steps on the task's training batch, with a new state of the optimizer.
    Weights that ``inner`` does not hold, and ``initial_weights`` has, are λ itself in every task. The model does not change.

    - MAML: ``PerTask(steps=5)`` differentiates through all steps, and holds their graphs. In the memory of √steps, at nearly
      two more gradients a step: ``PerTask(50, Unrolled(50, checkpoint=True))``.
    - First-order MAML: ``PerTask(steps=5, first_order=True)``.
    - Implicit MAML: ``PerTask(16, Implicit(CG(terms=5), curvature=GaussNewton()))``, with a :class:`CompositeLoss` for
      training whose penalty is ``hparams.penalty(model, strength)``. Its memory does not grow with the steps. The exact
      curvature of a ReLU network is mostly negative somewhere, and then it learned far less (scripts/studies/few_shot).
    - ANIL: ``inner`` holds the last layer alone.
    - Meta-SGD: ``options={"lr": [...]}`` with a learned rate for each weight.

    The K trainings run side by side by ``torch.func.vmap``, or one after the other if torch can't do that for the model, and
    trained convolutions of 64 channels or more on a CPU, where it is no faster and takes far more memory. In several
    processes each has tasks of its own.

    Args:
        steps: inner steps on each task, ≥ 1.
        method: how to get from the end of a training to λ; ``None``, the default, for the derivative through all steps.
        first_order: whether the gradient in each step counts as a constant. Default ``False``.
        chunk_size: how many tasks train side by side, as in ``vmap``; ``None``, the default, for all where that is faster.

    Raises:
        ValueError: ``steps`` or ``chunk_size`` is no positive whole number, ``first_order`` is given with a ``method``, or
            an ``Unrolled`` has other steps; when called, batches with different numbers of tasks, a validation loss that is
            no scalar, or a weight that is neither trained nor learned; or its curvature is to be compiled.
        TypeError: ``method`` is another one, or its solver starts at the last solution; when called, an inner optimizer that
            torch can't differentiate, or a batch with arrays that are no tensors.

    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400); Rajeswaran et al. 2019 (arXiv 1909.04630); Raghu et al. 2020
    (arXiv 1909.09157); Li et al. 2017 (arXiv 1707.09835).

    Example: L_T = ½(w − y)² and one step of rate ¼ from λ = 2, so that w = λ − ¼(λ − y) and dL_V/dλ = ¾(w − y_V).

    >>> import hoptim
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> initial = hoptim.recipes.Initialization(model)
    >>> def loss(model, hparams, y):
    ...     return 0.5 * (model(torch.ones(1)) - y).square().sum()
    >>> problem, inner = hoptim.Problem(model, initial, loss), torch.optim.SGD(model.parameters(), lr=0.25)
    >>> train, val = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [1.0]])       # two tasks: w is 1.5 and 2.5
    >>> hoptim.hypergradient(problem, train, val, PerTask(steps=1), inner=inner).grads["initial.weight"].item()
    0.75
    >>> [model.weight.item() for model in PerTask(steps=1).adapt(problem, train, inner=inner)]
    [1.5, 2.5]
    """

    steps: int
    method: Unrolled | Implicit | None = None
    _: KW_ONLY
    first_order: bool = False
    chunk_size: int | None = None

    needs_inner, takes_tasks = True, True

    def __post_init__(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ValueError(f"steps={self.steps!r}: give a whole number of inner steps, 1 or more")
        if self.chunk_size is not None and not (is_whole(self.chunk_size) and self.chunk_size >= 1):
            raise ValueError(f"chunk_size={self.chunk_size!r}: give a whole number of tasks, 1 or more, or None for all")
        if not isinstance(self.first_order, bool):
            raise TypeError(f"first_order={self.first_order!r}: give True or False")
        if not isinstance(self.method, (Unrolled, Implicit, type(None))):
            raise TypeError(f"method is {describe_type(self.method)}: give hoptim.Implicit(...) or hoptim.Unrolled(steps)")
        if self.first_order and self.method is not None:
            raise ValueError(
                f"first_order=True is for the derivative through the steps, and method is {self.method}: drop one"
            )
        if isinstance(self.method, Unrolled) and self.method.steps != self.steps:
            raise ValueError(
                f"steps={self.steps} on a task, and {self.method} goes through {self.method.steps}: give the same"
            )
        if isinstance(self.method, Implicit) and isinstance(self.method.solver, (WarmStart, SOBA)):
            raise TypeError(
                f"{type(self.method.solver).__name__} starts at the last solution, and the tasks are new each time: take "
                "hoptim.CG"
            )
        curvature = getattr(self.method, "curvature", None)
        if getattr(getattr(curvature, "curvature", curvature), "compile", False):
            raise ValueError(
                f"{curvature} would be compiled anew in each call, for the losses of these tasks: leave out compile"
            )

    @property
    def sees_options(self) -> bool:  # type: ignore[override]
        """Whether options of the inner optimizer have a derivative."""
        return not isinstance(self.method, Implicit) or self.method.sees_options

    def _compute(self, problem: Problem, train_batch: Any, val_batch: Any, _: State | None, loop: TrainingContext) -> Terms:
        tasks = Tasks.of(problem, loop, [loop.draw() if loop.draw else train_batch for _ in range(self.steps)], val_batch)
        if self.method is None and problem.unseen is None:  # tried once for a problem
            problem.unseen = tasks.first(lambda part: unseen_by_one_graph(part.problem, part.trajectory, part.val_batch))
        parts = self._in_chunks(tasks, lambda part: _with_axis(part, self._terms(part)))
        terms = _sum(parts, tasks)
        if not isinstance(self.method, Implicit):
            through_start = tasks.start.back([part.solution.value for part in parts])
            terms = terms._replace(indirect=dicts.add(terms.indirect, through_start))
        terms = _over_ranks(terms, problem.ranks, problem.leaves())
        self._check_touched(terms, tasks)
        return terms

    def _check_touched(self, terms: Terms, tasks: Tasks) -> None:
        """Raise ``ValueError`` for hyperparameters of which this method does not see what they do."""
        untouched = [name for name, t in terms.indirect.items() if t is None and terms.validation.direct[name] is None]
        if isinstance(self.method, Implicit) and (unseen := [name for name in untouched if name in tasks.start.begins_at]):
            raise ValueError(
                f"the training loss does not touch {listed(unseen)}, and implicit differentiation does not see where a "
                "training begins: add hparams.penalty(model, strength) to train_loss, as implicit MAML does"
            )
        if self.first_order and untouched:
            raise ValueError(
                f"with first_order=True nothing depends on {listed(untouched)}, since the gradient in each step counts as a "
                "constant: drop first_order, or freeze them with requires_grad_(False)"
            )

    def _terms(self, part: Part) -> Terms:
        """The terms of some tasks at once."""
        problem, trajectory = part.problem, part.trajectory
        if isinstance(self.method, Implicit):
            loop = part.at_end(_end(part))
            terms = self.method._compute(problem, trajectory.steps[-1].losses[0].batch, part.val_batch, None, loop)
            for doubt in doubts(self.method, loop, problem.weights(), terms.solution).values():
                warnings.warn(doubt, stacklevel=7)
            return terms
        is_renormed = bool(renormed_weights(list(problem.model.modules())))
        if is_renormed and self.first_order:
            raise ValueError("first_order=True is not for an Embedding with a max_norm: drop first_order")
        if isinstance(self.method, Unrolled) or is_renormed:
            segments = self.method.segments(self.steps) if self.method else self.steps
            return through_steps(problem, trajectory, segments, part.val_batch, live=False, expected=self.steps)
        return through_whole_graph(
            problem,
            trajectory,
            part.val_batch,
            first_order=self.first_order,
            count=part.count,
            unseen=part.of.problem.unseen or (),
        )

    def adapt(
        self, problem: Problem, train_batch: Any, *, inner: Optimizer, options: Mapping[str, Any] | None = None
    ) -> list[nn.Module]:
        """K models, each trained on its task as in a hypergradient, such as for predictions on new tasks.

        They are copies of the model inside its wrappers, in its mode; frozen weights are shared with it.

        Args:
            problem: the problem of one task.
            train_batch: a batch of K tasks.
            inner: the inner optimizer.
            options: its options that are hyperparameters.

        Raises:
            ValueError: there is no inner optimizer; or as in a hypergradient.
        """
        loop = checked(problem, self, inner, options)
        if loop.inner is None:
            raise ValueError("adapt needs the inner optimizer: call adapt(..., inner=optimizer)")
        with problem.leave_no_trace():
            tasks = Tasks.of(problem, loop, [train_batch] * self.steps, None)
            return [model for models in self._in_chunks(tasks, lambda part: part.models(_end(part))) for model in models]

    def _in_chunks(self, tasks: Tasks, run: Callable[[Part], Any]) -> list[Any]:
        """What ``run`` returns for each chunk of tasks; for one task at a time where torch can't train them side by side."""
        told, failed = tasks.problem.checked, f"side by side, {self.method}"
        reason = tasks.needs_turns or self._needs_turns(tasks.problem)
        if self.chunk_size is not None:
            if reason and self.chunk_size > 1:
                raise ValueError(f"chunk_size={self.chunk_size}, and tasks can't train side by side, since {reason}: give 1")
            with annotate_errors(f"in trainings of {self.chunk_size} tasks at once; chunk_size=1 is for one at a time"):
                return tasks.run(run, at_once=self.chunk_size)
        if reason or failed in told or tasks.is_faster_in_turn or tasks.count == 1:
            return tasks.run(run, at_once=1)
        try:
            return tasks.run(run, at_once=tasks.count)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
        found = tasks.run(run, at_once=1)  # if it fails too, vmap was not the reason
        told.add(failed)
        warnings.warn(
            f"tasks train one after the other, since torch.func.vmap can't train them side by side ({reason}). chunk_size=1 "
            "does so without this warning",
            stacklevel=6,
        )
        return found

    def _needs_turns(self, problem: Problem) -> str:
        """Why this method takes one task at a time; empty if it need not."""
        if not isinstance(self.method, Implicit):
            return ""
        solver, preconditioner = self.method.completed(problem).solver, self.method.preconditioner
        if not isinstance(solver, (*KRYLOV, *SERIES)):
            return f"{type(solver).__name__} would spend its rank on all of them together"
        if not isinstance(preconditioner, (Jacobi, SecondMoments, type(None))):
            return f"{type(preconditioner).__name__} is made for the weights of one model"
        return ""


def _end(part: Part) -> Snapshot:
    """The end of the trainings, reached without a graph."""
    trajectory = part.trajectory
    reverse = Reverse(problem=part.problem, steps=trajectory.steps, leaves=as_leaves(part.problem.leaves()), segments=1)
    return reverse.end(list(trajectory.begins), len(trajectory.steps))


def _with_axis(part: Part, terms: Terms) -> Terms:
    """The terms with a leading axis of the tasks in the solution, also for one task."""
    if part.count is not None:
        return terms
    value = dicts.map_tensors(lambda t: t[None], terms.solution.value)
    return terms._replace(solution=replace(terms.solution, value=value))


def _sum(parts: Sequence[Terms], tasks: Tasks) -> Terms:
    """The terms of all K tasks, from those of some at a time, in whose validation losses each task has its share."""

    def added(found: Iterable[OptionalTensors]) -> OptionalTensors:
        return reduce(dicts.add, found)

    losses = torch.stack([part.validation.loss for part in parts])
    validation = Validation(loss=losses.sum(), g={}, direct=added(part.validation.direct for part in parts))
    trained = tasks.share * torch.stack([part.train_loss for part in parts]).sum()
    length = (tasks.share * torch.stack([part.gradient_norm for part in parts]).square().sum()).sqrt()
    solutions = [part.solution for part in parts]
    solution = solutions[0]
    if len(parts) > 1:
        values = [one.value for one in solutions]
        value = {name: torch.cat([one[name] for one in values]) for name in values[0]}
        solution = replace(joined(solutions, "task" if len(parts) == tasks.count else "chunk"), value=value)
    return Terms(validation, added(part.indirect for part in parts), solution, trained, length)


def _over_ranks(terms: Terms, ranks: Ranks, leaves: Tensors) -> Terms:
    """The mean over the ranks, each of which has had tasks of its own; if the solve of one has failed, all of them know."""
    if ranks.size == 1:
        return terms
    solution, validation = terms.solution, terms.validation
    ended = ranks.gathered((solution.status.name, solution.detail))
    kinds = [Status[name].kind for name, _ in ended]
    place = min(range(len(kinds)), key=lambda rank: ("failed", "remark", "ok").index(kinds[rank]))
    of_rank = "" if kinds[place] == "ok" else f"on rank {place}: "
    means = ranks.mean({"val": validation.loss, "train": terms.train_loss, "square": terms.gradient_norm.square()})
    return Terms(
        replace(validation, loss=means["val"], direct=ranks.mean_of_found(validation.direct, leaves)),
        ranks.mean_of_found(terms.indirect, leaves),
        replace(solution, status=Status[ended[place][0]], detail=of_rank + ended[place][1]),
        means["train"],
        means["square"].sqrt(),
    )
