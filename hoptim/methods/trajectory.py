"""The last inner steps before a hyperstep, kept so that they can be repeated: start, batches, random states, options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.curvature.linearization import check_dense
from hoptim.curvature.second_derivatives import check_twice_differentiable
from hoptim.linalg import trees
from hoptim.linalg.vectors import Tree
from hoptim.methods.inner_step import InnerStep, State
from hoptim.methods.learned_options import LearnedOption
from hoptim.problem.functional import Attributes, DifferentiableStatistics
from hoptim.problem.held_batch import hold
from hoptim.problem.problem import ModuleState, Problem, set_generators


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

    weights: Tree
    state: State
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
    weights = trees.map_tree(_copy, problem.weights())
    modules, generators = problem.module_state(), problem.generators()
    return Snapshot(weights=weights, state=dynamics.state, modules=modules, generators=generators)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The losses of one step, evaluated one after the other.

    Attributes:
        gradient: ∇_w of their sum, at ``weights``.
        loss: the sum.
        weights: the weights from which the optimizer steps, with what the forward passes have written to them.
        tensors: the buffers afterwards.
        attributes: the plain attributes of the modules afterwards, when called.
    """

    gradient: Tree
    loss: Tensor
    weights: Tree
    tensors: Tree
    attributes: Callable[[], Attributes]


@contextmanager
def evaluated_losses(
    problem: Problem,
    losses: Sequence[RecordedLoss],
    weights: Tree,
    leaves: Tree,
    modules: ModuleState,
    statistics: DifferentiableStatistics | None = None,
    *,
    graph: bool,
) -> Iterator[Losses]:
    """The losses of a step times their shares, at tensors that stand in for the model's.

    With ``graph`` the gradient has a graph, which works inside the context. With ``statistics`` the buffers have one.

    Raises:
        ValueError: a forward pass registers or fills a buffer.
    """
    slope: Tree = {}
    total = next(iter(weights.values())).new_zeros(())
    with ExitStack() as stack:
        attributes = stack.enter_context(problem.with_attributes(modules.attributes))
        tensors, now = modules.tensors, weights
        for one in losses:
            set_generators(one.generators or {})
            at = stack.enter_context(problem.evaluated("train_loss", one.batch, tensors))
            if graph:
                check_twice_differentiable(problem, at.loss, weights, leaves, one.batch)
            loss = at.loss * one.share
            tensors = {name: t if statistics is None else statistics.graph_of(t) for name, t in at.written.items()}
            now = {name: at.written.get(f"model.{name}", w) for name, w in now.items()}
            parts = torch.autograd.grad(loss, list(weights.values()), create_graph=graph, allow_unused=True)
            touched = trees.present(dict(zip(weights, parts, strict=True)))
            check_dense(touched)
            slope |= {name: slope[name] + part if name in slope else part for name, part in touched.items()}
            total = total + loss.detach()
        gradient, total = _over_ranks(problem, slope, total, weights)
        yield Losses(gradient=gradient, loss=total, weights=now, tensors=tensors, attributes=attributes)


def _over_ranks(problem: Problem, found: Tree, total: Tensor, weights: Tree) -> tuple[Tree, Tensor]:
    """Their means over the ranks; the derivative of a mean is that of this rank's own gradient."""
    ranks = problem.ranks
    if ranks.size == 1:
        return found, total
    loss, averaged = ranks.mean_with_loss(total, found, weights)
    slope = trees.present(averaged)
    return {n: mean + (found[n] - found[n].detach()) if n in found else mean for n, mean in slope.items()}, loss


def _copy(value: Tensor) -> Tensor:
    return value.detach().clone()
