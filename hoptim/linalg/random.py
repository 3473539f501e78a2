"""Random vectors from a generator of their own, so that nobody else's random numbers change."""

from __future__ import annotations

import math

import torch
from torch import Tensor

AT_ONCE = 2**22  # numbers that are drawn by one call


class NormalNumbers:
    """Standard normal numbers, which are the same however many are taken at once.

    Args:
        count: how many there are.
        seed: of their generator.
        dtype: their type.
        device: where they are drawn.

    >>> first, second = NormalNumbers(10, seed=0), NormalNumbers(10, seed=0)
    >>> torch.equal(first.take(10), torch.cat([second.take(3), second.take(7)]))
    True
    """

    def __init__(
        self, count: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self._left, self._drawn = count, torch.empty(0, dtype=dtype, device=device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def take(self, count: int) -> Tensor:
        """The next ones, of shape (count,)."""
        pieces = []
        while count > len(self._drawn):
            pieces.append(self._drawn)
            count -= len(self._drawn)
            self._drawn = self._drawn.new_empty(min(self._left, AT_ONCE)).normal_(generator=self._generator)
            self._left -= len(self._drawn)
        piece, self._drawn = self._drawn[:count], self._drawn[count:]
        return torch.cat([*pieces, piece])


def gaussian(
    size: int,
    *lead: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal vectors of shape (…, size): the same at each call.

    >>> gaussian(4, 3).shape, torch.equal(gaussian(4), gaussian(4)), torch.equal(gaussian(4), gaussian(4, seed=1))
    (torch.Size([3, 4]), True, False)
    """
    count = math.prod(lead) * size
    return NormalNumbers(count, seed, dtype, device).take(count).view(*lead, size)


def gaussian_like(v: Tensor, *, seed: int = 0) -> Tensor:
    """One of the size and type of the vector v."""
    return gaussian(len(v), seed=seed, dtype=v.dtype, device=v.device)
