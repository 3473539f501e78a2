"""TrainingOptimizer: the user's own optimizer, with a training loss in which the hyperparameters are held fixed."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.methods import learned_options
from hoptim.methods.decay import RealDecay
from hoptim.methods.learned_options import Learned, LearnedOption
from hoptim.problem.problem import Problem
from hoptim.problem.random_stream import global_states, set_generators
from hoptim.training import arguments
from hoptim.training.checkpoint import BARE, KEY, REQUIRED, VERSION, check_loadable, held_shards, held_weights
from hoptim.training.recent_steps import RecentSteps, SeenLoss
from hoptim.training.record import Record

T = TypeVar("T")
Saved = dict[str, Any]  # a training at a save point, as tensors and plain values


@dataclass
class Progress:
    """What changes while an optimizer runs. Lightning copies the optimizer's ``__dict__``, and the copy shares this."""

    inner_steps: int = 0
    recent: RecentSteps = field(default_factory=RecentSteps)
    learned_options: list[LearnedOption] = field(default_factory=list)
    decay: RealDecay = field(default_factory=RealDecay)


class SavePoints:
    """The points of a training loop at which it may be saved and resumed: before each item of what it goes over.

    Attributes:
        are_used: whether the loop has any.
        save: called at each point with its number and a function that returns the state there; ``None`` for nothing.
        resume_from: the state from which the loop resumes, at the point of this state; ``None`` once that is done.
    """

    def __init__(self) -> None:
        self.are_used = False
        self.save: Callable[[int, Callable[[], Saved]], None] | None = None
        self.resume_from: Saved | None = None

    def iterate(self, optimizer: TrainingOptimizer, iterable: Iterable[T], stateful: tuple[Any, ...]) -> Iterator[T]:
        """The items of a loop, from the save point on if the training is resumed."""
        saved, self.resume_from, count = self.resume_from, None, 0
        first = -1 if saved is None else saved["mark"]
        for number, item in enumerate(iterable):
            count = number + 1
            if number < first:
                continue
            if number == first and saved is not None:
                _restore(optimizer, saved, stateful)
            elif self.save is not None and optimizer._progress.recent.is_between_steps:
                self.save(number, functools.partial(optimizer.saved_at, number, stateful))
            yield item
        if first >= count:
            raise ValueError(f"the checkpoint is at mark {first} of a loop, which has {count} now: give the loop as it was")


def _call_own_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """``step`` between the hooks that were registered on this optimizer, without those for all optimizers."""

    @functools.wraps(step)
    def hooked(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        given: tuple[Any, Any] = (optimizer, *args), kwargs
        for before in optimizer._optimizer_step_pre_hooks.values():
            given = before(optimizer, *given) or given
        result = step(*given[0], **given[1])
        for after in optimizer._optimizer_step_post_hooks.values():
            after(optimizer, *given)
        return result

    return hooked


class TrainingOptimizer(Optimizer):
    """An optimizer around ``inner`` for a training with the hyperparameters of ``problem`` as they are.

    It is a ``torch.optim.Optimizer`` whose groups, state and defaults are those of ``inner``. They are not copied: with a
    list of groups of its own, schedulers would have no effect after ``load_state_dict``.

    Args:
        inner: the optimizer of the model's weights.
        problem: the model, the hyperparameters and the losses.
        options: the options of ``inner`` that are hyperparameters, as in :class:`BilevelOptimizer`.
        learned: options that were learned before, whose starts hold here too.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an optimizer that holds the wrong tensors.
    """

    # Torch wraps ``step`` in this. Its own version also calls the hooks for all optimizers and opens a range in the
    # profiler, which the inner optimizer's step does already: each step would be seen twice.
    profile_hook_step = staticmethod(_call_own_hooks)  # type: ignore[assignment]
    _required: Sequence[str] = REQUIRED  # the entries that a state has to hold
    _progress: Progress

    def __init__(
        self,
        inner: Optimizer,
        problem: Problem,
        *,
        options: Mapping[str, Any] | None = None,
        learned: Learned | None = None,
    ) -> None:
        arguments.check_optimizer("inner", inner, problem)
        super().__setstate__({})  # makes the dicts of hooks; Optimizer.__init__ would also set groups and state
        self.inner, self.problem = inner, problem
        self._progress, self.save_points = self._new_progress(), SavePoints()
        names = options or {}
        problem.ranks.broadcast_((*problem.hparams.parameters(), *problem.hparams.buffers()))
        names, starts = (names, ()) if learned is None else (learned.named_again(inner, names), learned.starts)
        weights = dict(problem.named_parameters())
        if learned is None:
            _start_decays_from(inner, names.get("weight_decay"), weights)
        self._progress.learned_options = found = learned_options.learn(inner, names, problem.hparams, weights, starts)
        if found:
            problem.options = Learned.of(inner, names, found)
        self.register_state_dict_post_hook(_add_state)

    def _new_progress(self) -> Progress:
        return Progress()

    def loss(self, batch: Any) -> Tensor:
        """The training loss of ``batch`` for ``backward()``; hyperparameters get no gradient.

        With ``has_aux`` it returns the pair ``(loss, aux)``.
        """
        if self.save_points.resume_from is not None:
            raise ValueError(
                "the checkpoint is of a loop that was marked, and this one is not: give the loop as it was, with "
                "for epoch in optimizer.resumable(range(epochs)), before the first loss"
            )
        if not torch.is_grad_enabled():  # only to look at, so this is no training batch
            return self.problem.loss(batch)
        recent = self._progress.recent
        if not recent.is_cleared and not any(p.grad is not None for group in self.param_groups for p in group["params"]):
            recent.cleared()  # by model.zero_grad()
        seen = self._before_loss(batch)
        found = self.problem.loss(batch)
        if seen is not None:
            recent.after_loss(seen, found[0] if self.problem.has_aux else found)
        return found

    def _before_loss(self, batch: Any) -> SeenLoss | None:
        """Take note of a batch whose loss comes next; ``None`` if it counts already, before it goes backward."""
        return self._progress.recent.before_loss(None)  # no hyperstep will need it

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer."""
        progress = self._progress
        self._before_step(has_closure=closure is not None)
        learned = progress.learned_options
        numbers = [option for option in learned if not option.is_decay]
        with learned_options.in_effect(self.inner, numbers, self.problem.hparams) if numbers else nullcontext():
            result = progress.decay.step(self.inner, closure, learned, self.problem)
        progress.inner_steps += 1
        progress.recent.stepped()
        self._after_step()
        return result

    def _before_step(self, *, has_closure: bool) -> None:
        """What comes before a step of the inner optimizer."""

    def _after_step(self) -> None:
        """What comes after a step of the inner optimizer."""

    def hyperstep(self, train_batch: Any = None, val_batch: Any = None) -> Record | None:
        """Nothing, since hyperparameters are held fixed: for loops that also train with a :class:`BilevelOptimizer`."""
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the weights."""
        self._progress.recent.cleared()
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add weights to the inner optimizer.

        Raises:
            ValueError: a tensor of the group is a hyperparameter, or an option of it requires a gradient.
        """
        added, known = arguments.checked_group(param_group, self.problem), self.learned_options
        self._progress.learned_options = learned_options.add_group(self.inner, added, known)

    def resumable(self, iterable: Iterable[T], *stateful: Any) -> Iterator[T]:
        """The items of ``iterable``, such as epochs; before each of them the training may be saved and resumed.

        It is for the whole loop of a training inside ``CrossValidated.fit(train, checkpoint=...)``::

            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
            for epoch in optimizer.resumable(range(epochs), scheduler):
                ...

        A resumed training skips the items that were done, and then restores the model, the optimizer, all ``stateful``
        objects, and the random generators of Python, NumPy and torch. Whatever else changes from epoch to epoch, such as
        the best loss so far, has to be in a ``stateful`` object.

        Args:
            iterable: epochs or steps, the same each time the loop starts. Where one begins in the middle of a step, after
                a loss that was not used, nothing is saved.
            stateful: what else changes in the loop: objects with ``state_dict`` and ``load_state_dict``, such as a
                scheduler, a ``GradScaler`` or an averaged model; or a ``torch.Generator``.

        Raises:
            ValueError: the training has started already; the checkpoint is of another loop.
        """
        if self.save_points.are_used or self.inner_steps:
            raise ValueError(
                "resumable is for the whole loop of a training: put it around one loop, and take no step before it"
            )
        self.save_points.are_used = True
        return self.save_points.iterate(self, iterable, stateful)

    def saved_at(self, mark: int | None = None, stateful: tuple[Any, ...] = ()) -> Saved:
        """The state of the training, sharing its tensors' memory; ``mark`` is ``None`` if it has not started."""
        return {
            "mark": mark,
            "model": dict(self.problem.model.state_dict()),
            "optimizer": self.state_dict(),
            "stateful": stateful_states(stateful),
            "random": global_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict()`` holds: the inner optimizer and the hyperparameters; all counters and positions.

        From a bare optimizer's state only the inner one, with a warning. If the state is refused, nothing changes.

        Raises:
            ValueError: the state is damaged, of a newer version, of another model or of other constraints.
        """
        state_dict = copy.copy(state_dict)  # hooks may change it in place
        for change in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = change(self, state_dict) or state_dict
        check_loadable(state_dict, held_weights(self.inner, self.problem), self._required, held_shards(self.problem))
        before = self._saved()  # without copies, since a load replaces these tensors
        before[KEY]["hparams"] = copy.deepcopy(before[KEY]["hparams"])  # except for the hyperparameters
        try:
            self._load(state_dict) if KEY in state_dict else self._load_bare(state_dict)
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
            **held_shards(self.problem),
            "hparams": self.problem.hparams.state_dict(),
            "inner_steps": self.inner_steps,
        }
        if starts := learned_options.starts(self.learned_options):
            added["option_starts"] = starts
        return {**self.inner.state_dict(), KEY: added}

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        saved, progress = state_dict[KEY], self._progress
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
        self.problem.hparams.load_state_dict(saved["hparams"])
        progress.inner_steps = saved["inner_steps"]
        starts = saved.get("option_starts", ())
        progress.learned_options = learned_options.restarted(progress.learned_options, starts)
        if self.problem.options is not None:
            starts = learned_options.starts(progress.learned_options)
            self.problem.options = replace(self.problem.options, starts=starts)

    def _load_bare(self, state_dict: Mapping[str, Any]) -> None:
        """Load the state of a run without hoptim into the inner optimizer; torch refuses that of another model."""
        groups, progress = self.inner.param_groups, self._progress
        numbers = [option.present(groups[option.group]) for option in progress.learned_options]
        self.inner.load_state_dict(dict(state_dict))
        progress.learned_options = learned_options.resumed(self.inner, progress.learned_options, numbers)
        progress.recent.forget_steps()  # the next step does not start where the last one ended
        warnings.warn(BARE, stacklevel=3)

    @property
    def learned_options(self) -> list[LearnedOption]:
        """The options of the inner optimizer that are hyperparameters."""
        return self._progress.learned_options

    @property
    def record(self) -> Record | None:
        """The record of the last hyperstep, if there was one."""
        return None

    @property
    def hyper_steps(self) -> int:
        """Hypersteps taken so far, failed ones included."""
        return 0

    @property
    def inner_steps(self) -> int:
        """Inner steps taken so far."""
        return self._progress.inner_steps

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults; empty if it has none, or is not set yet."""
        return getattr(self.__dict__.get("inner"), "defaults", {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups_and_state: dict[str, Any] = {key: state[key] for key in ("state", "param_groups") if key in state}
        super().__setstate__({key: value for key, value in state.items() if key not in groups_and_state})
        if groups_and_state:
            self.inner.__setstate__(groups_and_state)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # bound to this object by a scheduler

    def __repr__(self) -> str:
        return f"{type(self).__name__}(inner={self.inner})"


def _start_decays_from(inner: Optimizer, decays: Any, weights: Mapping[str, Tensor]) -> None:
    """Let a recipe of decays that was given no start begin with the optimizer's own ``weight_decay``."""
    if not hasattr(decays, "start_from"):
        return
    number_of = {id(p): float(group["weight_decay"]) for group in inner.param_groups for p in group["params"]}
    decays.start_from({name: number_of[id(w)] for name, w in weights.items() if id(w) in number_of})


def _add_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, TrainingOptimizer)
    state_dict.update(optimizer._saved())


def stateful_states(stateful: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The class and the state of each."""
    return [
        (type(one).__name__, one.get_state() if isinstance(one, torch.Generator) else one.state_dict()) for one in stateful
    ]


def check_kinds(caller: str, kinds: Sequence[str], stateful: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` unless the objects are of the classes that were saved."""
    found = [type(one).__name__ for one in stateful]
    if list(kinds) != found:
        raise ValueError(f"{caller} was given {list(kinds)} where the checkpoint was taken, and {found} now: give the same")


def load_stateful(states: Sequence[tuple[str, Any]], stateful: tuple[Any, ...], *, with_generators: bool = True) -> None:
    """Restore these objects; generators only if asked."""
    for one, (_, state) in zip(stateful, states, strict=True):
        if not isinstance(one, torch.Generator):
            one.load_state_dict(state)
        elif with_generators:
            one.set_state(state)


def _restore(optimizer: TrainingOptimizer, saved: Saved, stateful: tuple[Any, ...]) -> None:
    """Restore a training at a save point."""
    check_kinds("resumable", [kind for kind, _ in saved["stateful"]], stateful)
    restore_model(optimizer, saved)
    load_stateful(saved["stateful"], stateful)
    set_generators(saved["random"])


def restore_model(optimizer: TrainingOptimizer, saved: Saved) -> None:
    """Restore model and optimizer."""
    optimizer.problem.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
