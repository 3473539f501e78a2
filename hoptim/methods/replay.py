"""Replay: the hypergradient by differentiating through a whole training, in little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from hoptim.checks import is_whole
from hoptim.methods.inner_step import InnerStep
from hoptim.methods.learned_options import LearnedOption
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.result import Terms
from hoptim.methods.reverse import through_steps
from hoptim.methods.trajectory import RecordedLoss, Step, Trajectory, present
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State

Options = Callable[[nn.Module, int], Mapping[str, Any]]


@dataclass(frozen=True)
class Replay(Method):
    """Reverse through a whole training: dL_V/dλ of w_T(λ), where w_T is reached from the present weights in T steps.

    The inner optimizer trains from the present weights and state, on the given batches in their order. The model does not
    move, so hyperparameters can be learned over many trainings from one start, before the final training. The result is
    exact, unless the forward pass writes what autograd does not see (``UNSEEN_WRITES``), or a loss itself detaches a part.
    Steps are repeated rather than stored: for T steps and k segments about k·log_k T copies of weights and state are held,
    and a step is taken once without a graph on each of log_k T levels, and once with a graph.

    Random numbers, such as those of dropout, are the same each time, and so are those that ``batches`` draws from torch. If
    a repeated step ends elsewhere, for example because batches draw from another source, the status says so.

    Args:
        batches: the training batches of all T steps: ``batches[t]`` is that of step t, and ``len(batches)`` is T.
        segments: k, a whole number, 2 or more, default 8.
        options: ``options(hparams, t) -> {"lr": ...}``, a function for options of the inner optimizer in step t, as numbers
            or tensors with a graph: a schedule, which may be learned. Default: the optimizer's own options in each step.

    Raises:
        TypeError: ``batches`` has no length, as an iterator; when called, an inner optimizer that torch can't differentiate.
        ValueError: there are no batches, or ``segments`` is below 2; when called, no inner optimizer.

    Source: Engstrom et al. 2025, Optimizing ML training with metagradient descent (arXiv 2503.13751), section 3.

    >>> import torch
    >>> from hoptim import HyperParameters, Problem, hypergradient
    >>> model = nn.Linear(1, 1, bias=False)
    >>> _ = model.weight.data.fill_(2.0)
    >>> hparams = HyperParameters({"lr": torch.tensor([0.1, 0.2])})
    >>> def loss(model, hparams, batch):
    ...     return 0.5 * model.weight.square().sum()                         # so each step is w ← (1 − lr_t)·w
    >>> def options(hparams, t):
    ...     return {"lr": hparams["lr"][t]}
    >>> inner = torch.optim.SGD(model.parameters())
    >>> problem = Problem(model, hparams, loss)
    >>> found = hypergradient(problem, None, None, Replay([None, None], options=options), inner=inner)
    >>> found.grads["lr"]                                                    # −(2·0.9·0.8)·2·(0.8, 0.9)
    tensor([-2.3040, -2.5920])
    """

    batches: Sequence[Any] = field(compare=False, repr=False)
    _: KW_ONLY
    segments: int = 8
    options: Options | None = None

    takes_train_batch, needs_inner = False, True

    def __post_init__(self) -> None:
        if len(self.batches) < 1:
            raise ValueError("batches is empty: give the batch of each step, one at least")
        if not (is_whole(self.segments) and self.segments >= 2):
            raise ValueError(f"segments={self.segments!r}: give a whole number, 2 or more")

    def cut_short(self) -> Replay:
        """The first step alone."""
        return replace(self, batches=[self.batches[0]])

    def _compute(self, problem: Problem, _: Any, val_batch: Any, __: State | None, loop: TrainingContext) -> Terms:
        assert loop.inner is not None
        trajectory = self.trajectory(problem, loop.inner, loop.learned)
        return through_steps(problem, trajectory, self.segments, val_batch, live=False, expected=len(self.batches))

    def trajectory(self, problem: Problem, inner: Optimizer, learned: Sequence[LearnedOption] = ()) -> Trajectory:
        """The steps of the training, from the present weights on."""
        dynamics = InnerStep.of(inner, problem.weights(), problem.leaves(), learned=learned)
        steps = _Steps(problem, self.batches, dynamics, self.options)
        return Trajectory(begins=((0, present(problem, dynamics)),), steps=steps)


class _Steps(Sequence[Step]):
    """The steps of a training, each made on demand."""

    def __init__(self, problem: Problem, batches: Sequence[Any], dynamics: InnerStep, options: Options | None) -> None:
        self._problem, self._batches, self._dynamics, self._options = problem, batches, dynamics, options

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: Any) -> Any:
        options = self._options
        present_options = None if options is None else lambda: options(self._problem.hparams, number)
        loss = RecordedLoss(batch=self._batches[number])
        return Step(losses=(loss,), dynamics=self._dynamics, options=present_options)

    def __iter__(self) -> Iterator[Step]:
        return (self[number] for number in range(len(self)))
