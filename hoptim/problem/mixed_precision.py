"""Mixed precision: losses are computed under the user's autocast, everything else in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

Lowered = tuple[tuple[str, torch.dtype], ...]

DEVICES = ("cpu", "cuda", "mps", "xpu")


def lowered() -> Lowered:
    """The devices on which autocast is on, and its types: those on which losses are computed in lower precision.

    float16 is left out: such losses are computed in full precision, since small gradients would become zero. In training a
    ``GradScaler`` prevents that, but a hypergradient has none.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     lowered()
    (('cpu', torch.bfloat16),)
    """
    enabled = [(device, torch.get_autocast_dtype(device)) for device in DEVICES if torch.is_autocast_enabled(device)]
    return tuple((device, dtype) for device, dtype in enabled if dtype != torch.float16)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast: for backward passes, products and solvers."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def losses_precision(found: Lowered) -> Iterator[None]:
    """Under the autocast that the user has switched on outside :func:`full_precision`: for losses.

    Autocast caches weights in lower precision. The cache is emptied afterwards, since it would outlive the tensors that
    replace the model's own.
    """
    with ExitStack() as stack:
        for device, dtype in found:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield
    if found:
        torch.clear_autocast_cache()
