"""The last inner steps before a hyperstep, kept so that they can be repeated: start, batches, random states, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.curvature.linearization import check_dense
from hoptim.curvature.second_derivatives import check_twice_differentiable
from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.methods.inner_step import InnerState, InnerStep
from hoptim.methods.learned_options import LearnedOption
from hoptim.problem.functional import Attributes, DifferentiableStatistics
from hoptim.problem.held_batch import hold
from hoptim.problem.problem import ModuleState, Problem
from hoptim.problem.random_stream import set_generators


@dataclass(frozen=True, kw_only=True)
class RecordedLoss:
    """One training loss: its batch, and the random states before it by device, ``None`` for those after the loss before.

    ``share`` is the gradient that its backward pass started with: 1, or less if losses are scaled before they are added.
    """

    batch: Any
    generators: dict[str, Tensor] | None = None
    share: float | Tensor = 1.0


@dataclass(frozen=True, kw_only=True)
class Step:
    """One inner step: the losses whose gradients were added up, and the optimizer's step with its options at the time.

    ``options``, if given, returns options that replace these, computed from the present hyperparameters.
    """

    losses: tuple[RecordedLoss, ...]
    dynamics: InnerStep
    options: Callable[[], Mapping[str, Any]] | None = None

    def present_dynamics(self) -> InnerStep:
        """The dynamics, with ``options`` applied."""
        return self.dynamics if self.options is None else self.dynamics.with_options(self.options())


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights, the inner optimizer's state, what else forward passes change, and random states, between two steps."""

    weights: Tensors
    state: InnerState
    modules: ModuleState
    generators: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Inner steps, and snapshots from before some of them with the number of the step; the first is from before step 0."""

    begins: tuple[tuple[int, Snapshot], ...]
    steps: Sequence[Step]


def look_ahead(
    problem: Problem, inner: Optimizer, draw: Callable[[], Any], steps: int, learned: Sequence[LearnedOption] = ()
) -> Trajectory:
    """The next ``steps`` steps from the present weights, on batches from ``draw``."""
    dynamics = InnerStep.of(inner, problem.weights(), problem.leaves(), learned=learned)
    batches = [hold(draw()) for _ in range(steps)]
    taken = [Step(losses=(RecordedLoss(batch=batch.get()),), dynamics=dynamics) for batch in batches]
    return Trajectory(begins=((0, present(problem, dynamics)),), steps=tuple(taken))


def present(problem: Problem, dynamics: InnerStep) -> Snapshot:
    """A copy of the present weights and random states; the optimizer's state is that of ``dynamics``."""
    weights = dicts.map_tensors(_copy, problem.weights())
    modules, generators = problem.module_state(), problem.generators()
    return Snapshot(weights=weights, state=dynamics.state, modules=modules, generators=generators)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one step, evaluated one after the other.

    Attributes:
        gradient: ∇_w of their sum, at the weights of ``at``.
        loss: the sum.
        weights: the weights from which the optimizer steps, with what the forward passes have written to them.
        buffers: the buffers afterwards.
        statistics: how running statistics got their graphs; ``None`` if these were not asked for.
    """

    gradient: Tensors
    loss: Tensor
    weights: Tensors
    buffers: Tensors
    statistics: DifferentiableStatistics | None


@contextmanager
def evaluated_losses(
    step: Step,
    problem: Problem,
    weights: Tensors,
    leaves: Tensors,
    buffers: Tensors,
    attributes: Attributes | None,
    *,
    graph: bool,
    with_statistics: bool = True,
) -> Iterator[Losses]:
    """The losses of a step times their shares, at tensors that are in place of the model's.

    With ``graph`` the gradient has a graph, which works inside the context. Buffers have one; running statistics do only
    ``with_statistics``. Without ``attributes`` they are as they are, such as after another step whose context is open.

    Raises:
        ValueError: a forward pass registers or fills a buffer.
    """
    slope: Tensors = {}
    total = next(iter(weights.values())).new_zeros(())
    with ExitStack() as stack:
        at = stack.enter_context(problem.at(weights, leaves, buffers, attributes))
        around = DifferentiableStatistics().around(problem.joint) if with_statistics else nullcontext()
        statistics, now, buffers = stack.enter_context(around), weights, at.buffers
        for one in step.losses:
            set_generators(one.generators or {})
            found = stack.enter_context(replace(at, buffers=buffers).loss("train_loss", one.batch))
            _check_buffers(problem, found.written)
            if graph:
                check_twice_differentiable(at, found.loss, one.batch)
            loss = found.loss * one.share
            buffers = {name: t if statistics is None else statistics.graph_of(t) for name, t in found.written.items()}
            now = {name: found.written.get(f"model.{name}", w) for name, w in now.items()}
            parts = torch.autograd.grad(loss, list(weights.values()), create_graph=graph, allow_unused=True)
            touched = dicts.present(dict(zip(weights, parts, strict=True)))
            check_dense(touched)
            slope |= {name: slope[name] + part if name in slope else part for name, part in touched.items()}
            total = total + loss.detach()
        total, means = problem.ranks.mean_with_loss(total, slope, weights)
        yield Losses(gradient=dicts.present(means), loss=total, weights=now, buffers=buffers, statistics=statistics)


def _check_buffers(problem: Problem, before: Tensors) -> None:
    """Raise ``ValueError`` if a forward pass has registered or filled a buffer."""
    if new := sorted(name for name, _ in problem.joint.named_buffers() if name not in before):
        raise ValueError(
            f"the forward pass registers or fills the buffer {new[0].partition('.')[2]!r}, so that the first step "
            "can't be repeated as the others: run the model on one batch before"
        )


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone()
