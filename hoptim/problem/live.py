"""First derivatives of a sharded model as it trains: torch gathers each layer when it runs, and no whole model is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.problem.distributed import Ranks
from hoptim.problem.functional import restore_attributes, swapped
from hoptim.problem.mixed_precision import losses_precision
from hoptim.problem.problem import At, LossName, Problem, as_leaves
from hoptim.problem.random_stream import set_generators
from hoptim.problem.sharding import local, types_of_policies


class Move(NamedTuple):
    """w ↦ w + εv for some of the weights, rounded to their types after the sum."""

    v: Tensors
    epsilon: Tensor | float

    def of(self, weights: Tensors) -> Tensors:
        """The weights after the move."""
        return {name: self.of_one(name, w) if name in self.v else w for name, w in weights.items()}

    def of_one(self, name: str, w: Tensor) -> Tensor:
        """One of them."""
        return (w + (self.epsilon * self.v[name]).to(w.device)).to(w.dtype)


class Gradients(NamedTuple):
    """A loss of this rank, the shards of its mean gradient over the ranks, and this rank's gradient in the hyperparameters.

    Of R losses each has a leading axis of R.
    """

    loss: Tensor
    by_weight: OptionalTensors
    by_leaf: OptionalTensors


@dataclass(frozen=True, kw_only=True)
class LiveAt(At):
    """A sharded problem at its live weights, with other hyperparameters; made by :func:`at_live`.

    ``weights`` are the shards that this rank holds, in the memory of the live ones.
    """

    @property
    def shards(self) -> Tensors:
        """The part of each weight that this rank holds."""
        return self.weights

    def norm(self, layout: Layout) -> Callable[[Tensor], Tensor]:
        """‖v‖ over all ranks of flat vectors of these shards."""
        assert self.sharding is not None
        return self.sharding.vectors(layout).norm

    def gradients(self, name: LossName, batch: Any, move: Move | None = None, states: Tensors | None = None) -> Gradients:
        """The gradients of a loss, by a forward and a backward pass as in training; of R losses, by R of them.

        Args:
            name: which loss.
            batch: its batch.
            move: from the live weights to where they are computed; default: none.
            states: of the random generators; default: the present ones.
        """
        first = self._backward(name, batch, 0, move, states)
        if not first.loss.ndim:
            return first
        rows = [first, *(self._backward(name, batch, row, move, states) for row in range(1, len(first.loss)))]
        return Gradients(
            first.loss, dicts.stack([row.by_weight for row in rows]), dicts.stack([row.by_leaf for row in rows])
        )

    def _backward(self, name: LossName, batch: Any, row: int, move: Move | None, states: Tensors | None) -> Gradients:
        """The losses and the gradients of one of them."""
        problem = self.problem
        live, leaves = problem._live, as_leaves(self.leaves)
        assert live is not None, "for use inside at_live"
        given = {f"hparams.{key}": leaf for key, leaf in leaves.items()} | {
            key: t.clone() for key, t in self.buffers.items()
        }
        with (
            problem.leave_no_trace(),
            _moved(self.weights, move),
            _own_gradients(problem.weights()) as weights,
            swapped(problem.joint, live.parts, given),
            restore_attributes(live.parts),
        ):
            set_generators(states or {})
            with losses_precision(live.lowered):
                losses, _ = problem._losses(name, batch)
            losses.reshape(-1)[row].backward()
            by_weight = _shards_of_gradients(weights, problem.ranks)
        return Gradients(losses.detach(), by_weight, {key: leaf.grad for key, leaf in leaves.items()})


def _shards_of_gradients(weights: Tensors, ranks: Ranks) -> OptionalTensors:
    """The shards of the ``.grad`` of live weights. FSDP2 has averaged those of its own; of plain weights nobody has."""
    plain = {name: w for name, w in weights.items() if not hasattr(w, "device_mesh")}
    found = ranks.mean_of_found({name: w.grad for name, w in plain.items()}, plain) if plain else {}
    sharded: dict[str, Any] = {name: w for name, w in weights.items() if name not in plain}
    for name, w in sharded.items():
        placed = None if w.grad is None else w.grad.redistribute(placements=w.placements)  # they may be partial sums
        found[name] = None if placed is None else local(placed).detach()
    return {name: found[name] for name in weights}


@contextmanager
def at_live(problem: Problem) -> Iterator[LiveAt]:
    """Inside, first derivatives of a sharded model as it trains, with torch's own hooks and without whole weights.

    Raises:
        TypeError: the hooks compute in lower precision than that of the shards.
    """
    with problem.looked_up() as live:
        weights = {name: local(w.detach()) for name, w in problem.weights().items()}
        _check_precision(types_of_policies(live.parts), {w.dtype for w in weights.values()})
        yield LiveAt(problem=problem, weights=weights, leaves=as_leaves(problem.leaves()), buffers=live.buffers)


def _check_precision(computed: set[torch.dtype], held: set[torch.dtype]) -> None:
    """Raise ``TypeError`` if something is computed in a type that is less precise than those of the shards."""
    least = max(torch.finfo(dtype).eps for dtype in held)
    if lower := [dtype for dtype in computed if torch.finfo(dtype).eps > least]:
        raise TypeError(
            f"FiniteDifference runs the model by the hooks of fully_shard, whose MixedPrecisionPolicy casts to {lower[0]}: "
            "its differences would be those of rounding errors. Take hoptim.Exact() or hoptim.GaussNewton(), which compute "
            "in the type of the shards, or train without the policy, under an autocast that ends before optimizer.step()"
        )


@contextmanager
def _moved(weights: Tensors, move: Move | None) -> Iterator[None]:
    """Inside, the weights are where the move takes them; afterwards they are as before, to the bit."""
    before = {} if move is None else {name: weights[name].clone() for name in move.v}
    try:
        for name, w in before.items():
            assert move is not None
            weights[name].data.copy_(move.of_one(name, w))  # .data, so that no graph sees a change
        yield
    finally:
        for name, w in before.items():
            weights[name].data.copy_(w)


@contextmanager
def _own_gradients(weights: Tensors) -> Iterator[Tensors]:
    """Inside, the weights have no gradients yet; afterwards, those that they had."""
    before = {name: w.grad for name, w in weights.items()}
    hooked = [name for name, w in weights.items() if w._post_accumulate_grad_hooks]
    if hooked:
        raise TypeError(
            f"weight {hooked[0]!r} has a hook that runs when its gradient is there, such as an optimizer's step: "
            "FiniteDifference would call it. Take hoptim.Exact()"
        )
    try:
        for w in weights.values():
            w.grad = None
        yield weights
    finally:
        for name, w in weights.items():
            w.grad = before[name]
