"""Measure a method on a problem: cosine and length against the true hypergradient, cost in training gradients."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from studies.fidelity.methods import Entry
from studies.fidelity.problems import Batch, Spec
from studies.fidelity.truth import Tensors, Trained

import hoptim

AT_LEAST = 2e-3  # seconds


class Case:
    """A trained problem in float32, with its true hypergradient computed in float64."""

    def __init__(self, spec: Spec, seed: int, root: Path, found: Trained, dtype: torch.dtype = torch.float32) -> None:
        self.spec, self.found, self.setup = spec, found, spec.make(seed, dtype, root)
        self._batch_at, self.problem = spec.batches(self.setup, seed), self.setup.problem
        self.weights = list(self.problem.weights().values())

    def batch(self, steps_back: int = 0) -> Batch:
        """The last training batch, or the one some steps before it."""
        return self._batch_at(self.spec.training.steps - 1 - steps_back)

    def optimizer(self, entry: Entry, weights: Tensors, velocity: Tensors) -> hoptim.BilevelOptimizer:
        """An optimizer at these weights. Its outer rate is 0, so that a hyperstep changes nothing.

        A method that averages batches takes those before the last.
        """
        training = self.spec.training
        inner = torch.optim.SGD(self.weights, lr=training.lr, momentum=training.momentum)
        self.put(inner, weights, velocity)
        outer = torch.optim.SGD(self.problem.hparams.parameters(), lr=0.0)
        train_batches = [self.batch(back) for back in range(1, 5)]
        options = {"train_batches": train_batches, "hypergradient": entry.on(self.problem.model, [self.setup.train])}
        return hoptim.BilevelOptimizer(
            inner, outer, self.problem, val_batches=[self.setup.val], every=self.spec.lag, warmup=0, **options
        )

    def put(self, inner: torch.optim.SGD, weights: Tensors, velocity: Tensors) -> None:
        """Set the weights and the momentum."""
        with torch.no_grad():
            for name, p in self.problem.weights().items():
                p.copy_(weights[name])
                inner.state[p]["momentum_buffer"] = velocity[name].to(p.dtype, copy=True)

    def hyperstep(self, entry: Entry) -> hoptim.Record:
        """The hyperstep at the end of the training, with what the method has from before it.

        That is a step size or a solution of the last hyperstep, or the last inner steps, which are taken again.
        """
        now, before = (self.found.weights, self.found.velocity), (self.found.earlier, self.found.earlier_velocity)
        if entry.method.keeps_steps:
            optimizer = self.optimizer(entry, *before)
            for back in reversed(range(self.spec.lag)):
                optimizer.zero_grad()
                optimizer.loss(self.batch(back)).backward()
                optimizer.step()  # the last one has the hyperstep
            return optimizer.record
        optimizer = self.optimizer(entry, *(before if entry.carries else now))
        if entry.carries:
            optimizer.hyperstep(self.batch(self.spec.lag), self.setup.val)
            self.put(optimizer.inner, *now)
        return optimizer.hyperstep(self.batch(), self.setup.val)

    def measured(self, entry: Entry) -> dict[str, Any]:
        """Run the method as it would be in a training, at its end.

        Its cost is the time of the hyperstep over that of a training gradient, measured just before and after it. A failed
        solve moves nothing, so its cosine and length are 0.
        """
        unit = self.seconds_of_a_gradient()
        record = self.hyperstep(entry)
        unit += self.seconds_of_a_gradient()
        solution = record.result.solution
        cosine, length = compared(record.result.grads, self.found.truth) if solution.status.ok else (0.0, 0.0)
        return {
            "cosine": cosine, "length": length, "cost": 2 * record.seconds / unit, "products": solution.products,
            "status": solution.status.name, "ok": solution.status.ok,
        }  # fmt: skip

    def seconds_of_a_gradient(self) -> float:
        """The mean of as many training gradients as take 2 ms."""
        begun, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begun < AT_LEAST:
            torch.autograd.grad(self.problem.loss(self.batch()), self.weights)
            count += 1
        return (time.perf_counter() - begun) / count


def compared(found: Tensors, truth: Tensors) -> tuple[float, float]:
    """cos(found, truth) and ‖found‖ / ‖truth‖ over all hyperparameters; the cosine of a zero vector is 0."""
    a = torch.cat([found[name].double().flatten() for name in truth])
    b = torch.cat([value.double().flatten() for value in truth.values()])
    lengths = float(a.norm()), float(b.norm())
    return (float(a @ b) / math.prod(lengths) if all(lengths) else 0.0), lengths[0] / lengths[1]


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
