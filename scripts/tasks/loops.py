"""Batches of indices, and the training loop of the studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def shuffled(examples: Tensor, size: int, steps: int) -> Iterator[Tensor]:
    """``steps`` batches of this size, in a new random order at each pass; a last batch that is smaller is left out.

    >>> [len(batch) for batch in shuffled(torch.arange(7), 3, steps=4)]
    [3, 3, 3, 3]
    """
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            order = examples[torch.randperm(len(examples))]
            batches = [part for part in order.split(size) if len(part) == size]
        yield batches.pop()


def in_epochs(examples: Tensor, size: int, steps: int) -> Iterator[Tensor]:
    """``steps`` batches of this size, in a new random order at each pass, whose last batch may be smaller.

    >>> [len(batch) for batch in in_epochs(torch.arange(7), 3, steps=4)]
    [3, 3, 1, 3]
    """
    while steps > 0:
        batches = examples[torch.randperm(len(examples))].split(size)[:steps]
        yield from batches
        steps -= len(batches)


def train(
    model: nn.Module,
    optimizer: Any,
    batches: Iterable[Tensor],
    *,
    falling: int | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """A training loop as a user writes it.

    Args:
        model: the model.
        optimizer: has ``loss(batch)``; :func:`with_loss` gives it to one of torch's.
        batches: the batch of each step.
        falling: the learning rate falls linearly to zero, over so many steps.
        after: is called after each step, with their number.
    """
    first = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(batches):
        for group, lr in zip(optimizer.param_groups, first if falling else [], strict=bool(falling)):
            group["lr"] = lr * (1 - step / (falling or 1))
        model.train()
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()
        if after is not None:
            after(step + 1)


def with_loss(optimizer: Any, loss: Callable[[Tensor], Tensor]) -> Any:
    """One of torch's optimizers with a method ``loss(batch)``, as hoptim's have it."""
    optimizer.loss = loss
    return optimizer
