"""Back through a few inner steps at once, with the graph of all of them, as meta-learning does it on small tasks.

Each step is taken once, where :mod:`hoptim.methods.reverse` repeats it. The memory is that of all graphs.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.linalg.vjp import VJP
from hoptim.methods.result import Terms
from hoptim.methods.reverse import GROWN
from hoptim.methods.trajectory import Trajectory, evaluated_losses
from hoptim.methods.validation_loss import validate
from hoptim.problem.problem import Problem, as_leaves
from hoptim.problem.random_stream import set_generators
from hoptim.solvers.solution import Solution, Status

NORMS, RUNNING = (F.batch_norm, F.instance_norm), ("running_mean", "running_var")


def through_whole_graph(problem: Problem, trajectory: Trajectory, val_batch: object, *, first_order: bool) -> Terms:
    """dL_V/dλ at the end of the steps at a fixed start, and ∂L_V/∂w at the start as the solution.

    Args:
        problem: the problem, inside ``problem.leave_no_trace()``.
        trajectory: the steps.
        val_batch: the validation batch.
        first_order: whether ∇L_T counts as a constant in each step.
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
            buffers = dicts.map_tensors(Tensor.detach, here.buffers)
        changed = _changed(buffers, at.modules.tensors)
        statistics = {name for name in changed if name.rpartition(".")[2] in RUNNING}
        others, mode = as_leaves({name: t for name, t in changed.items() if name not in statistics}), _StatisticsRead()
        noting = mode if statistics else nullcontext()
        with problem.at(as_leaves(w), leaves, buffers | others) as at_end, noting:
            validation = validate(at_end, val_batch, others)
        inputs = {**{("w", name): t for name, t in start.items()}, **{("l", name): t for name, t in leaves.items()}}
        found = VJP(w, inputs)(validation.g)
    begin = dicts.filled({name: found["w", name] for name in start}, start)
    read = [name for name, t in validation.by_buffer.items() if bool(t.any())]
    read += sorted(statistics) if mode.is_read else []
    solution = _solution_of(begin, validation.g, read, len(trajectory.steps))
    indirect = {name: found["l", name] for name in leaves}
    return Terms(validation, indirect, solution, here.loss, dicts.norm(dicts.map_tensors(Tensor.detach, here.gradient)))


class _StatisticsRead(TorchFunctionMode):
    """Notes whether a batch norm or an instance norm takes its running statistics, in which torch has no derivative."""

    is_read = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in NORMS:
            call = inspect.signature(func).bind(*args, **(kwargs or {}))
            call.apply_defaults()
            by_batch = call.arguments["training" if func is F.batch_norm else "use_input_stats"]
            self.is_read |= not by_batch and call.arguments["running_mean"] is not None
        return func(*args, **(kwargs or {}))


def _changed(now: Tensors, before: Tensors) -> Tensors:
    """The floating-point buffers that the steps have changed."""
    return {name: t for name, t in now.items() if t.is_floating_point() and not dicts.is_same(t, before.get(name))}


def _solution_of(begin: Tensors, g: Tensors, read: Sequence[str], steps: int) -> Solution:
    """∂L_V/∂w at the start; ``read`` are the buffers that the steps write and the validation loss reads."""
    length = dicts.norm(g)
    growth = dicts.norm(begin) / torch.where(length > 0, length, 1.0)
    grown, status, detail = float(growth), Status.FINISHED, ""
    if not math.isfinite(grown):
        status, detail = Status.NON_FINITE_PRODUCT, "in the derivative of the inner steps"
    elif read:
        status, detail = Status.UNSEEN_WRITES, f"written: {', '.join(read)}"
    elif grown > GROWN:
        status, detail = Status.SENSITIVE, f"∂L_V/∂w grew {grown:.3g} times over {steps} steps"
    return Solution(value=begin, status=status, detail=detail, residuals=growth[None], products=steps)
