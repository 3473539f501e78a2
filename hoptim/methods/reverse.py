"""Back through inner steps, from the last to the first: ∂L_V/∂w, ∂L_V/∂s and dL_V/dλ, with a graph of one step at a time.

If the training has already taken the steps, there are snapshots of its weights and state. Otherwise the steps are taken once
without a graph, and a snapshot is kept at the start of each of k segments. Then we go back segment by segment, the last one
first: each is divided into k segments again, until a segment is a single step. So for T steps about k·log_k T snapshots are
held at a time, and each step is repeated once on each level. With k = T all are held; with k = √T there are two levels.

Source: Griewank and Walther, "Evaluating Derivatives", section 12; Engstrom et al. 2025 (arXiv 2503.13751), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import dicts, vectors
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.linalg.vjp import VJP
from hoptim.methods.inner_step import InnerState
from hoptim.methods.result import Terms
from hoptim.methods.trajectory import Snapshot, Step, Trajectory, evaluated_losses
from hoptim.methods.unseen_writes import unseen_writes
from hoptim.methods.validation_loss import Validation, validate
from hoptim.problem.functional import Attributes, DifferentiableStatistics
from hoptim.problem.problem import ModuleState, Problem, as_leaves
from hoptim.problem.random_stream import set_generators
from hoptim.solvers.solution import Solution, Status

SAME = 1e-3  # how far a repeated step may end from where it ended before, relative to the length of the step
LOST = 0.5  # if all steps together end farther away than this, they are different steps
ULPS = 2.0  # how far two ways of computing a step may differ, in units in the last place
TRIED = 3  # on so many steps it is tried what is written without a derivative
SHOWN = 5  # names in a detail
GROWN = 10.0  # if ∂L_V/∂w grows more than this, training is sensitive to its start


def through_steps(
    problem: Problem, trajectory: Trajectory, segments: int, val_batch: Any, *, live: bool, expected: int
) -> Terms:
    """dL_V/dλ at the end of the steps, whose start is held fixed.

    Args:
        problem: the problem, inside ``problem.leave_no_trace()``.
        trajectory: the steps.
        segments: k.
        val_batch: the validation batch.
        live: whether the steps were taken in the training, and ended at the model's present weights.
        expected: how many steps there should be.
    """
    leaves, steps = as_leaves(problem.leaves()), len(trajectory.steps)
    reverse = Reverse(problem=problem, steps=trajectory.steps, leaves=leaves, segments=segments)
    if live:
        begins = [*trajectory.begins]
        end = Snapshot(weights=problem.weights(), state={}, modules=problem.module_state())
    else:
        begins = reverse.begins(0, trajectory.begins[0][1], steps)
        end = reverse.end(begins, steps)
    states = [*(at.modules for _, at in begins), end.modules]
    reverse = replace(reverse, moving=_moving([state.tensors for state in states]))
    unseen = reverse.unseen(begins, states, val_batch)
    validation = reverse.validate(end, val_batch)
    g = {name: validation.g[name] for name in end.weights}
    later = Derivatives(
        weights=g, state={}, buffers=validation.by_buffer, leaves=dict.fromkeys(leaves), norms=(norm(g, end.weights),)
    )
    later = reverse.through(begins, end, steps, later)
    assert later.last is not None  # there is one step at least
    loss, gradient = later.last
    indirect = problem.ranks.mean_of_found(later.leaves, leaves, validation.loss.shape)
    solution = _solution_of(later, expected, end.weights, begins[0][1].weights, sorted({*unseen, *later.unseen}))
    return Terms(validation, indirect, solution, loss, dicts.norm(gradient))


def loss_at_end(problem: Problem, trajectory: Trajectory, leaves: Tensors, val_batch: Any) -> Tensor:
    """The validation loss after the steps, taken with these hyperparameters."""
    reverse = Reverse(problem=problem, steps=trajectory.steps, leaves=as_leaves(leaves), segments=1)
    return reverse.validate(reverse.end(list(trajectory.begins[:1]), len(trajectory.steps)), val_batch).loss


def unseen_by_one_graph(problem: Problem, trajectory: Trajectory, val_batch: Any) -> list[str]:
    """What the steps write without a derivative, though later losses read it, if running statistics have none."""
    leaves, count = as_leaves(problem.leaves()), len(trajectory.steps)
    reverse = Reverse(problem=problem, steps=trajectory.steps, leaves=leaves, segments=count, with_statistics=False)
    begins = reverse.begins(0, trajectory.begins[0][1], count)
    states = [*(at.modules for _, at in begins), reverse.end(begins, count).modules]
    return replace(reverse, moving=_moving([state.tensors for state in states])).unseen(begins, states, val_batch)


def _moving(buffers: Sequence[Tensors]) -> tuple[str, ...]:
    """The floating-point buffers that change: those whose derivative is carried from step to step."""
    return tuple(
        name
        for name, t in buffers[0].items()
        if t.is_floating_point() and any(not dicts.is_same(t, later.get(name)) for later in buffers[1:])
    )


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """Derivatives after going back through some steps.

    Attributes:
        weights: ∂L_V/∂w.
        state: ∂L_V/∂s, of the inner optimizer's state.
        buffers: ∂L_V/∂b, of the buffers that the steps change.
        leaves: dL_V/dλ, through these steps.
        norms: ‖∂L_V/∂w‖ at the end and before each of the steps.
        missed: for each step, the distance between its ends now and before.
        went: for each step, its length before.
        off: the sum of the differences between these ends.
        last: the training loss and its gradient in the last of all steps.
        unseen: what a forward pass has written without a derivative: weights of embeddings with a ``max_norm``, and
            running statistics where :class:`DifferentiableStatistics` can't follow.
    """

    weights: Tensors
    state: Tensors
    buffers: Tensors
    leaves: OptionalTensors
    norms: tuple[Tensor, ...]
    missed: tuple[Tensor, ...] = ()
    went: tuple[Tensor, ...] = ()
    off: Tensors = field(default_factory=dict)
    last: tuple[Tensor, Tensors] | None = None
    unseen: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Reverse:
    """Takes the steps forwards without a graph, and goes back through them.

    Buffers are a part of the state that is carried from step to step; ``moving`` are those with a derivative. Running
    statistics are among them only ``with_statistics``.
    """

    problem: Problem
    steps: Sequence[Step]
    leaves: Tensors
    segments: int
    moving: tuple[str, ...] = ()
    with_statistics: bool = True

    def begins(self, low: int, at: Snapshot, high: int) -> list[tuple[int, Snapshot]]:
        """Number and snapshot of the first step of each segment from ``low`` to ``high``; the first snapshot is ``at``."""
        found, size = [(low, at)], -(-(high - low) // self.segments)
        for number in range(low, high - 1 - (high - low - 1) % size):
            at = self._advance(number, at)
            if (number + 1 - low) % size == 0:
                found.append((number + 1, at))
        return found

    def end(self, begins: list[tuple[int, Snapshot]], high: int) -> Snapshot:
        """The snapshot after step ``high − 1``, from the last of the segments."""
        low, at = begins[-1]
        for number in range(low, high):
            at = self._advance(number, at)
        return at

    def through(self, begins: list[tuple[int, Snapshot]], end: Snapshot, high: int, later: Derivatives) -> Derivatives:
        """Back through the steps before ``high``, which ended at ``end``: segment by segment, the last first."""
        for low, at in reversed(begins):
            if high - low == 1:
                later = self._through_one(low, at, end, later)
            else:
                later = self.through(self.begins(low, at, high), end, high, later)
            high, end = low, at
        return later

    def _advance(self, number: int, at: Snapshot) -> Snapshot:
        """The snapshot after one step."""
        set_generators(at.generators)
        problem, step, weights = self.problem, self.steps[number], as_leaves(at.weights)
        with (
            evaluated_losses(
                step,
                problem,
                weights,
                self.leaves,
                at.modules.tensors,
                at.modules.attributes,
                graph=False,
                with_statistics=False,
            ) as found,
            torch.no_grad(),
        ):
            base = dicts.map_tensors(Tensor.detach, found.weights)
            new, state = step.present_dynamics().step(base, found.gradient, self.leaves, at.state)
            tensors = {name: found.buffers[name].detach() for name in at.modules.tensors}
            attributes = Attributes(list(problem.joint.modules()))
            modules = ModuleState(tensors=dicts.shared(tensors, at.modules.tensors), attributes=attributes)
            return Snapshot(weights=new, state=state, modules=modules, generators=problem.generators())

    def validate(self, end: Snapshot, batch: Any) -> Validation:
        """The validation loss at the end and its derivatives, also in the buffers that the steps have changed."""
        problem, tensors = self.problem, end.modules.tensors
        weights = as_leaves({**problem.weights(), **end.weights})
        buffers = as_leaves({name: tensors[name] for name in self.moving})
        with (
            DifferentiableStatistics().around(problem.joint),
            problem.at(weights, self.leaves, tensors | buffers, end.modules.attributes) as at,
        ):
            return validate(at, batch, buffers)

    def unseen(self, begins: list[tuple[int, Snapshot]], states: Sequence[ModuleState], batch: Any) -> list[str]:
        """What steps write without a derivative, though losses read it: tried on some steps after which it has changed.

        Not on the first one if there are others: from a fixed start it writes the same, whatever the hyperparameters are.
        """
        plain = replace(self, moving=())
        changed = [
            begin
            for begin, before, after in zip(begins, states[:-1], states[1:], strict=True)
            if _moving([before.tensors, after.tensors]) or before.attributes.differing(after.attributes)
        ]
        later = [begin for begin in changed if begin[0]] or changed
        count = min(TRIED, max(self.problem.ranks.gathered(len(later))))
        found: set[str] = set()
        generators = self.problem.generators()
        for place in range(count):
            number, at = (later or begins)[place * len(later or begins) // count]
            step = self.steps[number]
            found |= {
                *unseen_writes(
                    self.problem,
                    step,
                    at,
                    self.leaves,
                    self.moving,
                    lambda end: plain.validate(end, batch).loss,
                    with_statistics=self.with_statistics,
                )
            }
        set_generators(generators)  # for the validation loss, which comes next
        return sorted(found)

    def _through_one(self, number: int, at: Snapshot, end: Snapshot, later: Derivatives) -> Derivatives:
        """Back through one step from ``at`` to ``end``; its graph lives only here."""
        set_generators(at.generators)
        problem, leaves, step = self.problem, self.leaves, self.steps[number]
        w, state = as_leaves(at.weights), _flat(at.state)
        counts = {path: value for path, value in state.items() if path.startswith("step|")}  # have no derivative
        flat = as_leaves({path: value for path, value in state.items() if path not in counts})
        buffers = as_leaves({name: at.modules.tensors[name] for name in self.moving})
        tensors = {**at.modules.tensors, **buffers}
        batched = next(iter(later.weights.values())).ndim > next(iter(w.values())).ndim
        with evaluated_losses(step, problem, w, leaves, tensors, at.modules.attributes, graph=True) as here:
            gradient = here.gradient
            if not gradient:
                raise ValueError(f"the training loss touches none of the weights {list(w)}: compute it with the model")
            weights, after = step.present_dynamics().step(here.weights, gradient, leaves, _nested(counts | flat))
            outputs = {**keyed("w", weights), **keyed("s", _flat(after)), **keyed("b", here.buffers)}
            cotangents = {**keyed("w", later.weights), **keyed("s", later.state), **keyed("b", later.buffers)}
            outputs = {key: value for key, value in outputs.items() if value.requires_grad and key in cotangents}
            inputs = {**keyed("w", w), **keyed("s", flat), **keyed("b", buffers), **keyed("l", leaves)}
            found = VJP(outputs, inputs)(cotangents, batched)
            written = {name for name, t in here.weights.items() if t is not w[name] and not dicts.is_same(t, w[name])}
            if here.statistics is not None and here.statistics.is_stale and self.moving:
                written.add("running statistics")
        off = _difference(end.weights, weights)
        before = problem.ranks.mean(dicts.filled({name: found["w" + name] for name in w}, later.weights))
        return Derivatives(
            weights=before,
            state={name: part for name in flat if (part := found["s" + name]) is not None},
            buffers={name: part for name in buffers if (part := found["b" + name]) is not None},
            leaves=dicts.add(later.leaves, {name: found["l" + name] for name in leaves}),
            norms=(*later.norms, norm(before, w)),
            missed=(*later.missed, dicts.norm(off)),
            went=(*later.went, dicts.norm(_difference(end.weights, at.weights))),
            off={name: later.off[name] + part for name, part in off.items()} if later.off else off,
            last=later.last or (here.loss, dicts.map_tensors(Tensor.detach, gradient)),
            unseen=later.unseen | (written if number else set()),  # the start is fixed, so nothing is missing there
        )


def _solution_of(later: Derivatives, steps: int, end: Tensors, begin: Tensors, unseen: Sequence[str]) -> Solution:
    """The solution of ``steps`` expected steps, from ``begin`` to ``end``; it reads from the device once.

    ``unseen`` are the names of what the steps write without a derivative.
    """
    norms, missed, went = map(torch.stack, (later.norms, later.missed, later.went))
    rounding = ULPS * max(torch.finfo(value.dtype).eps for value in end.values()) * dicts.norm(end)
    start = torch.where(norms[0] > 0, norms[0], 1.0)
    worst = _ratio((missed - rounding).clamp(min=0), went).amax()
    share = _ratio(dicts.norm(later.off), dicts.norm(_difference(end, begin)))
    grown, worst, share = torch.stack([(norms[-1] / start).amax(), worst, share]).tolist()
    status, detail = ended(grown, len(norms) - 1, unseen)
    if status is not Status.NON_FINITE_PRODUCT and not worst <= SAME:
        status = Status.REPLAY_DIFFERS if share <= LOST else Status.REPLAY_LOST
        detail = f"the distance between their ends now and before is {share:.2g} of how far they went"
    elif status is not Status.NON_FINITE_PRODUCT and len(norms) - 1 < steps:
        status, detail = Status.REPLAY_DIFFERS, f"of {steps} steps {len(norms) - 1} are known"
    residuals = norms[1:] / start
    return Solution(
        value=later.weights, status=status, detail=detail, residuals=residuals, products=len(residuals), state={}
    )


def ended(grown: float, steps: int, unseen: Sequence[str]) -> tuple[Status, str]:
    """How the way back through steps ended, on which ∂L_V/∂w grew so many times; ``unseen`` as above."""
    if not math.isfinite(grown):
        return Status.NON_FINITE_PRODUCT, "in the derivative of an inner step"
    if unseen:
        rest = f" and {len(unseen) - SHOWN} more" if len(unseen) > SHOWN else ""
        return Status.UNSEEN_WRITES, f"written: {', '.join(unseen[:SHOWN])}{rest}"
    if grown > GROWN:
        return Status.SENSITIVE, f"∂L_V/∂w grew {grown:.3g} times over {steps} steps"
    return Status.FINISHED, ""


def _difference(a: Tensors, b: Tensors) -> Tensors:
    return {name: value.detach() - b[name].detach() for name, value in a.items()}


def _ratio(missed: Tensor, went: Tensor) -> Tensor:
    return missed / torch.where(went > 0, went, 1.0)


def norm(x: Tensors, like: Tensors) -> Tensor:
    """‖x‖, or R of them if x has a leading axis of R, unlike ``like``."""
    name, value = next(iter(x.items()))
    return vectors.norm(Layout.of(like).flatten(x, value.shape[: value.ndim - like[name].ndim]))


def keyed(kind: str, x: Tensors) -> Tensors:
    """The tensors by names that begin with their kind."""
    return {kind + name: value for name, value in x.items()}


def _flat(state: InnerState) -> Tensors:
    """The state as one dict; no key of torch's optimizers holds the separator."""
    return {f"{key}|{name}": value for name, entries in state.items() for key, value in entries.items()}


def _nested(flat: Tensors) -> InnerState:
    state: InnerState = {}
    for path, value in flat.items():
        key, name = path.split("|", 1)
        state.setdefault(name, {})[key] = value
    return state
