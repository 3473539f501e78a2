"""Shuffled batches for the training loops of the studies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


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
