"""What a learned weight decay costs in a training loop: its hypersteps, its steps, and whole trainings.

The loops by hand do the same in plain torch, as one would write it for a single experiment: no checks and no status.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import hypot
from pathlib import Path
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import difference, mlp, training
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hoptim
from hoptim.recipes import Dropout, LabelSmoothing, WeightDecay

WIDTHS, BATCH, STEPS = (64, 256), 50, 2000
RATE, DECAY = 1e-3, 1e-2
OUTER_RATE = 1e-6  # so small that thousands of timed hypersteps are alike
Y = torch.arange(3000) % 10
X = torch.randn(3000, 784) + torch.randn(10, 784)[Y]
NET, MINILM = "MLP 784-{0}-{0}-10", Path("data/minilm")
TRAIN, VALIDATION = torch.arange(3000).split([2000, 1000])

Loss = Callable[[Any, Any, Any], Tensor]


def loss(model: Any, _: Any, batch: Any) -> Tensor:
    return cross_entropy(model(X[batch]), Y[batch])


def val_loss(model: Any, hparams: Any, batch: Any, loss: Loss = loss) -> Tensor:
    return loss(model.eval(), hparams, batch)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)


def learning(model: nn.Module, inner: torch.optim.Optimizer, loss: Loss = loss, **options: Any) -> hoptim.BilevelOptimizer:
    """With a learned decay for each weight, by default without hypersteps."""
    decay = WeightDecay(model, per="weight", start=DECAY)
    problem, outer = (
        hoptim.Problem(model, decay, loss, partial(val_loss, loss=loss)),
        torch.optim.Adam(decay.parameters(), lr=OUTER_RATE),
    )
    options = {"val_batches": [VALIDATION], "every": 10**9, "options": {"weight_decay": decay}, **options}
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
            rows.append(Row(NET.format(width), labels, figures, {"over by hand": 1.2}))
    return rows


def step_cases() -> Iterator[tuple[str, nn.Module, Loss]]:
    """Names, models and losses: nets of three widths, and three layers of MiniLM on sentences of 32 words if it is there."""
    for width in (*WIDTHS, 360):
        yield NET.format(width), mlp(784, width, width, 10), loss
    if not MINILM.is_dir():
        return
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    words = torch.randint(1000, 30000, (8, 32))
    model = AutoModelForSequenceClassification.from_pretrained(MINILM, num_hidden_layers=3, num_labels=10)
    yield "MiniLM, 3 layers", model, lambda model, _, batch: model(words, labels=Y[batch[:8]]).loss


def offset_loss(model: Any, hparams: Any, batch: Any, loss: Loss) -> Tensor:
    """A validation loss that alone reads the hyperparameter."""
    return val_loss(model, hparams, batch, loss) + hparams["offset"]


def steps(rounds: int) -> list[Row]:
    """A step without a hyperstep over that of the plain loop: one that reads no hyperparameter, and with decays."""
    rows = []
    for name, model, loss in step_cases():
        inner, batch = adamw(model), TRAIN[:BATCH]
        hparams, validation = hoptim.HyperParameters({"offset": torch.zeros(())}), partial(offset_loss, loss=loss)
        problem, outer = hoptim.Problem(model, hparams, loss, validation), torch.optim.Adam(hparams.parameters())
        wrapped = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[batch], every=10**9)
        decay = learning(model, inner, loss=loss)
        calls: Calls = {
            "plain": training(inner, partial(loss, model, None), batch),
            "wrapped": training(wrapped, wrapped.loss, batch),
            "decay a weight": training(decay, decay.loss, batch),
        }
        times = in_turn(calls, rounds if "MiniLM" in name else 8 * rounds)
        figures = {name: ratio(times, name, "plain") for name in list(calls)[1:]}
        goals = {"decay a weight": 1.1} | ({"wrapped": 1.025} if median(times["plain"]) > 2e-3 else {})
        rows.append(Row(name, {"inner": "AdamW"}, {"plain, ms": 1e3 * median(times["plain"]), **figures}, goals))
    return rows


def recipes(model: Any, hparams: Any, batch: Any) -> Tensor:
    return hparams["smoothing"].cross_entropy(hparams["dropout"].call(model, X[batch]), Y[batch])


def train(width: int, kind: str) -> None:
    """A whole training, with a hyperstep after each fiftieth step from a quarter of it on."""
    model = mlp(784, width, width, 10)
    schedule = {"every": 50, "warmup": STEPS // 4}
    if kind == "plain":
        optimizer: Any = adamw(model)
    elif kind == "decay a weight":
        optimizer = learning(model, adamw(model), **schedule)
    else:
        decay = WeightDecay(model, per="weight", start=DECAY)
        hparams = nn.ModuleDict({"decay": decay, "dropout": Dropout(model, ["2", "4"]), "smoothing": LabelSmoothing()})
        problem, outer = hoptim.Problem(model, hparams, recipes, val_loss), hoptim.outer_adam(hparams)
        options = {"options": {"weight_decay": decay}, "val_batches": [VALIDATION], **schedule}
        optimizer = hoptim.BilevelOptimizer(adamw(model), outer, problem, **options)
    of_batch = partial(loss, model, None) if kind == "plain" else optimizer.loss
    for batch in torch.randint(len(TRAIN), (STEPS, BATCH)):
        optimizer.zero_grad()
        of_batch(batch).backward()
        optimizer.step()


def trainings(rounds: int) -> list[Row]:
    """A training of 2,000 steps with 31 hypersteps on 1,000 validation examples, over the same without them."""
    rows, kinds = [], {"plain": 0.0, "decay a weight": 1.35, "dropout and smoothing too": 1.5}
    for width in WIDTHS:
        times = in_turn({kind: partial(train, width, kind) for kind in kinds}, max(3, rounds // 3))
        figures = {"plain, s": median(times["plain"])} | {kind: ratio(times, kind, "plain") for kind in list(kinds)[1:]}
        rows.append(Row(NET.format(width), {"inner": "AdamW"}, figures, {kind: kinds[kind] for kind in list(kinds)[1:]}))
    return rows
