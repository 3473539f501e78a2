"""What a recipe's hyperparameters start from."""

from __future__ import annotations

import torch
from torch import Tensor


def full(shape: tuple[int, ...], value: float, like: Tensor) -> Tensor:
    """A start on the device of ``like``, in float32 or more: a log in bf16 would be too coarse for an outer step."""
    return torch.full(shape, value, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
