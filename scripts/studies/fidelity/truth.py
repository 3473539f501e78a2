"""The true hypergradient of a training, by differentiation through every step of SGD with momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hoptim

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """SGD with momentum, v ← μv + ∇L_T, w ← w − lr·v, from v = 0.

    Args:
        steps: the number of steps, N.
        lr: the learning rate.
        momentum: μ in [0, 1).
        size: examples in a batch; ``None`` trains on the whole set.
    """

    steps: int
    lr: float
    momentum: float = 0.9
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a training: its final weights, and the true hypergradient there.

    Attributes:
        weights: w_N.
        velocity: v_N, the momentum at the end.
        earlier: the weights at the last hyperstep, some steps earlier.
        earlier_velocity: the momentum there.
        truth: dL_V(w_N(λ), λ)/dλ through all N steps.
    """

    weights: Tensors
    velocity: Tensors
    earlier: Tensors
    earlier_velocity: Tensors
    truth: Tensors


def trained(
    problem: hoptim.Problem,
    batch_at: Callable[[int], Any],
    val_batch: Any,
    training: Training,
    *,
    closed: Callable[[], Tensors] | None = None,
    lag: int = 100,
) -> Trained:
    """Train the model of ``problem``, and differentiate its validation loss through the whole training.

    Args:
        problem: the bilevel problem, best in float64; its model is left at w_N.
        batch_at: the batch of step t = 0, 1, ...
        val_batch: the batch of the validation loss.
        training: how to train.
        closed: computes the true hypergradient in closed form, instead of by :class:`hoptim.Replay`.
        lag: ``earlier`` is taken this many steps before the end.
    """
    live = problem.weights()
    inner = torch.optim.SGD(live.values(), lr=training.lr, momentum=training.momentum)
    steps, earlier = training.steps, (_copy(live), _velocity(inner, live))
    truth = {} if closed else _through(problem, [batch_at(t) for t in range(steps)], val_batch, inner)
    for step in range(steps):
        if step == steps - lag:
            earlier = _copy(live), _velocity(inner, live)
        inner.zero_grad()
        problem.loss(batch_at(step)).backward()
        inner.step()
    inner.zero_grad()
    return Trained(
        weights=_copy(live),
        velocity=_velocity(inner, live),
        earlier=earlier[0],
        earlier_velocity=earlier[1],
        truth=closed() if closed else truth,
    )


def _through(problem: hoptim.Problem, batches: Sequence[Any], val_batch: Any, inner: torch.optim.SGD) -> Tensors:
    """dL_V/dλ through the steps on these batches. Each step is taken twice without a graph and once with one."""
    method = hoptim.Replay(batches, segments=math.isqrt(len(batches)) + 2)
    result = hoptim.hypergradient(problem, None, val_batch, method, inner=inner)
    if not result.solution.status.ok:
        raise RuntimeError(f"no true hypergradient: {result.solution.status.name}, {result.solution.detail}")
    return dict(result.grads)


def _velocity(inner: torch.optim.SGD, live: Tensors) -> Tensors:
    """The momentum of each weight, 0 before the first step."""
    return {name: inner.state[p].get("momentum_buffer", torch.zeros_like(p)).clone() for name, p in live.items()}


def _copy(tree: Tensors) -> Tensors:
    return {name: value.detach().clone() for name, value in tree.items()}
