"""BilevelOptimizer: the user's own optimizer, which now also moves the hyperparameters; and the outer step alone."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim import LBFGS, Optimizer

from hoptim.linalg.vectors import Tensors
from hoptim.methods.hypergradient import default_method
from hoptim.methods.implicit import doubts
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.result import Hypergradient
from hoptim.problem.data import Batches
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State, Status
from hoptim.training import arguments
from hoptim.training.checkpoint import KEY, REQUIRED_OUTER
from hoptim.training.first_steps import FirstSteps, dry_run, vanished_weights, warn_of_first_hyperstep, weight_norms
from hoptim.training.recent_steps import SeenLoss
from hoptim.training.record import Record, natural_values
from hoptim.training.training_optimizer import Progress, TrainingOptimizer


@dataclass
class FirstHyperstep:
    """The inner steps taken, and those that were left then until the first hyperstep; 0 after it."""

    taken: int = 0
    left: float = 0

    def warn_if_missed(self) -> None:
        """Warn if the training has ended before its first hyperstep."""
        if 0 < self.left < math.inf:
            warnings.warn(
                f"the training ended after {self.taken} steps without a hyperstep, so that no hyperparameter has moved: the "
                f"first one would have come after step {self.taken + self.left}. Give the BilevelOptimizer a smaller every, "
                "or a shorter warmup; every=None is for hypersteps by hand",
                stacklevel=2,
            )


@dataclass
class BilevelProgress(Progress):
    """What changes while a BilevelOptimizer runs."""

    hyper_steps: int = 0
    solver_state: State = field(default_factory=dict)
    solver_weights: tuple[str, ...] = ()  # those of its vectors, in their order
    last_gradient: Tensors = field(default_factory=dict)
    record: Record | None = None
    first_steps: FirstSteps | None = None  # until they are over
    first_hyperstep: FirstHyperstep = field(default_factory=FirstHyperstep)
    norms: dict[str, float] = field(default_factory=dict)  # of the weights when training began
    unheld: arguments.Unheld = field(default_factory=list)  # tensors in neither optimizer, after a warning
    warned: set[Status | str] = field(default_factory=set)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.first_hyperstep.warn_if_missed)  # also at the end of the process


class BilevelOptimizer(TrainingOptimizer):
    """An optimizer that trains the weights, and every few steps moves the hyperparameters down the validation loss.

    It **is** a ``torch.optim.Optimizer``: ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's, so
    schedulers, gradient clipping and checkpoints work on it as on the inner one.

    *Where to begin.* Set ``warmup`` to a quarter of the steps. Hypergradients are right for trained weights; on an untrained
    net they point elsewhere, and the outer optimizer follows them. That mattered in a study over folds; on twelve tasks of
    scripts/studies/defaults no warm-up did about as well, at more cost. As ``outer`` take ``hparams.optimizer()``, or
    ``hoptim.outer_adam(hparams)`` for a module of several. It is Adam, which moves each leaf by about its rate, whatever the
    length of the hypergradient: 0.05 under ``constraints.positive``, where the leaf is a logarithm, so that a hyperstep is
    5 %; 0.3 for a unit interval, 0.1 for real, 0.01 for non-negative. Decays of a recipe move together by up to e^0.6.

    Args:
        inner: the optimizer of the model's weights.
        outer: the optimizer of ``hparams.parameters()``.
        problem: the model, the hyperparameters and the two losses.
        val_batches: validation batches, one for each hyperstep: any re-iterable, cycled, or a function that draws one.
        options: the options of ``inner`` that are hyperparameters, such as ``{"lr": "rate"}``, or with a
            ``WeightDecay`` or names by weight ``{"weight_decay": decays}`` (:mod:`hoptim.methods`).
        hypergradient: how to compute it; default ``Implicit()``, or if an option of ``inner`` is learned that is no decay by
            weight, such as its learning rate, ``Unrolled()``, over at most ``every`` steps.
        every: inner steps between hypersteps, default 100; ``None`` for never.
        warmup: inner steps before the first hyperstep, default 0, which suits only a model that is already trained.
        train_batches: the source of training batches for hypersteps; ``None``, the default, for the batches that ``loss``
            got in the last inner step; if there are several, as in gradient accumulation, for the mean of their losses.
        val_weights: the weight of each loss in the gradient, if the validation loss is a vector; default: their mean.
        on_failure: if a solve fails, nothing moves; then ``"skip"``, the default, warns, and ``"raise"`` raises an error.
        hooks: functions of the :class:`Record`, called after each hyperstep.

    Raises:
        TypeError: an argument of the wrong kind, or batches that can be iterated only once.
        ValueError: ``every`` or ``warmup`` out of range, an optimizer that holds the wrong tensors, empty batches.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), algorithm 1.

    >>> import torch
    >>> from torch import nn
    >>> model, hparams = nn.Linear(1, 1, bias=False), nn.ParameterDict({"decay": torch.tensor(1.0)})
    >>> _ = model.weight.data.fill_(2.0)
    >>> def train(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 4.0).square().sum() + 0.5 * hparams["decay"] * model.weight.square().sum()
    >>> def val(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 1.0).square().sum()
    >>> inner = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> outer = torch.optim.SGD(hparams.parameters(), lr=0.1)
    >>> problem, one = Problem(model, hparams, train, val), torch.ones(1, 1)
    >>> optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[one], every=1)
    >>> optimizer.zero_grad()
    >>> optimizer.loss(one).backward()
    >>> optimizer.step()
    >>> optimizer.record.status.name, round(hparams["decay"].item(), 3)
    ('CONVERGED', 1.1)
    """

    _required = REQUIRED_OUTER
    _progress: BilevelProgress

    def __init__(
        self,
        inner: Optimizer,
        outer: Optimizer,
        problem: Problem,
        *,
        val_batches: Iterable[Any] | Callable[[], Any],
        options: Mapping[str, Any] | None = None,
        hypergradient: Method | None = None,
        every: int | None = 100,
        warmup: int = 0,
        train_batches: Iterable[Any] | Callable[[], Any] | None = None,
        val_weights: Sequence[float] | None = None,
        on_failure: arguments.OnFailure = "skip",
        hooks: Sequence[Callable[[Record], None]] = (),
    ) -> None:
        arguments.check_optimizer("inner", inner, problem)
        arguments.check_optimizer("outer", outer, problem)
        arguments.check_schedule(every, warmup, on_failure)
        arguments.check_method_fits(hypergradient, every, options)
        arguments.check_hooks(hooks)
        self.outer, self.every, self.warmup, self.on_failure, self.hooks = outer, every, warmup, on_failure, tuple(hooks)
        self.val_weights = arguments.checked_weights(val_weights)
        self.val_batches = Batches(val_batches, "val_batches")
        self.train_batches = None if train_batches is None else Batches(train_batches, "train_batches")
        super().__init__(inner, problem, options=options)
        self.hypergradient = default_method(self.learned_options, every) if hypergradient is None else hypergradient
        progress, held = self._progress, {"inner": inner, "outer": outer}
        progress.unheld = arguments.warn_of_unheld(held, problem)
        if every is not None:
            progress.first_steps = FirstSteps(train_batches is None or self.hypergradient.keeps_steps > 0)
        progress.norms = weight_norms(problem)

    def _new_progress(self) -> BilevelProgress:
        return BilevelProgress()

    def _steps_left(self, step: int) -> float:
        """The number of inner steps after step ``step`` until a hyperstep follows: 0 if one follows this step."""
        return steps_left(step, self.every, self.warmup)

    def _before_loss(self, batch: Any) -> SeenLoss | None:
        progress, method, drawn, first = self._progress, self.hypergradient, self.train_batches, self._progress.first_steps
        if first is not None:
            first.before_loss(self.problem, progress.recent, lambda: self.check(drawn.peek() if drawn else batch))
        left = self._steps_left(progress.inner_steps + 1)
        is_unrolled = left < method.keeps_steps
        is_repeated = is_unrolled or (first is not None and not first.steps)
        kept = batch if is_repeated or drawn is None else None
        if not is_repeated and left not in (0, math.inf):  # inf: hypersteps may come by hand
            progress.recent.count(kept)
            return None
        start = None
        if is_unrolled:
            start = progress.recent.step_start(self.problem, self.inner, progress.learned_options, method.keeps_every)
        generators = self.problem.generators() if is_repeated else None
        return progress.recent.before_loss(kept, is_copied=is_repeated or left == 0, generators=generators, start=start)

    def _before_step(self, *, has_closure: bool) -> None:
        progress = self._progress
        if progress.first_steps is not None:
            progress.first_steps.before_step(self.problem, progress.recent, has_closure=has_closure)
            if progress.first_steps.steps == 2:
                progress.first_steps = None

    def _after_step(self) -> None:
        """Take a hyperstep if one is due."""
        progress, first = self._progress, self._progress.first_hyperstep
        left = self._steps_left(progress.inner_steps)
        first.taken, first.left = progress.inner_steps, 0 if progress.hyper_steps else left
        if left == 0:
            progress.recent.check_known(self.hypergradient.keeps_steps, self.problem.weights())
            try:
                self.hyperstep()
            finally:
                progress.recent.forget_steps()

    def hyperstep(self, train_batch: Any = None, val_batch: Any = None) -> Record:
        """Move the hyperparameters once, now; batches that are not given are drawn. Returns the record.

        The training batches are those whose losses went backward in the last step, or at another time than ``every`` says,
        those whose losses were computed for it. If the solve fails, nothing moves; the record and a warning say why.

        Raises:
            ValueError: there is no training batch: none was given, ``loss`` got none, and there are no ``train_batches``.
            RuntimeError: the solve failed and ``on_failure`` is ``"raise"``; the hooks were called, and ``record`` is set.
        """
        return self._move(time.perf_counter(), self._hypergradient(train_batch, val_batch))

    def _hypergradient(self, train_batch: Any, val_batch: Any) -> Hypergradient:
        """The hypergradient at the present weights. The first time, check that the losses depend on all hyperparameters."""
        progress, draw = self._progress, None if self.train_batches is None else self.train_batches.draw
        if train_batch is None and self.hypergradient.takes_train_batch:
            train_batch = progress.recent.batch() if draw is None else draw()
        val_batch = self.val_batches.draw() if val_batch is None else val_batch
        if not progress.hyper_steps:
            self.problem.check_ranks()
        place = f"in hyperstep {progress.hyper_steps + 1}, after {progress.inner_steps} inner steps"
        with annotate_errors(place), self.problem.looked_up():
            weights = self.problem.weights()
            loop = self._context(draw, progress.recent.trajectory(weights))
            result = self.hypergradient(self.problem, train_batch, val_batch, progress.solver_state, loop)
            found = doubts(self.hypergradient, loop, weights, result.solution)
            found |= vanished_weights(self.problem, progress.norms)
        progress.solver_state, progress.solver_weights = result.solution.state, tuple(result.solution.value)
        if not progress.hyper_steps:
            result.check_touched(progress.learned_options, sees_options=self.hypergradient.sees_options)
        for kind, doubt in found.items():
            self._warn_once(kind, doubt)
        return result

    def _move(self, begun: float, result: Hypergradient) -> Record:
        """The outer step and the record of a hyperstep that began at this time."""
        progress, gradient, moved = self._progress, result.combined(self.val_weights), result.solution.status.ok
        progress.hyper_steps, progress.first_hyperstep.left = progress.hyper_steps + 1, 0
        last_gradient, progress.last_gradient = progress.last_gradient, gradient if moved else progress.last_gradient
        before = natural_values(self.problem) if progress.hyper_steps == 1 else {}
        if moved:
            outer_step(self.problem, self.outer, gradient)
            restart_lbfgs(self.inner)
        after = natural_values(self.problem)
        warn_of_first_hyperstep(before, after, gradient, self.every)
        record = progress.record = Record(
            inner_step=progress.inner_steps,
            hyper_step=progress.hyper_steps,
            moved=moved,
            result=result,
            hyperparameters=after,
            seconds=time.perf_counter() - begun,
            val_weights=self.val_weights,
            last_gradient=last_gradient,
        )
        for hook in self.hooks:
            hook(record)
        if not moved and self.on_failure == "raise":
            raise RuntimeError(f"{record.failure}. With on_failure='skip' the training would go on")
        if not moved:
            self._warn_once(record.status, record.failure)
        return record

    def _warn_once(self, kind: Status | str, words: str) -> None:
        """Warn, but only the first time of its kind."""
        if kind not in self._progress.warned:
            self._progress.warned.add(kind)
            warnings.warn(f"{words}. Later ones of this kind are only recorded", stacklevel=7)

    def check(self, train_batch: Any, val_batch: Any = None) -> None:
        """Raise what a hyperstep on these batches would raise, and change nothing; the first ``loss`` does so by itself."""
        loop = self._context(None if self.train_batches is None else lambda: train_batch)
        val_batch = self.val_batches.peek() if val_batch is None else val_batch
        dry_run(self.problem, self.hypergradient, train_batch, val_batch, loop, self.val_weights)

    def _context(self, draw: Callable[[], Any] | None, trajectory: Any = None) -> TrainingContext:
        """What a method may need of the loop. Layers may be replaced or frozen in it, so that this is looked at again."""
        progress, learned, held = self._progress, self.learned_options, {"inner": self.inner, "outer": self.outer}
        self.problem.check_learned()
        progress.unheld = unheld = arguments.warn_of_unheld(held, self.problem, progress.unheld)
        return TrainingContext(inner=self.inner, learned=learned, draw=draw, trajectory=trajectory, unheld=unheld)

    def _saved(self) -> dict[str, Any]:
        progress, whole = self._progress, super()._saved()
        whole[KEY] |= {
            "outer": self.outer.state_dict(),
            "hyper_steps": progress.hyper_steps,
            "solver_state": dict(progress.solver_state),
            "solver_weights": list(progress.solver_weights),
            "last_gradient": dict(progress.last_gradient),
            "norms": dict(progress.norms),
            "trajectory": progress.recent.state_dict(),
            "val_batches": self.val_batches.state_dict(),
            "train_batches": None if self.train_batches is None else self.train_batches.state_dict(),
        }
        return whole

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        super()._load(state_dict)
        saved, progress = state_dict[KEY], self._progress
        self.outer.load_state_dict(saved["outer"])
        leaves, device = self.problem.leaves(), next(iter(self.problem.weights().values())).device
        progress.hyper_steps, progress.norms = saved["hyper_steps"], saved.get("norms", progress.norms)
        progress.solver_state = {name: vector.to(device) for name, vector in saved["solver_state"].items()}
        progress.solver_weights = tuple(saved.get("solver_weights", self.problem.weights()))
        gradient = saved["last_gradient"].items()
        progress.last_gradient = {name: value.to(leaves[name].device) for name, value in gradient if name in leaves}
        progress.recent.load_state_dict(saved["trajectory"], self.problem, self.inner)
        if progress.inner_steps:
            progress.first_steps = None
        self.val_batches.load_state_dict(saved["val_batches"])
        if self.train_batches is not None and saved["train_batches"] is not None:
            self.train_batches.load_state_dict(saved["train_batches"])

    @property
    def record(self) -> Record | None:
        """The record of the last hyperstep, if there was one."""
        return self._progress.record

    @property
    def hyper_steps(self) -> int:
        """Hypersteps taken so far, failed ones included."""
        return self._progress.hyper_steps

    def __repr__(self) -> str:
        how = f"every={self.every}, hypergradient={self.hypergradient}"
        return f"BilevelOptimizer({how},\ninner={self.inner},\nouter={self.outer})"


def restart_lbfgs(inner: Optimizer) -> None:
    """Let an LBFGS begin anew, since the training loss is another one now.

    It takes the change of the gradient since its last step for curvature, and with the change by the hyperparameters in it,
    its next step may be far too long.
    """
    if isinstance(inner, LBFGS):
        inner.state.clear()


def steps_left(step: int, every: int | None, warmup: int) -> float:
    """The number of inner steps after step ``step`` until a hyperstep follows: 0 if one follows this step.

    >>> [steps_left(step, every=3, warmup=5) for step in (1, 6, 7)], steps_left(1, every=None, warmup=0)
    ([5, 0, 2], inf)
    """
    return math.inf if every is None else -(-max(step, warmup) // every) * every - step


def outer_step(problem: Problem, outer: Optimizer, grads: Tensors) -> None:
    """One step of the outer optimizer with these hypergradients, after which every constraint holds.

    A hyperstep of :class:`BilevelOptimizer` does this once it has the hypergradient; call it in a loop of your own.

    Args:
        problem: the problem whose hyperparameters move.
        outer: the optimizer of ``problem.hparams.parameters()``.
        grads: dL_V/dλ by the names of ``problem.leaves()``, such as ``Hypergradient.grads``, or ``combined()`` if the
            validation loss is a vector.

    Raises:
        KeyError: ``grads`` lacks a hyperparameter.
        ValueError: it has another shape, or is not finite, as after a failed solve.

    >>> import torch
    >>> from torch import nn
    >>> from torch.distributions import constraints
    >>> model, hparams = nn.Linear(1, 1), HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.nonnegative})
    >>> def loss(model, hparams, batch):
    ...     return hparams["decay"] * model(batch).square().sum()
    >>> outer = torch.optim.SGD(hparams.parameters(), lr=1.0)
    >>> outer_step(Problem(model, hparams, loss, loss), outer, {"decay": torch.tensor(0.5)})
    >>> hparams["decay"].item()
    0.0
    """
    leaves = problem.leaves()
    for name, leaf in leaves.items():
        if grads[name].shape != leaf.shape:
            raise ValueError(
                f"the hypergradient of {name!r} has shape {tuple(grads[name].shape)}, the hyperparameter "
                f"{tuple(leaf.shape)}: of several validation losses give result.combined()"
            )
        if not bool(grads[name].isfinite().all()):
            raise ValueError(
                f"the hypergradient of {name!r} is not finite, so that nothing was moved: look at result.solution.status, "
                "whose message says what to do, and step where it is ok"
            )
    try:
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        outer.step()
    finally:
        for leaf in leaves.values():
            leaf.grad = None
    project_(problem)


def project_(problem: Problem) -> None:
    """Move hyperparameters back into their constraints."""
    for module in problem.hparams.modules():
        if isinstance(module, HyperParameters):
            module.project_()
