"""Slopes of the validation loss along directions of hyperparameters, by finite differences of real retraining."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from hoptim.diagnostics.evidence import Case
from hoptim.diagnostics.report import Direction
from hoptim.linalg import vectors
from hoptim.linalg.lanczos import gaussian
from hoptim.linalg.vectors import Layout, Tree
from hoptim.methods.inner_step import is_differentiable
from hoptim.methods.method import Method
from hoptim.methods.replay import Replay
from hoptim.methods.result import Hypergradient
from hoptim.methods.reverse import loss_at_end
from hoptim.methods.trajectory import Trajectory, look_ahead
from hoptim.problem.mixed_precision import epsilon_of_losses
from hoptim.problem.problem import Problem

End = Callable[[Tree], float]  # the validation loss after a training with these hyperparameters


def slopes(
    case: Case, method: Method, result: Hypergradient, inner: Optimizer, steps: int, count: int
) -> Iterator[Direction]:
    """Slopes, predicted and by central differences of retraining, each measured twice.

    They are along the hypergradient and ``count`` random directions; with a single number to learn there is no other one.
    """
    live = case.problem.leaves()
    layout = Layout.of(live)
    leaves, gradient = layout.flatten(live).detach(), layout.flatten(result.combined())
    lines = {"the hypergradient": vectors.unit(gradient)}
    lines |= {
        f"random direction {n + 1}": vectors.unit(gaussian(gradient, seed=n)) for n in range(min(count, layout.size - 1))
    }
    reach = float(epsilon_of_losses(*layout.dtypes) ** (1 / 3) * (1 + vectors.norm(leaves)))
    trainings = _trainings(case, method, inner, steps)
    for name, line in lines.items():
        found, values = [], []
        for end, epsilon in zip(trainings, (reach, reach / 2), strict=True):
            ends = [end(layout.unflatten(leaves + s * epsilon * line)) for s in (1, -1)]
            found.append((ends[0] - ends[1]) / (2 * epsilon))
            values += ends
        rounding = epsilon_of_losses(next(iter(case.problem.weights().values())).dtype) * max(map(abs, values)) / reach
        measured, noise = sum(found) / 2, abs(found[0] - found[1]) + rounding
        yield Direction(name=name, predicted=float(vectors.dot(gradient, line)), measured=measured, noise=noise)


def _trainings(case: Case, method: Method, inner: Optimizer, steps: int) -> tuple[End, End]:
    """Two trainings. Each has its batches and masks, the same for all hyperparameters with which it is repeated.

    A ``Replay`` knows its training: both are that one. Else it is the steps that would come next, twice, with other masks,
    and other batches if there are more.
    """
    if isinstance(method, Replay):
        with case.problem.untouched():
            its_own = _along(case, method.trajectory(case.problem, inner, case.loop.learned))
        return its_own, its_own
    make = _steps_ahead if is_differentiable(inner) else _steps_of_a_copy
    return make(case, inner, steps, 0), make(case, inner, steps, 1)


def _along(case: Case, trajectory: Trajectory) -> End:
    def end(leaves: Tree) -> float:
        with case.problem.untouched():
            return float(loss_at_end(case.problem, trajectory, leaves, case.val).mean())

    return end


def _steps_ahead(case: Case, inner: Optimizer, steps: int, seed: int) -> End:
    """Steps as pure functions."""
    assert case.loop.draw is not None
    with case.problem.untouched():
        torch.manual_seed(seed)
        return _along(case, look_ahead(case.problem, inner, case.loop.draw, steps, case.loop.learned))


def _steps_of_a_copy(case: Case, inner: Optimizer, steps: int, seed: int) -> End:
    """The optimizer's own steps, as of an LBFGS, on a copy of everything."""
    assert case.loop.draw is not None
    given, batches = case.problem, [case.loop.draw() for _ in range(steps)]
    takes_closure = "closure" in inspect.signature(inner.step).parameters

    def end(leaves: Tree) -> float:
        memo: dict[int, Any] = {}
        model, hparams = copy.deepcopy(given.model, memo), copy.deepcopy(given.hparams, memo)
        optimizer = object.__new__(type(inner))  # Optimizer's own way to copy leaves out what a subclass holds
        vars(optimizer).update(copy.deepcopy({key: value for key, value in vars(inner).items() if key != "step"}, memo))
        with torch.no_grad():
            for name, leaf in leaves.items():
                hparams.get_parameter(name).copy_(leaf)
        losses = given.train_loss, given.val_loss
        problem = Problem(model, hparams, *losses, has_aux=given.has_aux, process_group=given.process_group)
        with given.untouched():
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
            with problem.at() as at, at.loss("val_loss", case.val) as (loss, *_):
                return float(loss.detach().mean())

    return end
