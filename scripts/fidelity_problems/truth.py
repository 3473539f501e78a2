"""The true hypergradient of a training run: reverse differentiation through every step of SGD with momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hoptim

Tree = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """SGD with momentum, v ← μv + ∇L_T, w ← w − lr·v, from v = 0.

    Args:
        steps: their number N.
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
        earlier: the weights at the hyperstep before, some steps earlier.
        earlier_velocity: the momentum there.
        truth: dL_V(w_N(λ), λ)/dλ through all N steps.
        truncated: the same through the last K steps only, by K.
    """

    weights: Tree
    velocity: Tree
    earlier: Tree
    earlier_velocity: Tree
    truth: Tree
    truncated: dict[int, Tree] = field(default_factory=dict)


def trained(
    problem: hoptim.Problem,
    batch_at: Callable[[int], Any],
    val_batch: Any,
    training: Training,
    *,
    closed: Callable[[], Tree] | None = None,
    lag: int = 100,
    truncate: Sequence[int] = (),
    segment: int | None = None,
) -> Trained:
    """Train the live model of ``problem`` and differentiate its validation loss through the whole run.

    Args:
        problem: the bilevel problem, best in float64; its model is left at w_N.
        batch_at: the batch of step t = 0, 1, ...
        val_batch: the batch of the validation loss.
        training: how to train.
        closed: computes the truth in closed form, instead of by reverse differentiation.
        lag: ``earlier`` is taken this many steps before the end.
        truncate: the K of ``truncated``.
        segment: steps between two stored states, √N by default. The steps between them are taken again, so that the whole
            costs about two training gradients, one graph and one product for each step.
    """
    segment = segment or max(1, math.isqrt(training.steps))
    live = problem.weights()
    velocity = {name: torch.zeros_like(p) for name, p in live.items()}
    kept, before = {}, max(0, training.steps - lag)
    for step in range(training.steps):
        if step % segment == 0 or step == before:
            kept[step] = _copy(live), _copy(velocity)
        _step(problem, live, velocity, batch_at(step), training)
    weights, earlier = _copy(live), kept[before]
    if closed is None:
        truth, truncated = _reversed(problem, batch_at, val_batch, training, kept, truncate)
        _load(live, weights)
    else:
        truth, truncated = closed(), {}
    return Trained(
        weights=weights,
        velocity=velocity,
        earlier=earlier[0],
        earlier_velocity=earlier[1],
        truth=truth,
        truncated=truncated,
    )


def _reversed(
    problem: hoptim.Problem,
    batch_at: Callable[[int], Any],
    val_batch: Any,
    training: Training,
    kept: dict[int, tuple[Tree, Tree]],
    truncate: Sequence[int],
) -> tuple[Tree, dict[int, Tree]]:
    """Reverse differentiation from the last step to the first, from the states in ``kept``.

    One step computes v̄ ← v̄ − lr·w̄, then w̄ ← w̄ + A v̄ and λ̄ ← λ̄ + Bᵀv̄, then v̄ ← μ·v̄: one product with the curvature
    at w_t, as in an implicit solve.

    Source: Domke 2012; Maclaurin, Duvenaud and Adams 2015; checkpoints: Griewank 1992.
    """
    live, leaves = problem.weights(), problem.leaves()
    w_bar, total = _gradients(problem.val_loss(problem.model, problem.hparams, val_batch), live, leaves)
    v_bar = {name: torch.zeros_like(p) for name, p in live.items()}
    truncated, stop = {}, training.steps
    for begin in sorted(kept, reverse=True):
        path = _replay(problem, live, *kept[begin], range(begin, stop), batch_at, training)
        for step, state in reversed(path):
            _load(live, state)
            v_bar = {name: v_bar[name] - training.lr * w_bar[name] for name in live}
            along, mixed = _pulled_back(problem, live, leaves, v_bar, batch_at(step))
            w_bar = {name: w_bar[name] + along[name] for name in live}
            total = {name: total[name] + mixed[name] for name in leaves}
            v_bar = {name: training.momentum * value for name, value in v_bar.items()}
            if training.steps - step in truncate:
                truncated[training.steps - step] = _copy(total)
        stop = begin
    return total, truncated


def _step(problem: hoptim.Problem, live: Tree, velocity: Tree, batch: Any, training: Training) -> None:
    gradients = torch.autograd.grad(problem.loss(batch), list(live.values()))
    with torch.no_grad():
        for p, v, gradient in zip(live.values(), velocity.values(), gradients, strict=True):
            v.mul_(training.momentum).add_(gradient)
            p.sub_(v, alpha=training.lr)


def _replay(
    problem: hoptim.Problem,
    live: Tree,
    weights: Tree,
    velocity: Tree,
    steps: range,
    batch_at: Callable[[int], Any],
    training: Training,
) -> list[tuple[int, Tree]]:
    """The weights before each of ``steps``, starting from the state stored before the first."""
    _load(live, weights)
    velocity = _copy(velocity)
    path = []
    for step in steps:
        path.append((step, _copy(live)))
        if step + 1 < steps.stop:
            _step(problem, live, velocity, batch_at(step), training)
    return path


def _pulled_back(problem: hoptim.Problem, live: Tree, leaves: Tree, v: Tree, batch: Any) -> tuple[Tree, Tree]:
    """A v and Bᵀv at the live weights."""
    loss = problem.train_loss(problem.model, problem.hparams, batch)
    gradient = torch.autograd.grad(loss, list(live.values()), create_graph=True)
    return _gradients(sum((g * value).sum() for g, value in zip(gradient, v.values(), strict=True)), live, leaves)


def _gradients(value: Tensor, live: Tree, leaves: Tree) -> tuple[Tree, Tree]:
    inputs = {**{("w", name): p for name, p in live.items()}, **{("h", name): p for name, p in leaves.items()}}
    found = torch.autograd.grad(value, list(inputs.values()), allow_unused=True)
    whole = {
        key: torch.zeros_like(p) if part is None else part for (key, p), part in zip(inputs.items(), found, strict=True)
    }
    return {name: whole["w", name] for name in live}, {name: whole["h", name] for name in leaves}


def _copy(tree: Tree) -> Tree:
    return {name: value.detach().clone() for name, value in tree.items()}


def _load(live: Tree, values: Tree) -> None:
    with torch.no_grad():
        for name, p in live.items():
            p.copy_(values[name])
