"""The two phases of a cross-validated fit: the folds, from one hyperstep to the next, and the training on everything."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg.vectors import Tensors
from hoptim.methods.result import Hypergradient
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.problem.random_stream import global_states, set_generators
from hoptim.training.fit_file import FitFile
from hoptim.training.fold_optimizer import FoldOptimizer, SavePoint, Train, joined
from hoptim.training.optimizer import project_
from hoptim.training.record import Record
from hoptim.training.shared_tensors import SharedTensors
from hoptim.training.training_optimizer import Saved, TrainingOptimizer, restore_model


class Fit:
    """The trainings of :meth:`CrossValidated.fit`, which runs once.

    Args:
        folds: the optimizers of the folds, each with its model.
        last: the optimizer of the last training, with its model.
        examples: the indices of all examples.
        shared: what the models share.

    Attributes:
        has_begun: whether it was run.
        history: ``Record.row()`` of each hyperstep.
        seconds: the wall-clock time of each phase.
    """

    def __init__(self, folds: list[FoldOptimizer], last: TrainingOptimizer, examples: Tensor, shared: SharedTensors) -> None:
        self.folds, self.last, self.examples, self.shared = folds, last, examples, shared
        self.has_begun = False
        self.history: list[dict[str, Any]] = []
        self.seconds = {"folds": 0.0, "last": 0.0}
        self._clock = 0.0  # when time was last added to them
        self._random: dict[str, Any] = {}  # the random states at the start of the present phase
        self._wanted: int | None = None  # the number of the save point at which all folds shall pause
        self._average: LeafAverage | None = None

    def run(self, train: Train, average: LeafAverage | None, file: FitFile | None) -> None:
        """Run both phases, or what is left of them after a checkpoint.

        Args:
            train: the user's loop.
            average: the mean of the leaves, which replaces them after the folds; ``None`` to keep their last values.
            file: the checkpoint; ``None`` for none.
        """
        saved = None if file is None else file.read()
        self.has_begun, self._average = True, average
        for optimizer in (*self.folds, self.last):
            self.shared.watch(optimizer)
        if saved is None:
            self._random = {"folds": [one.stream.states() for one in self.folds]}
        else:
            self._load(saved)
        if saved is None or saved["phase"] == "folds":
            self._train_folds(train, file)
            self._random = {"last": global_states()}
            if file is not None:
                file.write(self._saved_in_last(self.last.saved_at()))
        self._clock = time.perf_counter()
        if file is not None:
            self.last.save_points.save = lambda _, state: file.write(self._saved_in_last(state())) if file.is_due() else None
        train(self.last.problem.wrapper, self.last, self.examples)
        self.shared.check()
        self._add_seconds("last")

    # The folds

    def _train_folds(self, train: Train, file: FitFile | None) -> None:
        """Train all folds from one hyperstep to the next until one of them ends, then the others to their end."""
        self._clock, record = time.perf_counter(), None
        for one in self.folds:
            one.begin(train)
            one.save_points.save = None if file is None else self._pauses_to_save(one, file)
        try:
            while self._run_to_hyperstep(record, file):
                record = self._move()
                self.history.append(record.row())
                if self._average is not None:
                    self._average.add()
            for one in self.folds:
                one.due = ()
                while not one.coroutine.is_done:
                    self._resume(one)
        finally:
            for one in self.folds:
                one.coroutine.close()
        self._check_lengths()
        if self._average is not None:
            self._average.put()
        self._add_seconds("folds")

    def _run_to_hyperstep(self, record: Record | None, file: FitFile | None) -> bool:
        """Let all folds run to their next hyperstep, with checkpoints on the way; false if one has ended."""
        for one in self.folds:
            one.paused = None
        while not all(isinstance(one.paused, Hypergradient) for one in self.folds):
            for one in self.folds:
                if not isinstance(one.paused, Hypergradient):
                    self._resume(one, record)
                first = self.folds[0].paused
                self._wanted = first.number if isinstance(first, SavePoint) else None
            if any(one.coroutine.is_done for one in self.folds):
                return False
            states = [one.paused.state for one in self.folds if isinstance(one.paused, SavePoint)]
            if len(states) == len(self.folds) and file is not None:
                file.write(self._saved_in_folds(states))
        return True

    def _resume(self, one: FoldOptimizer, record: Record | None = None) -> None:
        one.resume(record)
        with annotate_errors(f"in the training of {one.name}"):
            self.shared.check()

    def _pauses_to_save(self, one: FoldOptimizer, file: FitFile) -> Callable[[int, Callable[[], Saved]], None]:
        """A function that pauses the first fold at a save point if a checkpoint is due, and the others at the same point."""

        def save(number: int, state: Callable[[], Saved]) -> None:
            if file.is_due() if one is self.folds[0] else number == self._wanted:
                one.coroutine.pause(SavePoint(number, state()))

        return save

    def _move(self) -> Record:
        """The hyperstep of all folds, taken by the optimizer of the first one."""
        begun = time.perf_counter() - sum(one.seconds for one in self.folds)
        results = [one.paused for one in self.folds if isinstance(one.paused, Hypergradient)]
        return self.folds[0]._move(begun, joined(results))

    def _check_lengths(self) -> None:
        """Warn if a fold took another number of steps than it said, and raise if that left no hyperstep."""
        for number, one in enumerate(self.folds, 1):
            taken, told = one.inner_steps, one.steps
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
        self.seconds[phase] += now - self._clock
        self._clock = now

    def _saved_in_folds(self, states: list[Saved]) -> dict[str, Any]:
        """The state of the fit with every fold at a save point."""
        return {**self._saved("folds"), "folds": states, "last": self.last.saved_at(), "process": global_states()}

    def _saved_in_last(self, state: Saved) -> dict[str, Any]:
        """The state of the fit at a save point of the last training, or before it."""
        models = [dict(one.problem.model.state_dict()) for one in self.folds]
        return {**self._saved("last"), "models": models, "last": state}

    def _saved(self, phase: str) -> dict[str, Any]:
        self._add_seconds(phase)
        return {
            "phase": phase,
            "hparams": self.last.problem.hparams.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "history": self.history,
            "seconds": dict(self.seconds),
            "begun": self._random[phase],
        }

    def _load(self, saved: dict[str, Any]) -> None:
        self.last.problem.hparams.load_state_dict(saved["hparams"])
        if self._average is not None:
            self._average.load_state_dict(saved["average"])
        if saved["last"]["mark"] is None:  # at a save point it is restored once the loop gets there
            restore_model(self.last, saved["last"])
        else:
            self.last.save_points.resume_from = saved["last"]
        self.history, self.seconds, self._random = saved["history"], saved["seconds"], {saved["phase"]: saved["begun"]}
        if saved["phase"] == "folds":
            set_generators(saved["process"])
            for one, begun, state in zip(self.folds, saved["begun"], saved["folds"], strict=True):
                one.stream.load(begun)
                one.save_points.resume_from = state
        else:
            set_generators(saved["begun"])
            for one, model in zip(self.folds, saved["models"], strict=True):
                one.problem.model.load_state_dict(model)


class LeafAverage:
    """The mean of a problem's leaves over the hypersteps after the first ``skip``.

    >>> from torch import nn
    >>> hparams = nn.ParameterDict({"decay": torch.tensor(1.0)})
    >>> average = LeafAverage(Problem(nn.Linear(1, 1), hparams, lambda m, h, b: 0, lambda m, h, b: 0), skip=1)
    >>> for value in (8.0, 2.0, 3.0):
    ...     _ = hparams["decay"].data.fill_(value)
    ...     average.add()
    >>> average.put()
    >>> hparams["decay"].item()
    2.5
    """

    def __init__(self, problem: Problem, skip: int) -> None:
        self._problem, self._skip, self._seen = problem, skip, 0
        self._mean: Tensors = {}

    def add(self) -> None:
        """Add the leaves after another hyperstep."""
        self._seen += 1
        count = self._seen - self._skip
        if count < 1:
            return
        for name, leaf in self._problem.leaves().items():
            value = leaf.detach().clone()
            self._mean[name] = value if count == 1 else self._mean[name].lerp(value, 1 / count)

    @torch.no_grad()
    def put(self) -> None:
        """Set the leaves to their mean, if there were any hypersteps after the first ``skip``."""
        for name, value in self._mean.items():
            self._problem.leaves()[name].copy_(value)
        project_(self._problem)

    def state_dict(self) -> dict[str, Any]:
        """The mean, and the number of hypersteps."""
        return {"seen": self._seen, "mean": dict(self._mean)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore it, on the devices of the leaves."""
        leaves, self._seen = self._problem.leaves(), saved["seen"]
        self._mean = {name: value.to(leaves[name].device) for name, value in saved["mean"].items()}
