"""BilevelOptimizer: the user's own optimizer, which now also moves the hyperparameters."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from hoptim.methods import learned_options, named_options
from hoptim.methods.default import default_method
from hoptim.methods.implicit import doubts
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.result import Hypergradient
from hoptim.problem.data import Batches
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.training import arguments
from hoptim.training.checkpoint import KEY, VERSION, check_loadable, held_weights, load_bare
from hoptim.training.collapsed import collapsed, norms
from hoptim.training.first_steps import FirstSteps, dry_run
from hoptim.training.optimizer_proxy import OptimizerProxy
from hoptim.training.outer_step import outer_step, warn_of_first_step
from hoptim.training.progress import Progress, has_gradient, steps_left
from hoptim.training.record import Record, natural_values
from hoptim.validation import describe_type


class BilevelOptimizer(OptimizerProxy):
    """An optimizer that trains the weights, and every few steps moves the hyperparameters down the validation loss.

    It **is** a ``torch.optim.Optimizer``: ``param_groups``, ``state`` and ``defaults`` are the inner optimizer's, so
    schedulers, gradient clipping and checkpoints work on it as on the inner one.

    *Where to begin.* Set ``warmup`` to a quarter of the steps. Hypergradients are right for trained weights; on an untrained
    net they point elsewhere, and the outer optimizer follows them. That mattered in a study over folds; on twelve tasks of
    scripts/README.md no warm-up did about as well, at more cost. As ``outer`` take ``hparams.optimizer()``, or
    ``hoptim.outer_adam(hparams)`` for a module of several. It is Adam, which moves each leaf by about its rate, whatever the
    length of the hypergradient: 0.05 under ``constraints.positive``, where the leaf is a logarithm, so that a hyperstep is
    5 %; 0.3 for a unit interval, 0.1 for real, 0.01 for non-negative. Decays of a recipe move together by up to e^0.6.

    Args:
        inner: the optimizer of the model's weights.
        outer: the optimizer of ``hparams.parameters()``.
        problem: the model, the hyperparameters and the two losses.
        val_batches: validation batches, one for each hyperstep: any re-iterable, cycled, or a function that draws one.
        options: the options of ``inner`` that are hyperparameters, such as ``{"lr": "rate"}`` (:mod:`hoptim.methods`).
        hypergradient: how to compute it; default ``Implicit()``, or if an option of ``inner`` is learned, such as its
            learning rate, ``Unrolled()``, over at most ``every`` steps.
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
        arguments.check_optimizers(inner, outer, problem)
        arguments.check_schedule(every, warmup, on_failure)
        arguments.check_strategies(hypergradient, hooks, every, options)
        super().__init__()
        self.inner, self.outer, self.problem = inner, outer, problem
        learned = named_options.bind_by_name(inner, options or {}, problem.hparams)
        self.hypergradient = default_method(learned, every) if hypergradient is None else hypergradient
        self.every, self.warmup, self.on_failure, self.hooks = every, warmup, on_failure, tuple(hooks)
        self.val_weights = arguments.checked_weights(val_weights)
        self.val_batches = Batches(val_batches, "val_batches")
        self.train_batches = None if train_batches is None else Batches(train_batches, "train_batches")
        self._progress = Progress(unheld=arguments.warn_of_unheld(inner, outer, problem))
        if every is not None:
            self._progress.first_steps = FirstSteps(train_batches is None or self.hypergradient.keeps_steps > 0)
        problem.ranks.broadcast_((*problem.hparams.parameters(), *problem.hparams.buffers()))
        self._progress.norms = norms(problem)
        self._progress.learn(learned, inner, problem)
        self.register_state_dict_post_hook(_add_state)

    def loss(self, batch: Any) -> Any:
        """The training loss of ``batch`` for ``backward()``, or a pair with ``has_aux``. Hyperparameters get no gradient."""
        if not torch.is_grad_enabled():  # only to look at, so this is no training batch
            return self.problem.loss(batch)
        progress, method = self._progress, self.hypergradient
        if progress.first_steps is not None:
            drawn = self.train_batches
            progress.first_steps.before_loss(self.problem, batch, lambda: self.check(drawn.peek() if drawn else batch))
        left = steps_left(progress.inner_steps + 1, self.every, self.warmup)
        is_kept, is_watched = left < method.keeps_steps, left in (0, math.inf)  # inf: hypersteps by hand
        if (is_kept or (is_watched and not progress.window.cleared)) and not has_gradient(self.inner):
            progress.cleared()  # by model.zero_grad()
        kept = progress.keep(batch, is_needed=is_kept or (left == 0 and self.train_batches is None))
        keep = progress.record_loss(self.problem, self.inner, kept, method.keeps_every) if is_kept else None
        found = self.problem.loss(batch)
        loss = found[0] if self.problem.has_aux else found
        if keep is not None:
            loss.register_hook(keep)
        if self.train_batches is None:
            progress.window.watch(kept, loss) if is_watched else progress.window.note(kept)
        return found

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer, and a hyperstep if one is due."""
        if closure is not None and not callable(closure):
            raise TypeError(f"closure is {describe_type(closure)}: call step() alone; batches go to optimizer.loss(batch)")
        progress = self._progress
        if progress.first_steps is not None:
            progress.first_steps = progress.first_steps.before_step(self.problem, has_closure=closure is not None)
        learned = progress.learned_options
        with learned_options.in_effect(self.inner, learned, self.problem.hparams) if learned else nullcontext():
            result = self.inner.step() if closure is None else self.inner.step(closure)
        if progress.stepped(self.every, self.warmup):
            progress.recorder.check(self.hypergradient.keeps_steps, self.problem.weights())
            try:
                self.hyperstep()
            finally:
                progress.recorder.restart()
        return result

    def hyperstep(self, train_batch: Any = None, val_batch: Any = None) -> Record:
        """Move the hyperparameters once, now; batches that are not given are drawn. Returns the record.

        The training batches are those whose losses went backward in the last step, or at another time than ``every`` says,
        those whose losses were computed for it. If the solve fails, nothing moves; the record and a warning say why.

        Raises:
            ValueError: there is no training batch: none was given, ``loss`` got none, and there are no ``train_batches``.
            RuntimeError: the solve failed and ``on_failure`` is ``"raise"``; the hooks were called, and ``record`` is set.
        """
        return self._move(time.perf_counter(), self._hypergradient(train_batch, val_batch))

    def _move(self, begun: float, result: Hypergradient) -> Record:
        """The outer step and the record of a hyperstep that began at this time."""
        progress, gradient, moved = self._progress, result.combined(self.val_weights), result.solution.status.ok
        progress.count_hyperstep()
        cosine_to_last = progress.cosine_to_last(gradient) if moved else None
        before = natural_values(self.problem) if progress.hyper_steps == 1 else {}
        if moved:
            outer_step(self.problem, self.outer, gradient)
        after = natural_values(self.problem)
        warn_of_first_step(before, after, gradient, self.every)
        progress.record = Record(
            inner_step=progress.inner_steps,
            hyper_step=progress.hyper_steps,
            moved=moved,
            result=result,
            hyperparameters=after,
            seconds=time.perf_counter() - begun,
            cosine_to_last=cosine_to_last,
            val_weights=self.val_weights,
        )
        for hook in self.hooks:
            hook(progress.record)
        if not moved:
            progress.report_failure(progress.record, self.on_failure)
        return progress.record

    def _hypergradient(self, train_batch: Any, val_batch: Any) -> Hypergradient:
        """The hypergradient at the present weights. The first time, check that the losses depend on all hyperparameters."""
        progress, draw = self._progress, None if self.train_batches is None else self.train_batches.draw
        if train_batch is None and self.hypergradient.takes_train_batch:
            train_batch = progress.window.batch() if draw is None else draw()
        val_batch = self.val_batches.draw() if val_batch is None else val_batch
        if not progress.hyper_steps:
            self.problem.check_ranks()
        with annotate_errors(f"in hyperstep {progress.hyper_steps + 1}, after {progress.inner_steps} inner steps"):
            loop = self._context(draw, progress.recorder.trajectory(self.problem.weights()))
            result = self.hypergradient(self.problem, train_batch, val_batch, progress.solver_state, loop)
        progress.solver_state = result.solution.state
        if not progress.hyper_steps:
            result.check_touched(progress.learned_options, sees_options=self.hypergradient.sees_options)
        found = doubts(self.hypergradient, loop, self.problem.weights(), result.solution)
        progress.warn_of_doubts({**found, **collapsed(self.problem, progress.norms)})
        return result

    def check(self, train_batch: Any, val_batch: Any = None) -> None:
        """Raise what a hyperstep on these batches would raise, and change nothing; the first ``loss`` does so by itself."""
        loop = self._context(None if self.train_batches is None else lambda: train_batch)
        val_batch = self.val_batches.peek() if val_batch is None else val_batch
        dry_run(self.problem, self.hypergradient, train_batch, val_batch, loop, self.val_weights)

    def _context(self, draw: Callable[[], Any] | None, trajectory: Any = None) -> TrainingContext:
        """What a method may need of the loop. Repeats the checks of the construction, since layers may be replaced."""
        progress, learned = self._progress, self._progress.learned_options
        learned_options.check_in_place(self.inner, learned)
        progress.unheld = unheld = arguments.check_again(self.inner, self.outer, self.problem, progress.unheld)
        return TrainingContext(inner=self.inner, learned=learned, draw=draw, trajectory=trajectory, unheld=unheld)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights."""
        self._progress.cleared()
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights to the inner optimizer.

        Raises:
            TypeError: the group is no dict with ``"params"``.
            ValueError: a tensor of the group is a hyperparameter.
        """
        added, known = arguments.checked_group(param_group, self.problem), self.learned_options
        self._progress.learned_options = learned_options.add_group(self.inner, added, known, self.problem.hparams)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore inner and outer optimizer, hyperparameters, counters and positions in the batches.

        From a bare optimizer's state only the inner one, with a warning. If the state is refused, nothing changes.

        Raises:
            ValueError: the state is damaged, of a newer version, of another model or of other constraints.
        """
        state_dict = copy.copy(state_dict)  # hooks may change it in place
        for change in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = change(self, state_dict) or state_dict
        check_loadable(state_dict, held_weights(self.inner, self.problem))
        before = self._saved()  # without copies, since a load replaces these tensors
        before[KEY]["hparams"] = copy.deepcopy(before[KEY]["hparams"])  # except for the hyperparameters
        try:
            self._load(state_dict) if KEY in state_dict else load_bare(self.inner, self._progress, state_dict)
        except Exception:
            self._load(before)
            raise
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _saved(self) -> dict[str, Any]:
        """The inner optimizer's own state and one more entry, of tensors and plain values only."""
        added = {
            "version": VERSION,
            "weights": held_weights(self.inner, self.problem),
            "outer": self.outer.state_dict(),
            "hparams": self.problem.hparams.state_dict(),
            **self._progress.state_dict(),
            "val_batches": self.val_batches.state_dict(),
            "train_batches": None if self.train_batches is None else self.train_batches.state_dict(),
        }
        return {**self.inner.state_dict(), KEY: added}

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict[KEY]
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        learned_options.put_back(self.inner, self._progress.learned_options)
        self.outer.load_state_dict(saved["outer"])
        self.problem.hparams.load_state_dict(saved["hparams"])
        self._progress.load_state_dict(saved, self.problem, self.inner)
        self.val_batches.load_state_dict(saved["val_batches"])
        if self.train_batches is not None and saved["train_batches"] is not None:
            self.train_batches.load_state_dict(saved["train_batches"])

    @property
    def record(self) -> Record | None:
        """The record of the last hyperstep, if there was one."""
        return self._progress.record

    @property
    def learned_options(self) -> list[learned_options.LearnedOption]:
        """The options of the inner optimizer that are hyperparameters."""
        return self._progress.learned_options

    @property
    def inner_steps(self) -> int:
        """Inner steps taken so far."""
        return self._progress.inner_steps

    @property
    def hyper_steps(self) -> int:
        """Hypersteps taken so far, failed ones included."""
        return self._progress.hyper_steps

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(value, "_wrapped_by_lr_sched", False):  # the ``step`` that a scheduler puts here when it is built
            learned_options.check_unscheduled(self.param_groups, self.problem.leaves())
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        how = f"every={self.every}, hypergradient={self.hypergradient}"
        return f"BilevelOptimizer({how},\ninner={self.inner},\nouter={self.outer})"


def _add_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, BilevelOptimizer)
    state_dict.update(optimizer._saved())
