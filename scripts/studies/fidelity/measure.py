"""Measure a method on a problem: cosine and length against the true hypergradient, cost in training gradients."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from studies.fidelity.methods import Entry
from studies.fidelity.problems import Batch, Setup, Spec
from studies.fidelity.truth import Trained, Tree

import hoptim
from hoptim.methods.method import TrainingContext
from hoptim.methods.trajectory import Recorder, Trajectory
from hoptim.problem.kept import noted

AT_LEAST = 2e-3  # seconds of training gradients that one measurement of the unit of cost takes


class Case:
    """A trained problem in float32, with its true hypergradient computed in float64."""

    def __init__(self, spec: Spec, seed: int, root: Path, found: Trained, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.found = spec, found
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
            recorder = Recorder()
            for back in reversed(range(self.spec.lag)):
                self.inner.zero_grad()
                batch = noted(self.batch(back))
                recorded = recorder.record_loss(self.problem, self.inner, batch) if back < kept_steps else None
                loss = self.problem.loss(batch.batch)
                if recorded is not None:
                    loss.register_hook(recorded)
                loss.backward()
                self.inner.step()
                if back < kept_steps:
                    recorder.stepped()
            self._trajectory = recorder.trajectory(self.problem.weights())
        else:
            self.put(self.found.weights, self.found.velocity)
        return state

    def measured(self, entry: Entry) -> dict[str, Any]:
        """Run the method with the state that it would have in a training.

        Its cost is its CPU time over that of a training gradient, measured just before and after it. A failed solve moves
        nothing, so its cosine and length are 0.
        """
        state = self.before(entry)
        unit, results = seconds(self._unit, AT_LEAST), []
        taken = seconds(lambda: results.append(self.hypergradient(entry, state)), 0.0)
        unit += seconds(self._unit, AT_LEAST)
        solution = results[-1].solution
        cosine, length = compared(results[-1].grads, self.found.truth) if solution.status.ok else (0.0, 0.0)
        return {
            "cosine": cosine, "length": length, "cost": 2 * taken / unit, "products": solution.products,
            "status": solution.status.name, "ok": solution.status.ok,
        }  # fmt: skip


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
