"""All that changes while a BilevelOptimizer runs, in one object, which whoever copies its ``__dict__`` still shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hoptim.problem import Problem
from hoptim.record import Record, cosine
from hoptim.solvers.base import State, Status
from hoptim.trajectory import Recorder
from hoptim.trees import Tree


@dataclass
class Progress:
    """Counters, the last record, the last batch, what the solver carries, and the steps kept for unrolling."""

    inner_steps: int = 0
    hyper_steps: int = 0
    solver_state: State = field(default_factory=dict)
    last_gradient: Tree = field(default_factory=dict)
    record: Record | None = None
    last_batch: Any = None
    seen_batch: bool = False
    warned: set[Status] = field(default_factory=set)
    recorder: Recorder = field(default_factory=Recorder)

    def saw(self, batch: Any) -> None:
        """A training loss of ``batch`` is about to be computed."""
        self.last_batch, self.seen_batch = batch, True

    def turned(self, gradient: Tree) -> float | None:
        """The cosine between this hypergradient and the last one, which it becomes; ``None`` if there is none like it."""
        last, self.last_gradient = self.last_gradient, gradient
        if {name: value.shape for name, value in last.items()} != {name: value.shape for name, value in gradient.items()}:
            return None
        return cosine(gradient, {name: value.to(gradient[name]) for name, value in last.items()})

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as tensors and plain values."""
        return {
            "inner_steps": self.inner_steps,
            "hyper_steps": self.hyper_steps,
            "solver_state": {kind: dict(tree) for kind, tree in self.solver_state.items()},
            "last_gradient": dict(self.last_gradient),
            "trajectory": self.recorder.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any], problem: Problem, inner: Optimizer) -> None:
        """The other half; names that the model no longer has are dropped. Version 1 carried one vector of one kind."""
        self.inner_steps, self.hyper_steps = saved["inner_steps"], saved["hyper_steps"]
        carried = saved["solver_state"] if saved["version"] > 1 else {"direction": saved["solver_state"]}
        weights, leaves = problem.weights(), problem.leaves()
        self.solver_state = {kind: _beside(tree, weights) for kind, tree in carried.items()}
        last = _beside(saved.get("last_gradient", {}), leaves)
        self.last_gradient = last if set(last) == set(leaves) else {}
        self.recorder.load_state_dict(saved.get("trajectory"), weights, inner)


@contextmanager
def bound_options_kept(inner: Optimizer, leaves: Tree) -> Iterator[None]:
    """Options of the optimizer that are hyperparameters stay these very tensors, though its groups are loaded anew."""
    memory = {leaf.data_ptr() for leaf in leaves.values()}

    def is_bound(option: Any) -> bool:
        if isinstance(option, (tuple, list)):
            return any(is_bound(member) for member in option)
        return isinstance(option, Tensor) and option.data_ptr() in memory

    kept = [{key: v for key, v in group.items() if key != "params" and is_bound(v)} for group in inner.param_groups]
    yield
    for group, options in zip(inner.param_groups, kept, strict=False):
        group.update(options)


def _beside(saved: Tree, live: Tree) -> Tree:
    """On the devices of the tensors of the same names."""
    return {name: value.to(live[name].device) for name, value in saved.items() if name in live}


def is_due(step: int, every: int | None, warmup: int) -> bool:
    """Whether a hyperstep follows inner step number ``step``."""
    return every is not None and step >= warmup and step % every == 0


def is_kept(step: int, every: int | None, warmup: int, steps: int) -> bool:
    """Whether inner step number ``step`` is among the last ``steps`` before a hyperstep."""
    return any(is_due(later, every, warmup) for later in range(step, step + steps)) if every is not None else False
