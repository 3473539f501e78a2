"""A training loss taken apart, and the mean of several, which comes apart as each does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A training loss at one point, taken apart: L_T = criterion(z) + penalty."""

    z: Tensor
    criterion: Callable[[Tensor], Tensor]
    penalty: Tensor | None


def mean_loss(found: Sequence[tuple[Tensor, Parts | None]], shares: Tensor) -> tuple[Tensor, Parts | None]:
    """The mean of losses by their shares, and of their parts, whose z is all of theirs, one after the other."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    loss = mean(value for value, _ in found)
    parts = [part for _, part in found if part is not None]
    if not parts:
        return loss, None
    shapes = [part.z.shape for part in parts]

    def criterion(z: Tensor) -> Tensor:
        pieces = z.split([shape.numel() for shape in shapes])
        return mean(part.criterion(piece.view(shape)) for part, piece, shape in zip(parts, pieces, shapes, strict=True))

    penalties = [part.penalty for part in parts if part.penalty is not None]
    z = torch.cat([part.z.reshape(-1) for part in parts])
    return loss, Parts(z=z, criterion=criterion, penalty=mean(penalties) if penalties else None)
