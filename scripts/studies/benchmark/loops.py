"""What a learned weight decay costs in a training loop: its hypersteps, its steps, and whole trainings.

The loops by hand do the same in plain torch, as one would write it for a single experiment: no checks and no status.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from math import hypot
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import difference, mlp, training
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hoptim
from hoptim.recipes import Dropout, LabelSmoothing, WeightDecay

WIDTHS, BATCH, STEPS, HYPERSTEPS = (64, 256), 50, 2000, 31
RATE, DECAY = 1e-3, 1e-2
OUTER_RATE = 1e-6  # so small that thousands of timed hypersteps are alike
Y = torch.arange(3000) % 10
X = torch.randn(3000, 784) + torch.randn(10, 784)[Y]
TRAIN, VALIDATION = torch.arange(3000).split([2000, 1000])


def loss(model: Any, _: Any, batch: Any) -> Tensor:
    return cross_entropy(model(X[batch]), Y[batch])


def val_loss(model: Any, _: Any, batch: Any) -> Tensor:
    model.eval()
    return loss(model, _, batch)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)


def learning(model: nn.Module, inner: torch.optim.Optimizer, **options: Any) -> hoptim.BilevelOptimizer:
    """With a learned decay for each weight, by default without hypersteps."""
    decay = WeightDecay(model, per="weight", start=DECAY)
    problem, outer = hoptim.Problem(model, decay, loss, val_loss), torch.optim.Adam(decay.parameters(), lr=OUTER_RATE)
    options = {"val_batches": [VALIDATION], "every": None, "options": {"weight_decay": decay}, **options}
    return hoptim.BilevelOptimizer(inner, outer, problem, **options)


def minres(product: Callable[[Tensor], Tensor], g: Tensor, terms: int = 5) -> Tensor:
    """MINRES as in the textbook."""
    beta = phi = float(g.norm())
    v, v_before = g / beta, torch.zeros_like(g)
    x, d, d_before = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g)
    c, s, delta_bar, epsilon_next = -1.0, 0.0, 0.0, 0.0
    for _ in range(terms):
        p = product(v).sub_(v_before, alpha=beta)
        alpha = float(v.dot(p))
        beta = float(p.sub_(v, alpha=alpha).norm())
        delta, gamma_bar = c * delta_bar + s * alpha, s * delta_bar - c * alpha
        epsilon, epsilon_next, delta_bar = epsilon_next, s * beta, -c * beta
        gamma = hypot(gamma_bar, beta)
        c, s = gamma_bar / gamma, beta / gamma
        d, d_before = d_before.mul_(-epsilon).add_(v).sub_(d, alpha=delta).div_(gamma), d
        x.add_(d, alpha=c * phi)
        phi *= s
        v, v_before = p.div_(beta), v
    return x


def hypersteps_by_hand(model: nn.Module, inner: torch.optim.Optimizer) -> Callable[..., list[Tensor]]:
    """A hyperstep of a decay exp(θ) for each weight of two axes, in F = ∇L_T + exp(θ)∘D∘w with D = √v̂ + ε; gives dL_V/dθ."""
    weights = list(model.parameters())
    sizes = [w.numel() for w in weights]
    thetas = {w: torch.full_like(w, DECAY).log().requires_grad_() for w in weights if w.ndim == 2}
    outer = torch.optim.Adam(thetas.values(), lr=OUTER_RATE)

    def scale(w: Tensor) -> Tensor:
        state = inner.state[w]
        return state["exp_avg_sq"].sqrt() / (1 - 0.999 ** float(state["step"])) ** 0.5 + 1e-8

    def flat(tensors: Any) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def by_weight(v: Tensor) -> list[Tensor]:
        return [piece.view_as(w) for piece, w in zip(v.split(sizes), weights, strict=True)]

    def hyperstep(batch: Tensor, val: Tensor) -> list[Tensor]:
        g = flat(torch.autograd.grad(val_loss(model, None, val), weights))
        model.train()
        gradient = torch.autograd.grad(loss(model, None, batch), weights, create_graph=True)
        c = [thetas[w].detach().exp() * scale(w) if w in thetas else torch.zeros_like(w) for w in weights]
        diagonal = flat(c)

        def product(v: Tensor) -> Tensor:
            found = torch.autograd.grad(gradient, weights, by_weight(v), retain_graph=True)
            return flat(found).addcmul_(diagonal, v)

        found = by_weight(minres(product, g).mul_(diagonal).neg_())
        for w, part in zip(weights, found, strict=True):
            if w in thetas:
                thetas[w].grad = part * w.detach()
        outer.step()
        return [theta.grad for theta in thetas.values() if theta.grad is not None]

    return hyperstep


def hypersteps(rounds: int) -> list[Row]:
    """A hyperstep of a decay for each weight under AdamW, over the same by hand: five products, on 50 training examples."""
    rows = []
    for width in WIDTHS:
        model = mlp(784, width, width, 10)
        inner, batch = adamw(model), TRAIN[:BATCH]
        step = training(inner, partial(loss, model, None), batch)
        for _ in range(100):
            step()
        for val in (VALIDATION, VALIDATION[:250]):
            optimizer, by_hand = learning(model, inner), hypersteps_by_hand(model, inner)
            record = optimizer.hyperstep(batch, val)
            assert record.result.solution.products == 5
            error = difference(list(record.result.grads.values()), by_hand(batch, val), f"MLP of {width}", 1e-3)
            calls: Calls = {"hoptim": partial(optimizer.hyperstep, batch, val), "by hand": partial(by_hand, batch, val)}
            times = in_turn(calls, 4 * rounds)
            figures: dict[str, float | str] = {"difference": f"{error:.0e}", "by hand, ms": 1e3 * median(times["by hand"])}
            figures["over by hand"] = ratio(times, "hoptim", "by hand")
            labels = {"validation examples": str(len(val))}
            rows.append(Row(f"MLP 784-{width}-{width}-10", labels, figures, {"over by hand": 1.2}))
    return rows
