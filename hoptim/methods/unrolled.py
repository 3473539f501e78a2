"""Unrolled: the hypergradient by differentiating through the last inner steps."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import as_leaves
from hoptim.linalg import trees, vectors
from hoptim.linalg.vectors import Layout, OptionalTree, Tree
from hoptim.linalg.vjp import vjp
from hoptim.methods.inner_step import State as InnerState
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.replay import Snapshot, Step, Trajectory, look_ahead, summed_gradient
from hoptim.methods.result import Hypergradient, assemble
from hoptim.methods.validation_loss import validate
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import Solution, State, Status
from hoptim.validation import is_whole

SAME = 1e-3  # how far a replay may end from the live weights, relative to how far those have moved
LOST = 0.5  # farther than this, and it is no replay
GROWN = 10.0  # ∂L_V/∂w has outgrown its start: training is sensitive to where it began


@dataclass(frozen=True)
class Unrolled(Method):
    """Reverse through the last inner steps: dL_V/dλ of w_T(λ), where w_T is reached from w_{T−steps}, which is held fixed.

    :class:`BilevelOptimizer` keeps a copy of the weights and of the inner optimizer's state from ``steps`` steps before a
    hyperstep, with the batches, options and random states since, and takes the same steps again through torch's own
    optimizers. Called by itself, ``hypergradient(..., inner=optimizer)`` differentiates through the steps that would come
    next from the present weights, on ``train_batches`` or else on the training batch again and again.

    Each step is held as weights and state, and its graph is made when its turn comes: three to four gradients a step. In the
    result ``solution.residuals`` are ‖∂L_V/∂w_{T−j}‖ / ‖g‖, and ``solution.value`` is ∂L_V/∂w_{T−steps}: what the steps
    before these would still have to be differentiated for.

    Args:
        steps: inner steps, ≥ 1, default 20.
        checkpoint: hold every √steps-th place only, and walk from there again: memory like √steps, one more gradient a step.

    Raises:
        ValueError: ``steps`` is no positive whole number; when called, no inner optimizer.
        TypeError: when called, an inner optimizer that torch can't differentiate.

    Source: Shaban et al. 2019 (arXiv 1810.10667); memory: Griewank and Walther, "Evaluating Derivatives", section 12.

    >>> Unrolled(5)
    Unrolled(steps=5, checkpoint=False)
    """

    steps: int = 20
    _: KW_ONLY
    checkpoint: bool = False

    def __post_init__(self) -> None:
        if not (is_whole(self.steps) and self.steps >= 1):
            raise ValueError(f"steps={self.steps!r}: give a whole number of inner steps, 1 or more")
        if not isinstance(self.checkpoint, bool):
            raise TypeError(f"checkpoint={self.checkpoint!r}: give True or False")

    def cut_short(self) -> Unrolled:
        """A single step."""
        return replace(self, steps=1)

    @property
    def keeps_steps(self) -> int:  # type: ignore[override]
        """How many of the last inner steps the optimizer has to remember."""
        return self.steps

    def __call__(
        self,
        problem: Problem,
        train_batch: Any,
        val_batch: Any,
        state: State | None = None,
        loop: TrainingContext | None = None,
    ) -> Hypergradient:
        """The hypergradient over the steps kept in ``loop.trajectory``, or else over those that would come next."""
        loop = loop or TrainingContext()
        if loop.inner is None:
            raise ValueError("Unrolled needs the inner optimizer: call hypergradient(..., inner=optimizer)")
        taken: Trajectory | None = loop.trajectory
        with problem.untouched():
            trajectory = taken or look_ahead(
                problem, loop.inner, loop.draw or (lambda: train_batch), self.steps, loop.learned
            )
            leaves = as_leaves(problem.leaves())
            stride = math.isqrt(len(trajectory.steps) - 1) + 1 if self.checkpoint else 1
            trajectory, snapshots, loss, gradient = replay(problem, trajectory, leaves, stride)
            end = snapshots.pop()
            if not gradient:
                raise ValueError(
                    f"the training loss touches none of the weights {list(end.weights)}: compute it with the model"
                )
            weights = as_leaves({**problem.weights(), **end.weights})
            validation = problem.call(weights, leaves, lambda: validate(problem, weights, leaves, val_batch))
            back = _back(problem, trajectory, snapshots, stride, leaves, {name: validation.g[name] for name in end.weights})
            error = None if taken is None else _replay_error(trajectory, end, problem.weights())
            solution = _solution_of(back, self.steps, error)
            indirect = problem.ranks.mean_of_found(back.leaves, trees.expanded(leaves, validation.loss.shape))
            return assemble(validation, indirect, solution, leaves, loss, Layout.of(gradient).flatten(gradient))


@dataclass(frozen=True, kw_only=True)
class _Back:
    """What has come back through some steps: ∂L_V/∂w, ∂L_V/∂s, ∂L_V/∂λ, and how long the first was after each step."""

    weights: Tree
    state: Tree
    leaves: OptionalTree
    norms: tuple[Tensor, ...]


def replay(
    problem: Problem, trajectory: Trajectory, leaves: Tree, stride: int
) -> tuple[Trajectory, list[Snapshot], Tensor, Tree]:
    """Take the steps without a graph.

    Returns:
        The steps with their random states, every ``stride``-th snapshot and the end, and the last loss with its gradient.
    """
    snapshots, steps, at = [], [], trajectory.start
    loss, gradient = at.weights[next(iter(at.weights))].new_zeros(()), at.weights
    for number, step in enumerate(trajectory.steps):
        if number % stride == 0:
            snapshots.append(at)
        steps.append(step.with_generators(problem))
        at, loss, gradient = _advance(problem, steps[-1], at, leaves)
    return replace(trajectory, steps=tuple(steps)), [*snapshots, at], loss, gradient


def _advance(problem: Problem, step: Step, at: Snapshot, leaves: Tree) -> tuple[Snapshot, Tensor, Tree]:
    """The snapshot after one step, with the loss and the gradient before it."""
    weights = as_leaves(at.weights)

    def inside() -> tuple[Tree, Tensor]:
        with summed_gradient(problem, step.losses, weights, leaves, graph=False) as found:
            return found

    gradient, loss = problem.call(weights, leaves, inside)
    with torch.no_grad():
        new, state = step.dynamics.step(at.weights, gradient, leaves, at.state)
    return Snapshot(weights=new, state=state), loss, gradient


def _back(problem: Problem, trajectory: Trajectory, snapshots: list[Snapshot], stride: int, leaves: Tree, g: Tree) -> _Back:
    """From the end to the start, segment by segment, step by step."""
    back = _Back(weights=g, state={}, leaves=dict.fromkeys(leaves), norms=(_norm(g, trajectory.start.weights),))
    for number in reversed(range(len(snapshots))):
        segment = trajectory.steps[number * stride : (number + 1) * stride]
        along = [snapshots[number]]
        for step in segment[:-1]:
            along.append(_advance(problem, step, along[-1], leaves)[0])
        for step, at in zip(reversed(segment), reversed(along), strict=True):
            back = _through(problem, step, at, leaves, back)
    return back


def _through(problem: Problem, step: Step, at: Snapshot, leaves: Tree, back: _Back) -> _Back:
    """Back through one step, whose graph lives only here."""
    w, state = as_leaves(at.weights), _flat(at.state)
    counts = {path: value for path, value in state.items() if path.startswith("step|")}  # torch wants them without a graph
    flat = as_leaves({path: value for path, value in state.items() if path not in counts})
    batched = next(iter(back.weights.values())).ndim > next(iter(w.values())).ndim

    def inside() -> _Back:
        with summed_gradient(problem, step.losses, w, leaves, graph=True) as (gradient, _):
            weights, after = step.dynamics.step(w, gradient, leaves, _nested(counts | flat))
            outputs = {**_keyed("w", weights), **_keyed("s", _flat(after))}
            cotangents = {**_keyed("w", back.weights), **_keyed("s", back.state)}
            outputs = {key: value for key, value in outputs.items() if value.requires_grad and key in cotangents}
            inputs = {**_keyed("w", w), **_keyed("s", flat), **_keyed("l", leaves)}
            found = vjp(outputs, cotangents, inputs, batched=batched)
        before = problem.ranks.mean(trees.filled({name: found["w" + name] for name in w}, back.weights))
        return _Back(
            weights=before,
            state={name: part for name in flat if (part := found["s" + name]) is not None},
            leaves={name: trees.sum_of(back.leaves[name], found["l" + name]) for name in leaves},
            norms=(*back.norms, _norm(before, w)),
        )

    return problem.call(w, leaves, inside)


def _solution_of(back: _Back, steps: int, replayed: float | None) -> Solution:
    """How it went, as a solution; the host looks once."""
    norms = torch.stack(back.norms)
    start = torch.where(norms[0] > 0, norms[0], 1.0)
    grown = float((norms[-1] / start).amax())
    status, detail = Status.FINISHED, ""
    if not math.isfinite(grown):
        status, detail = Status.NON_FINITE_PRODUCT, "in the derivative of an inner step"
    elif replayed is not None and not replayed <= SAME:
        status = Status.REPLAY_DIFFERS if replayed <= LOST else Status.REPLAY_LOST
        detail = f"they end {replayed:.2g} times as far from the live weights as those have moved"
    elif len(norms) - 1 < steps:
        status, detail = Status.REPLAY_DIFFERS, f"of {steps} steps {len(norms) - 1} are known"
    elif grown > GROWN:
        status, detail = Status.SENSITIVE, f"∂L_V/∂w grew {grown:.3g} times over {len(norms) - 1} steps"
    residuals = norms[1:] / start
    return Solution(value=back.weights, status=status, detail=detail, residuals=residuals, products=len(residuals), state={})


def _replay_error(trajectory: Trajectory, end: Snapshot, live: Tree) -> float:
    """How far the replay ends from the live weights, relative to how far those have moved."""
    names = list(end.weights)
    missed = trees.norm({name: end.weights[name] - live[name].detach() for name in names})
    went = trees.norm({name: trajectory.start.weights[name] - live[name].detach() for name in names})
    return float(missed / torch.where(went > 0, went, 1.0))


def _norm(x: Tree, like: Tree) -> Tensor:
    """‖x‖, or R of them where x has a leading axis that ``like`` has not."""
    name, value = next(iter(x.items()))
    return vectors.norm(Layout.of(like).flatten(x, value.shape[: value.ndim - like[name].ndim]))


def _keyed(kind: str, x: Tree) -> Tree:
    return {kind + name: value for name, value in x.items()}


def _flat(state: InnerState) -> Tree:
    """The state's floating-point entries as one dict; a separator that no name of torch's holds."""
    return {f"{key}|{name}": value for name, entries in state.items() for key, value in entries.items()}


def _nested(flat: Tree) -> InnerState:
    state: InnerState = {}
    for path, value in flat.items():
        key, name = path.split("|", 1)
        state.setdefault(name, {})[key] = value
    return state
