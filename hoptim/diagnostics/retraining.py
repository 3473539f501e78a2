"""Slopes of the validation loss along directions of hyperparameters, by finite differences of real retraining."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from hoptim.diagnostics.evidence import Setup
from hoptim.diagnostics.report import Direction
from hoptim.linalg import vectors
from hoptim.linalg.random import gaussian_like
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.methods.kinds import is_differentiable
from hoptim.methods.method import Method
from hoptim.methods.replay import Replay
from hoptim.methods.result import Hypergradient
from hoptim.methods.reverse import loss_at_end
from hoptim.methods.trajectory import Trajectory, look_ahead
from hoptim.problem.problem import Problem

End = Callable[[Tensors], float]  # the validation loss after a training with these hyperparameters


def slopes(
    setup: Setup, method: Method, result: Hypergradient, inner: Optimizer, steps: int, count: int
) -> Iterator[Direction]:
    """Slopes, predicted and by central differences of retraining, each measured twice.

    They are along the hypergradient and ``count`` random directions; with a single number to learn there is no other one.
    """
    live = setup.problem.leaves()
    layout = Layout.of(live)
    leaves, gradient = layout.flatten(live).detach(), layout.flatten(result.combined())
    lines = {"the hypergradient": vectors.unit(gradient)}
    lines |= {
        f"random direction {n + 1}": vectors.unit(gaussian_like(gradient, seed=n))
        for n in range(min(count, layout.size - 1))
    }
    reach = float(setup.problem.rounding(layout.dtypes) ** (1 / 3) * (1 + vectors.norm(leaves)))
    trainings = _trainings(setup, method, inner, steps)
    eps = setup.problem.rounding([next(iter(setup.problem.weights().values())).dtype])
    for name, line in lines.items():
        found, values = [], []
        for end, epsilon in zip(trainings, (reach, reach / 2), strict=True):
            ends = [end(layout.unflatten(leaves + s * epsilon * line)) for s in (1, -1)]
            found.append((ends[0] - ends[1]) / (2 * epsilon))
            values += ends
        rounding = eps * max(map(abs, values)) / reach
        measured, noise = sum(found) / 2, abs(found[0] - found[1]) + rounding
        yield Direction(name=name, predicted=float(vectors.dot(gradient, line)), measured=measured, noise=noise)


def _trainings(setup: Setup, method: Method, inner: Optimizer, steps: int) -> tuple[End, End]:
    """Two trainings. Each has its batches and masks, the same for all hyperparameters with which it is repeated.

    A ``Replay`` knows its training: both are that one. Else it is the steps that would come next, twice, with other masks,
    and other batches if there are more.
    """
    if isinstance(method, Replay):
        with setup.problem.leave_no_trace():
            its_own = _along(setup, method.trajectory(setup.problem, inner, setup.loop.learned))
        return its_own, its_own
    make = _steps_ahead if is_differentiable(inner) else _steps_of_a_copy
    return make(setup, inner, steps, 0), make(setup, inner, steps, 1)


def _along(setup: Setup, trajectory: Trajectory) -> End:
    def end(leaves: Tensors) -> float:
        with setup.problem.leave_no_trace():
            return float(loss_at_end(setup.problem, trajectory, leaves, setup.val).mean())

    return end


def _steps_ahead(setup: Setup, inner: Optimizer, steps: int, seed: int) -> End:
    """Steps as pure functions."""
    assert setup.loop.draw is not None
    with setup.problem.leave_no_trace():
        torch.manual_seed(seed)
        return _along(setup, look_ahead(setup.problem, inner, setup.loop.draw, steps, setup.loop.learned))


def _steps_of_a_copy(setup: Setup, inner: Optimizer, steps: int, seed: int) -> End:
    """The optimizer's own steps, as of an LBFGS, on a copy of everything."""
    assert setup.loop.draw is not None
    given, batches = setup.problem, [setup.loop.draw() for _ in range(steps)]
    takes_closure = "closure" in inspect.signature(inner.step).parameters

    def end(leaves: Tensors) -> float:
        memo: dict[int, Any] = {}
        model, hparams = copy.deepcopy(given.model, memo), copy.deepcopy(given.hparams, memo)
        optimizer = object.__new__(type(inner))  # Optimizer's own way to copy leaves out what a subclass holds
        vars(optimizer).update(copy.deepcopy({key: value for key, value in vars(inner).items() if key != "step"}, memo))
        with torch.no_grad():
            for name, leaf in leaves.items():
                hparams.get_parameter(name).copy_(leaf)
        losses = given.train_loss, given.val_loss
        problem = Problem(model, hparams, *losses, has_aux=given.has_aux, process_group=given.process_group)
        with given.leave_no_trace():
            torch.manual_seed(seed)
            for batch in batches:

                def closure(batch: Any = batch) -> Any:
                    optimizer.zero_grad()
                    found = problem.loss(batch)
                    loss = found[0] if problem.has_aux else found
                    loss.backward()
                    return loss

                if takes_closure:
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            with problem.at() as at, at.loss("val_loss", setup.val) as (loss, *_):
                return float(loss.detach().mean())

    return end
