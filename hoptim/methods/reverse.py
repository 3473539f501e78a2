"""Back through inner steps, from the last to the first: ∂L_V/∂w, ∂L_V/∂s and dL_V/dλ, with a graph of one step at a time.

The steps are taken once without a graph, and snapshots are kept at the begin of each of k segments. Then the segments come
one by one, the last first: each is divided in k segments again, until a segment is a single step. So k·log_k T snapshots
are held at a time for T steps, each of which is taken once more on each level. With k = T all are held, and none is taken
again; with k = √T there are two levels.

Source: Griewank and Walther, "Evaluating Derivatives", section 12; Engstrom et al. 2025 (arXiv 2503.13751), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import as_leaves
from hoptim.linalg import trees, vectors
from hoptim.linalg.vectors import Layout, OptionalTree, Tree
from hoptim.linalg.vjp import vjp
from hoptim.methods.inner_step import State
from hoptim.methods.result import Hypergradient, assemble
from hoptim.methods.trajectory import Snapshot, Step, Trajectory, summed_gradient
from hoptim.methods.validation_loss import validate
from hoptim.problem.problem import Problem, set_generators
from hoptim.solvers.solution import Solution, Status

SAME = 1e-3  # how far steps taken again may end from where they ended before, relative to how far they went
LOST = 0.5  # farther than this, and they are other steps
GROWN = 10.0  # ∂L_V/∂w has outgrown its start: training is sensitive to where it began


def through_steps(
    problem: Problem, trajectory: Trajectory, segments: int, val_batch: Any, *, live: bool, expected: int
) -> Hypergradient:
    """dL_V/dλ at the end of the steps, whose start is held fixed.

    Args:
        problem: the problem, inside ``problem.untouched()``.
        trajectory: the steps.
        segments: k.
        val_batch: the validation batch.
        live: whether the model's present weights are where the steps have ended before.
        expected: how many steps there should be.
    """
    leaves, steps = as_leaves(problem.leaves()), len(trajectory.steps)
    reverse = Reverse(problem=problem, steps=trajectory.steps, leaves=leaves, segments=segments)
    begins = reverse.begins(trajectory.start, 0, steps)
    end, loss, gradient = reverse.end(begins, steps)
    if not gradient:
        raise ValueError(f"the training loss touches none of the weights {list(end.weights)}: compute it with the model")
    weights = as_leaves({**problem.weights(), **end.weights})
    validation = problem.call(weights, leaves, lambda: validate(problem, weights, leaves, val_batch))
    g = {name: validation.g[name] for name in end.weights}
    norm = _norm(g, end.weights)
    missed = _distance(end, problem.weights(), trajectory.start) if live else loss.new_zeros(())
    back = Back(weights=g, state={}, leaves=dict.fromkeys(leaves), norms=(norm,), missed=missed)
    back = reverse.back(begins, end, 0, steps, back)
    indirect = problem.ranks.mean_of_found(back.leaves, trees.expanded(leaves, validation.loss.shape))
    return assemble(validation, indirect, _solution_of(back, expected), leaves, loss, Layout.of(gradient).flatten(gradient))


def end_of(problem: Problem, trajectory: Trajectory, leaves: Tree) -> Tree:
    """The weights at the end of the steps, taken with these hyperparameters."""
    reverse = Reverse(problem=problem, steps=trajectory.steps, leaves=leaves, segments=1)
    return reverse.end([trajectory.start], len(trajectory.steps))[0].weights


@dataclass(frozen=True, kw_only=True)
class Back:
    """What has come back through some steps.

    Attributes:
        weights: ∂L_V/∂w.
        state: ∂L_V/∂s, of the inner optimizer's state.
        leaves: dL_V/dλ, through these steps.
        norms: how long the first was at the end and before each of the steps.
        missed: how far, at most, steps taken again have ended from where they ended before, relative to how far they went.
    """

    weights: Tree
    state: Tree
    leaves: OptionalTree
    norms: tuple[Tensor, ...]
    missed: Tensor


@dataclass(frozen=True, kw_only=True)
class Reverse:
    """The steps, and what they are taken with."""

    problem: Problem
    steps: Sequence[Step]
    leaves: Tree
    segments: int

    def begins(self, at: Snapshot, low: int, high: int) -> list[Snapshot]:
        """The begins of the segments of steps ``low`` to ``high``, of which the first is ``at``."""
        found, size = [at], self._size(low, high)
        for number in range(low, high - 1 - (high - low - 1) % size):
            at = self._advance(number, at)[0]
            if (number + 1 - low) % size == 0:
                found.append(at)
        return found

    def end(self, begins: list[Snapshot], high: int) -> tuple[Snapshot, Tensor, Tree]:
        """The end of all ``high`` steps, whose segments begin at ``begins``, and the last step's loss and gradient."""
        at = begins[-1]
        loss, gradient = next(iter(at.weights.values())).new_zeros(()), at.weights
        for number in range((len(begins) - 1) * self._size(0, high), high):
            at, loss, gradient = self._advance(number, at)
        return at, loss, gradient

    def back(self, begins: list[Snapshot], end: Snapshot, low: int, high: int, back: Back) -> Back:
        """Back through steps ``low`` to ``high``, which have ended at ``end``: segment by segment, the last first."""
        size = self._size(low, high)
        segments = list(zip(range(low, high, size), begins, [*begins[1:], end], strict=True))
        for first, at, after in reversed(segments):
            stop = min(first + size, high)
            if stop - first == 1:
                back = self._through(first, at, after, back)
            else:
                back = self.back(self.begins(at, first, stop), after, first, stop, back)
        return back

    def _size(self, low: int, high: int) -> int:
        """The number of steps in a segment of these."""
        return -(-(high - low) // self.segments)

    def _advance(self, number: int, at: Snapshot) -> tuple[Snapshot, Tensor, Tree]:
        """The snapshot after one step, with the loss and the gradient before it."""
        set_generators(at.generators)
        problem, leaves, step, weights = self.problem, self.leaves, self.steps[number], as_leaves(at.weights)

        def inside() -> tuple[Snapshot, Tensor, Tree]:
            with summed_gradient(problem, step.losses, weights, leaves, graph=False) as (gradient, loss), torch.no_grad():
                new, state = step.present_dynamics().step(at.weights, gradient, leaves, at.state)
            return Snapshot(weights=new, state=state, generators=problem.generators()), loss, gradient

        return problem.call(weights, leaves, inside)

    def _through(self, number: int, at: Snapshot, end: Snapshot, back: Back) -> Back:
        """Back through one step from ``at`` to ``end``; its graph lives only here."""
        set_generators(at.generators)
        problem, leaves, step, w, state = (
            self.problem,
            self.leaves,
            self.steps[number],
            as_leaves(at.weights),
            _flat(at.state),
        )
        counts = {path: value for path, value in state.items() if path.startswith("step|")}  # without a graph in torch
        flat = as_leaves({path: value for path, value in state.items() if path not in counts})
        batched = next(iter(back.weights.values())).ndim > next(iter(w.values())).ndim

        def inside() -> Back:
            with summed_gradient(problem, step.losses, w, leaves, graph=True) as (gradient, _):
                weights, after = step.present_dynamics().step(w, gradient, leaves, _nested(counts | flat))
                outputs = {**_keyed("w", weights), **_keyed("s", _flat(after))}
                cotangents = {**_keyed("w", back.weights), **_keyed("s", back.state)}
                outputs = {key: value for key, value in outputs.items() if value.requires_grad and key in cotangents}
                inputs = {**_keyed("w", w), **_keyed("s", flat), **_keyed("l", leaves)}
                found = vjp(outputs, cotangents, inputs, batched=batched)
            before = problem.ranks.mean(trees.filled({name: found["w" + name] for name in w}, back.weights))
            return Back(
                weights=before,
                state={name: part for name in flat if (part := found["s" + name]) is not None},
                leaves={name: trees.sum_of(back.leaves[name], found["l" + name]) for name in leaves},
                norms=(*back.norms, _norm(before, w)),
                missed=torch.maximum(back.missed, _distance(end, weights, at)),
            )

        return problem.call(w, leaves, inside)


def _solution_of(back: Back, steps: int) -> Solution:
    """How it went, as a solution; the host looks once."""
    norms = torch.stack(back.norms)
    start = torch.where(norms[0] > 0, norms[0], 1.0)
    grown, missed = torch.stack([(norms[-1] / start).amax(), back.missed]).tolist()
    status, detail = Status.FINISHED, ""
    if not math.isfinite(grown):
        status, detail = Status.NON_FINITE_PRODUCT, "in the derivative of an inner step"
    elif not missed <= SAME:
        status = Status.REPLAY_DIFFERS if missed <= LOST else Status.REPLAY_LOST
        detail = f"they end {missed:.2g} times as far from where they ended before as they went"
    elif len(norms) - 1 < steps:
        status, detail = Status.REPLAY_DIFFERS, f"of {steps} steps {len(norms) - 1} are known"
    elif grown > GROWN:
        status, detail = Status.SENSITIVE, f"∂L_V/∂w grew {grown:.3g} times over {len(norms) - 1} steps"
    residuals = norms[1:] / start
    return Solution(value=back.weights, status=status, detail=detail, residuals=residuals, products=len(residuals), state={})


@torch.no_grad()
def _distance(end: Snapshot, found: Tree, start: Snapshot) -> Tensor:
    """‖end − found‖ relative to ‖end − start‖, of the weights."""
    missed = trees.norm({name: value - found[name] for name, value in end.weights.items()})
    went = trees.norm({name: value - start.weights[name] for name, value in end.weights.items()})
    return missed / torch.where(went > 0, went, 1.0)


def _norm(x: Tree, like: Tree) -> Tensor:
    """‖x‖, or R of them where x has a leading axis that ``like`` has not."""
    name, value = next(iter(x.items()))
    return vectors.norm(Layout.of(like).flatten(x, value.shape[: value.ndim - like[name].ndim]))


def _keyed(kind: str, x: Tree) -> Tree:
    return {kind + name: value for name, value in x.items()}


def _flat(state: State) -> Tree:
    """The state's floating-point entries as one dict; a separator that no name of torch's holds."""
    return {f"{key}|{name}": value for name, entries in state.items() for key, value in entries.items()}


def _nested(flat: Tree) -> State:
    state: State = {}
    for path, value in flat.items():
        key, name = path.split("|", 1)
        state.setdefault(name, {})[key] = value
    return state
