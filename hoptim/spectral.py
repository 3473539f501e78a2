"""Bounds on the spectrum of A, from a few products."""

from __future__ import annotations

import torch
from torch import Tensor

from hoptim import trees
from hoptim.operators import Operator
from hoptim.trees import Tree


def spectral_norm(A: Operator, start: Tree, products: int) -> tuple[Tensor, Tree]:
    """Estimate ‖A‖₂ from below by power iteration: max over the iterates v of ‖A v‖ / ‖v‖.

    Args:
        A: the operator, symmetric.
        start: the first iterate, not zero; the last one of an earlier call makes one or two products enough.
        products: how many products to spend.

    Returns:
        The estimate, a scalar on the device, and the last iterate, of unit length.

    Source: Golub and Van Loan, "Matrix Computations", section 8.2.

    >>> from hoptim.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": torch.tensor([3.0, 1.0]) * v["w"]}, like={"w": torch.ones(2)})
    >>> estimate, v = spectral_norm(A, {"w": torch.ones(2)}, products=10)
    >>> round(float(estimate), 4)
    3.0
    """
    v = trees.unit(start)
    estimate = torch.zeros_like(trees.norm(v))
    for _ in range(products):
        v = A @ v
        estimate = torch.maximum(estimate, trees.norm(v))
        v = trees.unit(v)
    return estimate, v


def start_vector(like: Tree, towards: Tree) -> Tree:
    """A first iterate: the direction ``towards`` plus a random one of the same length, from a generator of its own."""
    device = next(iter(like.values())).device
    generator = torch.Generator(device).manual_seed(0)
    noise = {
        name: torch.randn(value.shape, generator=generator, device=device, dtype=value.dtype) for name, value in like.items()
    }
    return trees.add_(trees.unit(noise), trees.unit(towards))
