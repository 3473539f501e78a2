"""Back through a few inner steps at once, with the graph of all of them, as meta-learning does it on small tasks.

Each step is taken once, where :mod:`hoptim.methods.reverse` repeats it. The memory is that of all graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.linalg.vjp import VJP
from hoptim.methods.result import Terms
from hoptim.methods.reverse import ended, keyed, norm
from hoptim.methods.trajectory import Trajectory, evaluated_losses
from hoptim.methods.validation_loss import validate
from hoptim.problem.problem import Problem, as_leaves
from hoptim.problem.random_stream import set_generators
from hoptim.solvers.solution import Solution, Status


def through_whole_graph(
    problem: Problem,
    trajectory: Trajectory,
    val_batch: object,
    *,
    first_order: bool,
    count: int | None = None,
    unseen: Sequence[str] = (),
) -> Terms:
    """dL_V/dλ at the end of the steps at a fixed start, and ∂L_V/∂w at the start as the solution.

    Buffers are carried from step to step with their graphs; running statistics have none.

    Args:
        problem: the problem, inside ``problem.leave_no_trace()``.
        trajectory: the steps.
        val_batch: the validation batch.
        first_order: whether ∇L_T counts as a constant in each step.
        count: K, if the weights of K models have a leading axis of K.
        unseen: the names of what the steps write without a derivative, though later losses read it.
    """
    at = trajectory.begins[0][1]
    leaves, start = as_leaves(problem.leaves()), as_leaves(at.weights)
    set_generators(at.generators)
    with ExitStack() as stack:
        w, state, buffers = start, at.state, at.modules.tensors
        for step in trajectory.steps:
            here = stack.enter_context(
                evaluated_losses(step, problem, w, leaves, buffers, None, graph=not first_order, with_statistics=False)
            )
            if not here.gradient:
                raise ValueError(f"the training loss touches none of the weights {list(w)}: compute it with the model")
            w, state = step.present_dynamics().step(here.weights, here.gradient, leaves, state)
            buffers = here.buffers
        carried = {name: t for name, t in buffers.items() if t.requires_grad}
        ends = as_leaves(carried)
        with problem.at(as_leaves(w), leaves, {**buffers, **ends}) as at_end:
            validation = validate(at_end, val_batch, ends)
        outputs = {**keyed("w", w), **keyed("b", {name: carried[name] for name in validation.by_buffer})}
        cotangents = {**keyed("w", validation.g), **keyed("b", validation.by_buffer)}
        found = VJP(outputs, {**keyed("w", start), **keyed("l", leaves)})(cotangents)
    begin = dicts.filled({name: found["w" + name] for name in start}, start)
    solution = _solution_of(begin, validation.g, count, unseen, len(trajectory.steps))
    indirect = {name: found["l" + name] for name in leaves}
    return Terms(validation, indirect, solution, here.loss, dicts.norm(dicts.map_tensors(Tensor.detach, here.gradient)))


def _solution_of(begin: Tensors, g: Tensors, count: int | None, unseen: Sequence[str], steps: int) -> Solution:
    """∂L_V/∂w at the start, of each of K models if there are several."""
    one = g if count is None else {name: t[0] for name, t in g.items()}
    start, end = (norm(x, one) for x in (begin, g))
    growth = start / torch.where(end > 0, end, 1.0)
    status, detail = ended(float(growth.amax()), steps, unseen)
    if status is Status.NON_FINITE_PRODUCT and count is not None:
        detail = f"task {int(growth.argmax()) + 1} of {count}: {detail}"
    return Solution(value=begin, status=status, detail=detail, residuals=growth[None], products=steps)
