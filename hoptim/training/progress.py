"""Everything that changes while a BilevelOptimizer runs, in one object.

Lightning copies the optimizer's ``__dict__``, and the copy has to share this state.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hoptim.linalg.vectors import Tree
from hoptim.methods.learned_options import LearnedOption, restarted, starts, take_over
from hoptim.methods.named_options import Learned
from hoptim.methods.trajectory import Recorder
from hoptim.problem.kept import Kept, copied, noted
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State, Status
from hoptim.training.arguments import OnFailure
from hoptim.training.first_steps import FirstSteps
from hoptim.training.record import Record, cosine_in_common
from hoptim.training.window import Window


@dataclass
class Ahead:
    """The inner steps that were taken, and how many were left then until the first hyperstep; 0 after it."""

    taken: int = 0
    left: float = 0

    def tell(self) -> None:
        """Warn if the training has ended before its first hyperstep."""
        if 0 < self.left < math.inf:
            warnings.warn(
                f"the training ended after {self.taken} steps without a hyperstep, so that no hyperparameter has moved: the "
                f"first one would have come after step {self.taken + self.left}. Give the BilevelOptimizer a smaller every, "
                "or a shorter warmup; every=None is for hypersteps by hand",
                stacklevel=2,
            )


@dataclass
class Progress:
    """Counters, the last record, the last batches, the state of the solver, and the steps kept for unrolling."""

    inner_steps: int = 0
    hyper_steps: int = 0
    solver_state: State = field(default_factory=dict)
    last_gradient: Tree = field(default_factory=dict)
    record: Record | None = None
    copy: Kept | None = None  # of the batch of the last loss, if a hyperstep needs it
    window: Window = field(default_factory=Window)
    recorder: Recorder = field(default_factory=Recorder)
    first_steps: FirstSteps | None = None  # until they are over
    learned_options: list[LearnedOption] = field(default_factory=list)
    warned: set[Status | str] = field(default_factory=set)
    norms: dict[str, float] = field(default_factory=dict)  # of the weights when training began
    unheld: list[tuple[str, str]] = field(default_factory=list)  # tensors in neither optimizer, after a warning
    ahead: Ahead = field(default_factory=Ahead)

    def __post_init__(self) -> None:
        weakref.finalize(self, self.ahead.tell)  # also at the end of the process

    def learn(self, options: Sequence[LearnedOption], inner: Optimizer, problem: Problem) -> None:
        """Take over the learned options, and leave on the problem what a retraining has to know of them."""
        self.learned_options = take_over(inner, options, problem.hparams)
        if self.learned_options:
            problem.options = Learned.of(inner, self.learned_options)

    def cleared(self) -> None:
        """Call this when gradients are cleared."""
        self.window.cleared = True
        self.recorder.cleared()

    def stepped(self, every: int | None, warmup: int) -> bool:
        """Call this after an inner step. Returns whether a hyperstep is due."""
        self.inner_steps += 1
        self.window.stepped()
        self.recorder.stepped()
        left = steps_left(self.inner_steps, every, warmup)
        self.ahead.taken, self.ahead.left = self.inner_steps, 0 if self.hyper_steps else left
        return left == 0

    def count_hyperstep(self) -> None:
        """Call this when there is a hypergradient."""
        self.hyper_steps += 1
        self.ahead.left = 0

    def warn_of_doubts(self, doubts: Mapping[str, str]) -> None:
        """Warn of each kind of doubt once."""
        for kind, doubt in doubts.items():
            if kind not in self.warned:
                self.warned.add(kind)
                warnings.warn(f"{doubt}. Later ones are only recorded", stacklevel=5)

    def report_failure(self, record: Record, on_failure: OnFailure) -> None:
        """Raise, or warn of the first failure of each kind."""
        if on_failure == "raise":
            raise RuntimeError(f"{record.failure}. With on_failure='skip' the training would go on")
        if record.status not in self.warned:
            self.warned.add(record.status)
            warnings.warn(f"{record.failure}. Later ones of this kind are only recorded", stacklevel=6)

    def cosine_to_last(self, gradient: Tree) -> float | None:
        """The cosine of this hypergradient to the last one, over entries that are zero in neither; keeps this one."""
        last, self.last_gradient = self.last_gradient, gradient
        if {name: value.shape for name, value in last.items()} != {name: value.shape for name, value in gradient.items()}:
            return None
        return cosine_in_common(gradient, {name: value.to(gradient[name]) for name, value in last.items()})

    def keep(self, batch: Any, *, is_needed: bool) -> Kept:
        """The batch of a loss: a copy if a hyperstep will need it, else by reference, for one that may come by hand."""
        self.copy = copied(batch, self.copy) if is_needed else None
        return noted(batch) if self.copy is None else self.copy._replace(leaves=())  # without the original

    def record_loss(self, problem: Problem, inner: Optimizer, batch: Kept, every: int) -> Callable[[Tensor], None]:
        """Call this before a training loss is computed: see :meth:`Recorder.record_loss`."""
        return self.recorder.record_loss(problem, inner, batch, self.learned_options, every)

    def state_dict(self) -> dict[str, Any]:
        """The part of it that a checkpoint holds, as tensors and plain values."""
        computed = starts(self.learned_options)
        return {
            "inner_steps": self.inner_steps,
            "hyper_steps": self.hyper_steps,
            "solver_state": dict(self.solver_state),
            "last_gradient": dict(self.last_gradient),
            "norms": dict(self.norms),
            "trajectory": self.recorder.state_dict(),
            **({"option_starts": computed} if computed else {}),
        }

    def load_state_dict(self, saved: dict[str, Any], problem: Problem, inner: Optimizer) -> None:
        """Restore it, on the devices of the weights and leaves; names that no longer exist are dropped."""
        weights, leaves = problem.weights(), problem.leaves()
        self.inner_steps, self.hyper_steps = saved["inner_steps"], saved["hyper_steps"]
        device = next(iter(weights.values())).device
        self.solver_state = {name: vector.to(device) for name, vector in saved["solver_state"].items()}
        self.last_gradient = _beside(saved["last_gradient"], leaves)
        self.norms = saved.get("norms", self.norms)  # an earlier version has none
        self.recorder.load_state_dict(saved["trajectory"], problem, inner)
        begun = saved.get("option_starts", ())
        self.learned_options = restarted(self.learned_options, begun)
        if problem.options is not None:
            problem.options = problem.options.restarted(begun)
        if self.inner_steps:
            self.first_steps = None


def steps_left(step: int, every: int | None, warmup: int) -> float:
    """The number of inner steps after step ``step`` until a hyperstep follows: 0 if one follows this step.

    >>> [steps_left(step, every=3, warmup=5) for step in (1, 6, 7)], steps_left(1, every=None, warmup=0)
    ([5, 0, 2], inf)
    """
    return math.inf if every is None else -(-max(step, warmup) // every) * every - step


def has_gradient(inner: Optimizer) -> bool:
    """Whether any weight has a gradient; none has after ``model.zero_grad()``."""
    return any(p.grad is not None for group in inner.param_groups for p in group["params"])


def _beside(saved: Tree, live: Tree) -> Tree:
    return {name: value.to(live[name].device) for name, value in saved.items() if name in live}
