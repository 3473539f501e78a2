"""The meta-gradients of peers.py by hoptim."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from studies.few_shot.peers import Batch, Grads, Loss
from torch import Tensor, nn

import hoptim
from hoptim.recipes import Initialization


@lru_cache(maxsize=1)  # as in a loop, where it is made once
def of_tasks(model: nn.Module, loss: Loss, strength: float = 0.0) -> hoptim.Problem:
    """The loss of a task, and the model's weights as those from which each training begins."""

    def val_loss(model: Any, hparams: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    def train_loss(model: Any, hparams: Any, batch: Batch) -> Tensor:
        return loss(model, batch) + hparams.penalty(model, strength)

    return hoptim.Problem(model, Initialization(model), train_loss if strength else val_loss, val_loss)


def by_name(grads: Grads, prefix: str = "initial.") -> Grads:
    return {name.removeprefix(prefix): g for name, g in grads.items() if name.startswith(prefix)}


def hoptim_maml(
    model: nn.Module,
    loss: Loss,
    support: Batch,
    query: Batch,
    *,
    steps: int,
    lr: float,
    first_order: bool = False,
    chunk_size: int | None = None,
    inner: Callable[..., torch.optim.Optimizer] | None = None,
) -> Grads:
    """MAML. ``inner(parameters)`` makes another inner optimizer than ``SGD(lr)``."""
    optimizer = inner(model.parameters()) if inner else torch.optim.SGD(model.parameters(), lr=lr)
    method = hoptim.PerTask(steps, first_order=first_order, chunk_size=chunk_size)
    return by_name(hoptim.hypergradient(of_tasks(model, loss), support, query, method, inner=optimizer).grads)


def hoptim_imaml(
    model: nn.Module, loss: Loss, support: Batch, query: Batch, *, steps: int, lr: float, strength: float, terms: int
) -> Grads:
    """Implicit MAML, by so many terms of conjugate gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    method = hoptim.PerTask(steps, hoptim.Implicit(hoptim.CG(terms=terms, tolerance=0.0)))
    return by_name(hoptim.hypergradient(of_tasks(model, loss, strength), support, query, method, inner=optimizer).grads)


@lru_cache(maxsize=1)
def with_rates(model: nn.Module, loss: Loss) -> tuple[hoptim.Problem, torch.optim.Optimizer]:
    """The same with a learned rate for each weight, and an optimizer with a parameter group for each tensor."""

    def of_task(model: Any, hparams: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    rates = hoptim.HyperParameters({name: torch.ones_like(p) for name, p in model.named_parameters()})
    hparams = nn.ModuleDict({"start": Initialization(model), "rate": rates})
    optimizer = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=1.0)
    return hoptim.Problem(model, hparams, of_task, of_task), optimizer


def hoptim_meta_sgd(
    model: nn.Module, rates: Mapping[str, Tensor], loss: Loss, support: Batch, query: Batch, *, steps: int
) -> tuple[Grads, Grads]:
    """Meta-SGD: the gradients of the weights and of the inner rates."""
    problem, optimizer = with_rates(model, loss)
    for name, rate in rates.items():
        problem.hparams["rate"][name] = rate  # type: ignore[index]
    options = {"lr": [f"rate.{name}" for name, _ in model.named_parameters()]}
    grads = hoptim.hypergradient(problem, support, query, hoptim.PerTask(steps), inner=optimizer, options=options).grads
    return by_name(grads, "start.initial."), by_name(grads, "rate.")
