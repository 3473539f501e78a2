"""Mixed precision: losses are computed under the user's autocast, everything else in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

Lowered = tuple[tuple[str, torch.dtype], ...]

_DEVICES = ("cpu", "cuda", "mps", "xpu")
_of_the_user: ContextVar[Lowered | None] = ContextVar("of_the_user", default=None)


def lowered() -> Lowered:
    """The devices on which losses are computed in lower precision, and their types.

    float16 is left out: such losses are computed in full precision, since small gradients would become zero. In training a
    ``GradScaler`` prevents that, but a hypergradient has none.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
    ...     lowered(), torch.is_autocast_enabled("cpu")
    ((('cpu', torch.bfloat16),), False)
    """
    of_the_user = _of_the_user.get()
    if of_the_user is not None:
        return of_the_user
    enabled = [(device, torch.get_autocast_dtype(device)) for device in _DEVICES if torch.is_autocast_enabled(device)]
    return tuple((device, dtype) for device, dtype in enabled if dtype != torch.float16)


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast: for backward passes, products and solvers."""
    token = _of_the_user.set(lowered())
    try:
        with ExitStack() as stack:
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        _of_the_user.reset(token)


@contextmanager
def losses_precision() -> Iterator[None]:
    """Under the autocast that the user has switched on outside :func:`full_precision`: for losses.

    Autocast caches weights in lower precision. The cache is emptied afterwards, since it would outlive the tensors that
    replace the model's own.
    """
    found = lowered()
    if not found:
        yield
        return
    with ExitStack() as stack:
        for device, dtype in found:
            stack.enter_context(torch.autocast(device, dtype=dtype))
        yield
    torch.clear_autocast_cache()


def epsilon_of_losses(*dtypes: torch.dtype) -> float:
    """The relative rounding error of losses of weights of these types."""
    return max(torch.finfo(dtype).eps for dtype in (*dtypes, *(lower for _, lower in lowered())))
