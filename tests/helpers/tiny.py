"""A net of 17 weights with three hyperparameters, and its losses again as plain functions of flat vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import Tensors, flat, unflat
from torch import Tensor, nn
from torch.func import grad, jacrev
from torch.nn import functional as F

import hoptim
from hoptim.methods.method import TrainingContext

SHAPES = {"0.weight": (3, 2), "0.bias": (3,), "3.weight": (2, 3), "3.bias": (2,)}
LIKE = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
SIZE = 17


def batch(seed: int, n: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=draw, dtype=torch.float64), torch.randint(0, 2, (n,), generator=draw)


BATCHES = [batch(seed) for seed in range(6)]
VAL = batch(99, 8)


def joined(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def tiny(*, dropout: float = 0.0, val: Any = None, predict: Any = None, **more: float) -> hoptim.Problem:
    """The net as a Problem; ``more`` are further scalar hyperparameters, which no loss uses."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Dropout(dropout), nn.Linear(3, 2))
    values = {"decay": torch.tensor([-2.0, -1.0]), "scale": torch.tensor(0.4)}
    values |= {name: torch.tensor(value) for name, value in more.items()}
    hparams = nn.ParameterDict({name: nn.Parameter(value.double()) for name, value in values.items()})

    def criterion(z: Tensor, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(h["scale"].exp() * z, b[1])

    def penalty(m: Any, h: Any) -> Tensor:
        return sum(h["decay"][int(p.ndim == 1)].exp() * (p.square() / 2 + p**4 / 4).sum() for p in m.parameters())

    loss = hoptim.CompositeLoss(predict or (lambda m, h, b: m(b[0])), criterion, penalty)
    return hoptim.Problem(model.double(), hparams, loss, val or val_loss)


def val_loss(m: Any, h: Any, b: Any) -> Tensor:
    m.eval()
    return F.cross_entropy(m(b[0]), b[1]) + 0.3 * h["decay"].sin().sum() + 0.2 * h["scale"] ** 2


def linear_val(m: Any, h: Any, b: Any) -> Tensor:
    """Linear in the weights, so that its gradient is the same before and after a step."""
    moments = [torch.linspace(-1, 1.5, p.numel()).reshape(p.shape) * p for p in m.parameters()]
    return sum(part.sum() for part in moments) + 0.3 * h["decay"].sin().sum() + 0.2 * h["scale"] ** 2


# The same, a second time


def outputs(w: Tensor, x: Tensor) -> Tensor:
    t = unflat(w, LIKE)
    return torch.tanh(x @ t["0.weight"].T + t["0.bias"]) @ t["3.weight"].T + t["3.bias"]


def train(w: Tensor, l: Tensor, b: Any) -> Tensor:  # noqa: E741
    t = unflat(w, LIKE)
    size = {name: (value**2 / 2 + value**4 / 4).sum() for name, value in t.items()}
    penalty = l[0].exp() * (size["0.weight"] + size["3.weight"]) + l[1].exp() * (size["0.bias"] + size["3.bias"])
    return F.cross_entropy(l[2].exp() * outputs(w, b[0]), b[1]) + penalty


def valid(w: Tensor, l: Tensor, b: Any = VAL) -> Tensor:  # noqa: E741
    return F.cross_entropy(outputs(w, b[0]), b[1]) + 0.3 * l[:2].sin().sum() + 0.2 * l[2] ** 2


def weights_of(problem: hoptim.Problem) -> Tensor:
    return flat({name: p.detach() for name, p in problem.weights().items()})


def leaves_of(problem: hoptim.Problem) -> Tensor:
    leaves = problem.leaves()
    return torch.cat([leaves["decay"].detach(), leaves["scale"].detach()[None]])


def leaf_vector(tree: Tensors, lead: tuple[int, ...] = ()) -> Tensor:
    """The gradient in (decay, decay, scale)."""
    return torch.cat([tree["decay"], tree["scale"].reshape(*lead, 1)], dim=-1)


def hess(problem: hoptim.Problem, b: Any) -> Tensor:
    return jacrev(grad(train))(weights_of(problem), leaves_of(problem), b)


def mixed(problem: hoptim.Problem, b: Any) -> Tensor:
    """∂∇L_T/∂λ, of 17 rows and three columns."""
    return jacrev(grad(train), argnums=1)(weights_of(problem), leaves_of(problem), b)


def slope(problem: hoptim.Problem, b: Any) -> Tensor:
    return grad(train)(weights_of(problem), leaves_of(problem), b)


def g_of(problem: hoptim.Problem) -> Tensor:
    return grad(valid)(weights_of(problem), leaves_of(problem))


def direct_of(problem: hoptim.Problem) -> Tensor:
    return grad(valid, argnums=1)(weights_of(problem), leaves_of(problem))


def series(matrices: Sequence[Tensor], g: Tensor, step: float) -> Tensor:
    """step · Σ_j (I − step·A_jᵀ) … (I − step·A_1ᵀ) g."""
    v, total = g, g.clone()
    for A in matrices:
        v = v - step * A.T @ v
        total = total + v
    return step * total


# What hoptim makes of it


def linearized(
    problem: hoptim.Problem,
    curvature: Any,
    then: Callable[[Any], Any],
    *,
    at: Any = None,
    condition: Any = None,
    inner: Any = None,
    draw: Any = None,
) -> Any:
    condition, batch = condition or hoptim.Gradient(), BATCHES[0] if at is None else at
    with problem.leave_no_trace(), problem.at() as here, curvature.linearize(here, batch, draw) as one:
        return then(condition(one, here, TrainingContext(inner=inner)))


def matrix(A: Any) -> Tensor:
    """A as a dense matrix; each column by itself."""
    return torch.stack([A @ e for e in torch.eye(A.size)], dim=1)


def matrix_at_once(A: Any) -> Tensor:
    return (A @ torch.eye(A.size)).T


def mixed_matrix(one: Any) -> Tensor:
    """B, a row at a time."""
    return torch.stack([leaf_vector(one.mixed(e)) for e in torch.eye(one.A.size)])


def mixed_at_once(one: Any) -> Tensor:
    return leaf_vector(one.mixed(torch.eye(one.A.size)), (one.A.size,))
