"""Measure a method on a problem: cosine and length against the true hypergradient, cost in training gradients."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch

import hoptim
from fidelity_problems.methods import Entry
from fidelity_problems.problems import Batch, Setup, Spec
from fidelity_problems.truth import Trained, Tree
from hoptim.methods.method import TrainingContext
from hoptim.methods.trajectory import Trajectory
from hoptim.training.recent_steps import RecentSteps

AT_LEAST = 2e-3  # seconds of training gradients that one measurement of the unit of cost takes


@dataclass(frozen=True, kw_only=True)
class Row:
    """The result of a method on a problem and a seed. A failed solve moves nothing, so its cosine and length are 0."""

    problem: str
    method: str
    seed: int
    cosine: float
    length: float
    cost: float
    products: int
    status: str
    ok: bool


class Case:
    """A trained problem in float32, with its true hypergradient computed in float64."""

    def __init__(
        self, name: str, spec: Spec, seed: int, root: Path, found: Trained, dtype: torch.dtype = torch.float32
    ) -> None:
        self.name, self.spec, self.seed, self.found = name, spec, seed, found
        self.setup: Setup = spec.make(seed, dtype, root)
        self._batch_at = spec.batches(self.setup, seed)
        self._trajectory: Trajectory | None = None
        self._unit: Callable[[], Any] = lambda: torch.autograd.grad(self.problem.loss(self.batch()), self.weights)

    @property
    def problem(self) -> hoptim.Problem:
        return self.setup.problem

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        return list(self.problem.weights().values())

    def batch(self, steps_back: int = 0) -> Batch:
        """The last training batch, or the one some steps before it."""
        return self._batch_at(self.spec.training.steps - 1 - steps_back)

    def hypergradient(self, entry: Entry, state: Any = None, steps_back: int = 0) -> hoptim.Hypergradient:
        back = itertools.count(steps_back + 1)
        loop = TrainingContext(inner=self.inner, draw=lambda: self.batch(next(back)), trajectory=self._trajectory)
        return entry.method(self.problem, self.batch(steps_back), self.setup.val, state, loop)

    @cached_property
    def inner(self) -> torch.optim.SGD:
        """The inner optimizer; :meth:`put` sets its momentum."""
        training = self.spec.training
        return torch.optim.SGD(self.weights, lr=training.lr, momentum=training.momentum)

    def put(self, weights: Tree, velocity: Tree) -> None:
        """Set the weights and the inner optimizer's momentum."""
        with torch.no_grad():
            for name, p in self.problem.weights().items():
                p.copy_(weights[name])
                self.inner.state[p]["momentum_buffer"] = velocity[name].to(p.dtype, copy=True)

    def before(self, entry: Entry) -> Any:
        """Make what the method needs from before this hyperstep: the state of the last hyperstep, or the last inner steps.

        These steps are taken again from the earlier weights, so that the model ends at its trained weights.
        """
        self._trajectory, state = None, None
        kept_steps = entry.method.keeps_steps
        if entry.carries or kept_steps:
            self.put(self.found.earlier, self.found.earlier_velocity)
        if entry.carries:
            state = self.hypergradient(entry, None, self.spec.lag).solution.state
        if kept_steps:
            recent = RecentSteps()
            for back in reversed(range(self.spec.lag)):
                self.inner.zero_grad()
                batch, start, generators = self.batch(back), None, None
                if back < kept_steps:
                    start, generators = recent.step_start(self.problem, self.inner), self.problem.generators()
                seen = recent.before_loss(batch, generators=generators, start=start)
                loss = self.problem.loss(batch)
                recent.after_loss(seen, loss)
                loss.backward()
                self.inner.step()
                recent.stepped()
            self._trajectory = recent.trajectory(self.problem.weights())
        else:
            self.put(self.found.weights, self.found.velocity)
        return state

    def measured(self, entry: Entry, method: str, repeats: int = 1) -> Row:
        """Run the method with the state that it would have in a training.

        Its cost is its CPU time over that of a training gradient, measured just before and after it: the median of
        ``repeats`` measurements.
        """
        state = self.before(entry)
        ratios, results = [], []
        for _ in range(repeats):
            before = seconds(self._unit, AT_LEAST)
            taken = seconds(lambda: results.append(self.hypergradient(entry, state)), 0.0)
            ratios.append(2 * taken / (before + seconds(self._unit, AT_LEAST)))
        solution = results[-1].solution
        cosine, length = compared(results[-1].grads, self.found.truth) if solution.status.ok else (0.0, 0.0)
        return Row(
            problem=self.name,
            method=method,
            seed=self.seed,
            cosine=cosine,
            length=length,
            cost=median(ratios),
            products=solution.products,
            status=solution.status.name,
            ok=solution.status.ok,
        )


def compared(found: Tree, truth: Tree) -> tuple[float, float]:
    """cos(found, truth) and ‖found‖ / ‖truth‖ over all hyperparameters; the cosine of a zero vector is 0."""
    a = torch.cat([found[name].double().flatten() for name in truth])
    b = torch.cat([value.double().flatten() for value in truth.values()])
    lengths = float(a.norm()), float(b.norm())
    return (float(a @ b) / math.prod(lengths) if all(lengths) else 0.0), lengths[0] / lengths[1]


def seconds(call: Callable[[], Any], at_least: float) -> float:
    """CPU seconds of a call: the mean of as many calls as take ``at_least`` seconds."""
    begun, count = time.process_time(), 0
    while not count or time.process_time() - begun < at_least:
        call()
        count += 1
    return (time.process_time() - begun) / count


def kept(name: str, spec: Spec, seed: int, root: Path, folder: Path) -> Trained:
    """The trained weights and the true hypergradient, read from ``folder`` or computed and written there."""
    path, key = folder / f"{name}-{seed}.pt", f"{spec.training} {spec.lag} {spec.version}"
    if path.is_file():
        held = torch.load(path, weights_only=True)
        if held.pop("key") == key:
            return Trained(**held)
    found = spec.trained(seed, root)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"key": key, **asdict(found)}, partial)
    partial.rename(path)
    return found
