"""All that changes while a BilevelOptimizer runs, in one object, which whoever copies its ``__dict__`` still shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hoptim.linalg.trees import Tree
from hoptim.methods.replay import Recorder
from hoptim.problem.data import MicroBatches
from hoptim.problem.problem import Problem
from hoptim.solvers.solution import State, Status
from hoptim.training.record import Record, cosine

_WHOLE = torch.ones(())
_Seen = tuple[int, Any, Tensor]  # backward passes run last loss first: its number, the batch, and its share


class Window:
    """The training batches of one inner step: those whose losses went backward since the gradients were cleared.

    They are kept until the next ones come, since a hyperstep follows the step, at once or later by hand.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._next: list[_Seen] = []  # the last one that has not gone backward yet, if there is one
        self._cleared = self._stepped = True
        self._number = 0

    def saw(self, batch: Any, loss: Tensor) -> None:
        """``loss`` is that of a training batch: it counts once its backward pass is begun, with what that is begun with."""
        self._number += 1
        self._next = waiting = [(self._number, batch, _WHOLE)]

        def counted(share: Tensor) -> None:
            if not waiting:
                return
            if self._cleared:
                self._seen, self._cleared, self._stepped = [], False, False
            number, batch, _ = waiting.pop()  # a loss that is kept for a log shall not keep its batch
            self._seen.append((number, batch, share))

        loss.register_hook(counted)

    def noted(self, batch: Any) -> None:
        """A training batch of a step that no hyperstep is due after; quicker than :meth:`saw`, and each counts alike."""
        if self._stepped:
            self._seen, self._cleared, self._stepped = [], False, False
        if not (self._seen and self._seen[-1][1] is batch):  # as a closure does that is called again and again
            self._number += 1
            self._seen.append((self._number, batch, _WHOLE))

    def cleared(self) -> None:
        """The gradients were cleared: the next loss that goes backward begins anew."""
        self._cleared = True

    def stepped(self) -> None:
        """The gradients were used."""
        if self._cleared and self._next:  # they came in another way than by a backward pass
            self._seen = self._next
        self._next, self._cleared, self._stepped = [], True, True

    def batch(self) -> Any:
        """The batch, or several as one.

        Raises:
            ValueError: none was seen.
        """
        seen = sorted(self._next if self._cleared and self._next else self._seen, key=lambda one: one[0])
        if not seen:
            raise ValueError(
                "a hyperstep needs a training batch and none has been seen: compute the loss with optimizer.loss(batch), "
                "or give train_batches"
            )
        if len(seen) == 1:
            return seen[0][1]
        shares = torch.stack([share.to(torch.promote_types(share.dtype, torch.float32)) for _, _, share in seen])
        total = shares.abs().sum()
        return MicroBatches(tuple(batch for _, batch, _ in seen), shares / torch.where(total > 0, total, 1.0))


@dataclass
class Progress:
    """Counters, the last record, the last batches, what the solver carries, and the steps kept for unrolling."""

    inner_steps: int = 0
    hyper_steps: int = 0
    solver_state: State = field(default_factory=dict)
    last_gradient: Tree = field(default_factory=dict)
    record: Record | None = None
    window: Window = field(default_factory=Window)
    warned: set[Status] = field(default_factory=set)
    left: list[tuple[str, str]] = field(default_factory=list)  # what neither optimizer held, and was warned of
    recorder: Recorder = field(default_factory=Recorder)

    def cleared(self) -> None:
        """The gradients were cleared."""
        self.window.cleared()
        self.recorder.cleared()

    def stepped(self) -> None:
        """An inner step was taken."""
        self.inner_steps += 1
        self.window.stepped()
        self.recorder.stepped()

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


def is_cleared(inner: Optimizer) -> bool:
    """Whether no weight has a gradient, as after the model's own ``zero_grad()``."""
    return all(p.grad is None for group in inner.param_groups for p in group["params"])


def is_due(step: int, every: int | None, warmup: int) -> bool:
    """Whether a hyperstep follows inner step number ``step``."""
    return every is not None and step >= warmup and step % every == 0


def is_kept(step: int, every: int | None, warmup: int, steps: int) -> bool:
    """Whether inner step number ``step`` is among the last ``steps`` before a hyperstep."""
    return any(is_due(later, every, warmup) for later in range(step, step + steps))
