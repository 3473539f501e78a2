"""A BilevelOptimizer whose loop has marks at which its training can be saved and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from hoptim.methods.learned_options import restarted, starts
from hoptim.methods.named_options import Learned
from hoptim.problem.random_stream import global_states, set_global_states
from hoptim.training.optimizer import BilevelOptimizer
from hoptim.validation import describe_type

T = TypeVar("T")
State = dict[str, Any]  # of a training at a mark, as tensors and plain values
AtMark = Callable[[int, Callable[[], State]], None]


class ResumableOptimizer(BilevelOptimizer):
    """A BilevelOptimizer whose training can be resumed at the marks of its loop.

    Attributes:
        is_marked: whether the loop has marks.
        at_mark: called at each mark with its number and a function that returns the state there; ``None`` for nothing.
        resume_from: the state from which the loop resumes, at the mark of this state; ``None`` once that is done.
    """

    is_marked = False
    at_mark: AtMark | None = None
    resume_from: State | None = None
    _was_told = False

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
            iterable: epochs or steps, the same each time the loop starts.
            stateful: what else changes in the loop: objects with ``state_dict`` and ``load_state_dict``, such as a
                scheduler, a ``GradScaler`` or an averaged model; or a ``torch.Generator``.

        Raises:
            TypeError: ``iterable`` can't be iterated, or an object has no state.
            ValueError: the training has started already; the checkpoint is of another loop.
        """
        if not isinstance(iterable, Iterable):
            raise TypeError(f"resumable goes around {describe_type(iterable)}: give what the loop is over, as range(epochs)")
        for one in stateful:
            if not isinstance(one, torch.Generator) and not (
                callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))
            ):
                raise TypeError(
                    f"resumable was given {describe_type(one)}: give objects with state_dict() and load_state_dict(), or a "
                    "torch.Generator"
                )
        if self.is_marked or self.inner_steps:
            raise ValueError(
                "resumable is for the whole loop of a training: put it around one loop, and take no step before it"
            )
        self.is_marked = True
        return self._marks(iterable, stateful)

    def _marks(self, iterable: Iterable[T], stateful: Sequence[Any]) -> Iterator[T]:
        saved, self.resume_from, count = self.resume_from, None, 0
        first = -1 if saved is None else saved["mark"]
        for number, item in enumerate(iterable):
            count = number + 1
            if number < first:
                continue
            if number == first and saved is not None:
                self._put(saved, stateful)
            elif self.at_mark is not None:
                self._reach(number, stateful, self.at_mark)
            yield item
        if first >= count:
            raise ValueError(f"the checkpoint is at mark {first} of a loop, which has {count} now: give the loop as it was")

    def _reach(self, number: int, stateful: Sequence[Any], at_mark: AtMark) -> None:
        """Call ``at_mark``, unless the mark is in the middle of a step."""
        if self._progress.window.is_between_steps:
            at_mark(number, lambda: self.state_at(number, stateful))
        elif not self._was_told:
            self._was_told = True
            warnings.warn(
                f"mark {number} of resumable is in the middle of a step, since a loss was computed after the last one: "
                "nothing is saved there. Compute losses that are only looked at under torch.no_grad()",
                stacklevel=3,
            )

    def state_at(self, mark: int | None = None, stateful: Sequence[Any] = ()) -> State:
        """The state of the training, sharing its tensors' memory; ``mark`` is ``None`` if it has not started."""
        return {
            "mark": mark,
            "model": dict(self.problem.model.state_dict()),
            "optimizer": self.state_dict(),
            "stateful": [(type(one).__name__, _state_of(one)) for one in stateful],
            "random": global_states(),
        }

    @property
    def has_seen_loss(self) -> bool:
        """Whether any loss of :meth:`loss` has gone backward."""
        return self._progress.window.has_seen

    def start_from(self, learned: Learned | None) -> None:
        """Let the options that were learned elsewhere have the starts that they had there."""
        if learned is not None:
            options = restarted(self.learned_options, starts(learned.options))
            self._progress.learn(options, self.inner, self.problem)

    def put(self, saved: State) -> None:
        """Restore model and optimizer."""
        self.problem.model.load_state_dict(saved["model"])
        self.load_state_dict(saved["optimizer"])

    def _put(self, saved: State, stateful: Sequence[Any]) -> None:
        """Restore the whole training at a mark."""
        kinds, found = [kind for kind, _ in saved["stateful"]], [type(one).__name__ for one in stateful]
        if kinds != found:
            raise ValueError(f"resumable was given {kinds} where the checkpoint was taken, and {found} now: give the same")
        self.put(saved)
        for one, (_, state) in zip(stateful, saved["stateful"], strict=True):
            one.set_state(state) if isinstance(one, torch.Generator) else one.load_state_dict(state)
        set_global_states(saved["random"])

    def loss(self, batch: Any) -> Any:
        """The training loss of ``batch``."""
        if self.resume_from is not None:
            raise ValueError(
                "the checkpoint is of a loop that was marked, and this one is not: give the loop as it was, with "
                "for epoch in optimizer.resumable(range(epochs)), before the first loss"
            )
        return super().loss(batch)


def _state_of(one: Any) -> Any:
    return one.get_state() if isinstance(one, torch.Generator) else one.state_dict()
