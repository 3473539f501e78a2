"""The two phases of a cross-validated fit: the folds, from one hyperstep to the next, and the training on everything."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.random_stream import RandomStream, from_tensors, global_states, set_global_states, to_tensors
from hoptim.training.fit_file import FitFile
from hoptim.training.fold_optimizer import FoldOptimizer, Met, joined
from hoptim.training.folds import Fold
from hoptim.training.in_turn import InTurn
from hoptim.training.leaf_average import LeafAverage
from hoptim.training.record import Record
from hoptim.training.resumable import AtMark, ResumableOptimizer, State
from hoptim.training.shared import Shared

Train = Callable[[nn.Module, ResumableOptimizer, Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything that a fit trains.

    Attributes:
        folds: the folds.
        streams: the random stream of each fold.
        optimizers: the optimizer of each fold, with its model.
        last: the optimizer of the last training, with its model.
        examples: the indices of all examples.
        shared: what the models share.
    """

    folds: list[Fold]
    streams: list[RandomStream]
    optimizers: list[FoldOptimizer]
    last: ResumableOptimizer
    examples: Tensor
    shared: Shared


class Marked(NamedTuple):
    """Number of a mark and state there, handed over by a fold that pauses at it."""

    number: int
    state: State


class Fit:
    """One run of :meth:`CrossValidated.fit`.

    Args:
        parts: everything that is trained.
        train: the user's loop.
        average: the mean of the leaves, which replaces them after the folds; ``None`` to keep their last values.
        file: the checkpoint; ``None`` for none.

    Attributes:
        history: ``Record.row()`` of each hyperstep.
        seconds: the wall-clock time of each phase.
    """

    def __init__(self, parts: Parts, train: Train, average: LeafAverage | None, file: FitFile | None) -> None:
        self.parts, self.train, self.average, self.file = parts, train, average, file
        self.history: list[dict[str, Any]] = []
        self.seconds = {"folds": 0.0, "last": 0.0}
        self._counted = time.perf_counter()
        self._random: dict[str, Any] = {}  # the random states at the start of the present phase
        self._saved = None if file is None else file.read()
        self._wanted: int | None = None  # the number of the mark at which all folds shall pause

    def run(self) -> None:
        """Run both phases, or what is left of them after a checkpoint."""
        for optimizer in (*self.parts.optimizers, self.parts.last):
            self.parts.shared.watch(optimizer)
        if self._begin() == "folds":
            self._train_folds()
            self._random = {"last": global_states()}
            if self.file is not None:
                self.file.write(self._state_of_last(self.parts.last.state_at()))
        self._counted = time.perf_counter()
        self.parts.last.at_mark = self._at_mark_of_last(self.file)
        self.train(self.parts.last.problem.wrapper, self.parts.last, self.parts.examples)
        self.parts.shared.check()
        self._add_seconds("last")

    def _begin(self) -> str:
        """Restore a checkpoint, if there is one. Returns the phase to begin with."""
        saved, self._saved = self._saved, None
        if saved is None:
            self._random = {"folds": [to_tensors(stream.states()) for stream in self.parts.streams]}
            return "folds"
        (self._put_folds if saved["phase"] == "folds" else self._put_last)(saved)
        return str(saved["phase"])

    # The folds

    def _train_folds(self) -> None:
        """Train all folds from one hyperstep to the next until one of them ends, then the others to their end."""
        self._counted = time.perf_counter()
        turns = [InTurn(self._training(number)) for number, _ in enumerate(self.parts.folds)]
        for number, (optimizer, turn) in enumerate(zip(self.parts.optimizers, turns, strict=True)):
            optimizer.turn, optimizer.at_mark = turn, self._at_mark_of_fold(number, self.file)
        try:
            record: Record | None = None
            while (came := self._to_hyperstep(turns, record)) is not None:
                record = self._move(came)
                self.history.append(record.row())
                if self.average is not None:
                    self.average.add()
                if self.file is not None and len(self.history) == 1 and not self.parts.optimizers[0].is_marked:
                    warnings.warn(
                        f"the loop has no marks, so that {self.file.path} is written only once, between the folds and the "
                        "last training: write the loop as for epoch in optimizer.resumable(range(epochs))",
                        stacklevel=4,
                    )
            for number, turn in enumerate(turns):
                self.parts.optimizers[number].due = ()
                while not turn.ended:
                    self._resume(number, turn)
        finally:
            for turn in turns:
                turn.close()
        self._check_lengths()
        if self.average is not None:
            self.average.put()
        self._add_seconds("folds")

    def _training(self, number: int) -> Callable[[], None]:
        """The training of a fold, as a function without arguments."""
        optimizer, fold = self.parts.optimizers[number], self.parts.folds[number]

        def training() -> None:
            with annotate_errors(f"in the training of fold {number + 1} of {len(self.parts.folds)}"):
                self.train(optimizer.problem.wrapper, optimizer, fold.train.clone())

        return training

    def _resume(self, number: int, turn: InTurn, sent: Record | None = None) -> Any:
        """Let a fold run on in its random stream, until it pauses or ends."""
        with self.parts.streams[number].drawing():
            came = turn.resume(sent)
        with annotate_errors(f"in the training of fold {number + 1} of {len(self.parts.folds)}"):
            self.parts.shared.check()
        return came

    def _to_hyperstep(self, turns: list[InTurn], record: Record | None) -> list[Met] | None:
        """Let all folds run to their next hyperstep, with checkpoints on the way; ``None`` if one has ended."""
        came: list[Met | Marked | None] = [None] * len(turns)
        while True:
            for number, turn in enumerate(turns):
                if not (isinstance(came[number], Met) or turn.ended):
                    came[number] = self._resume(number, turn, record)
                first = came[0]
                self._wanted = first.number if isinstance(first, Marked) else None
            if any(turn.ended for turn in turns):
                return None
            marks = [one for one in came if isinstance(one, Marked)]
            if not marks:
                return [one for one in came if isinstance(one, Met)]
            if len(marks) == len(turns) and self.file is not None:
                self.file.write(self._state_of_folds([mark.state for mark in marks]))

    def _at_mark_of_fold(self, fold: int, file: FitFile | None) -> AtMark | None:
        """A function that pauses the first fold at a mark if a checkpoint is due, and the others at the same mark."""
        if file is None:
            return None

        def at_mark(number: int, take: Callable[[], State]) -> None:
            if file.is_due() if fold == 0 else number == self._wanted:
                self.parts.optimizers[fold].turn.pause(Marked(number, take()))

        return at_mark

    def _move(self, came: list[Met]) -> Record:
        """The hyperstep of all folds, taken by the optimizer of the first one."""
        begun = time.perf_counter() - sum(one.seconds for one in came)
        return self.parts.optimizers[0]._move(begun, joined(came))

    def _check_lengths(self) -> None:
        """Warn if a fold took another number of steps than it said, and raise if that left no hyperstep."""
        for number, optimizer in enumerate(self.parts.optimizers, 1):
            taken, told = optimizer.inner_steps, optimizer.steps
            words = f"the training of fold {number} took {taken} steps, where steps says {told}"
            if taken < told and not self.history:
                raise ValueError(f"{words}: it ended before the first hyperstep. Give steps as they are")
            if abs(taken - told) > 0.02 * told:
                words = f"{words}, so that {len(self.history)} hypersteps were not spread over all of it"
                warnings.warn(words, stacklevel=5)
                return

    # Checkpoints

    def _add_seconds(self, phase: str) -> None:
        """Add the time since the last call to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._counted
        self._counted = now

    def _at_mark_of_last(self, file: FitFile | None) -> AtMark | None:
        """A function that writes a checkpoint at a mark of the last training, if one is due."""
        if file is None:
            return None

        def at_mark(_: int, take: Callable[[], State]) -> None:
            if file.is_due():
                file.write(self._state_of_last(take()))

        return at_mark

    def _state_of_folds(self, states: list[State]) -> dict[str, Any]:
        """The state of the fit with every fold at a mark."""
        more = {"folds": states, "last": self.parts.last.state_at(), "process": global_states()}
        return {**self._state("folds"), **more}

    def _state_of_last(self, state: State) -> dict[str, Any]:
        """The state of the fit at a mark of the last training, or before it."""
        models = [dict(optimizer.problem.model.state_dict()) for optimizer in self.parts.optimizers]
        return {**self._state("last"), "models": models, "last": state}

    def _state(self, phase: str) -> dict[str, Any]:
        self._add_seconds(phase)
        return {
            "phase": phase,
            "hparams": self.parts.last.problem.hparams.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "history": self.history,
            "seconds": dict(self.seconds),
            "begun": self._random[phase],
        }

    def _put(self, saved: dict[str, Any]) -> None:
        """Restore what both phases need."""
        self.parts.last.problem.hparams.load_state_dict(saved["hparams"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        if saved["last"]["mark"] is None:  # at a mark it is restored once the loop gets there
            self.parts.last.put(saved["last"])
        else:
            self.parts.last.resume_from = saved["last"]
        self.history, self.seconds, self._random = saved["history"], saved["seconds"], {saved["phase"]: saved["begun"]}

    def _put_folds(self, saved: dict[str, Any]) -> None:
        self._put(saved)
        set_global_states(saved["process"])
        for stream, begun in zip(self.parts.streams, saved["begun"], strict=True):
            stream.load(from_tensors(begun))
        for optimizer, state in zip(self.parts.optimizers, saved["folds"], strict=True):
            optimizer.resume_from = state

    def _put_last(self, saved: dict[str, Any]) -> None:
        self._put(saved)
        set_global_states(saved["begun"])
        for optimizer, model in zip(self.parts.optimizers, saved["models"], strict=True):
            optimizer.problem.model.load_state_dict(model)
