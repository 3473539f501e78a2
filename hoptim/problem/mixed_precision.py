"""Mixed precision: losses are computed as the user's autocast has it, all that is made of them in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar

import torch

Lowered = tuple[tuple[str, torch.dtype], ...]

_KINDS = ("cpu", "cuda", "mps", "xpu")
_around: ContextVar[Lowered | None] = ContextVar("around", default=None)


def lowered() -> Lowered:
    """The kinds of devices on which a loss is computed in lower precision, and which.

    Not float16, under which losses are computed in full precision: small gradients would become zero where no ``GradScaler``
    multiplies them, and a hypergradient has none.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
    ...     lowered(), torch.is_autocast_enabled("cpu")
    ((('cpu', torch.bfloat16),), False)
    """
    around = _around.get()
    return _enabled() if around is None else around


@contextmanager
def full_precision() -> Iterator[None]:
    """Without autocast: for backward passes, products and solvers."""
    token = _around.set(lowered())
    try:
        with ExitStack() as stack:
            for kind in _KINDS:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        _around.reset(token)


@contextmanager
def losses_precision() -> Iterator[None]:
    """Under the autocast that was on around :func:`full_precision`: for losses.

    What autocast keeps of the weights in lower precision would outlive the tensors that stand in for them: it is dropped.
    """
    kinds = lowered()
    if not kinds:
        yield
        return
    with ExitStack() as stack:
        for kind, dtype in kinds:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield
    torch.clear_autocast_cache()


def epsilon_of_losses(dtype: torch.dtype) -> float:
    """The relative rounding error of losses of weights of this type."""
    return max(torch.finfo(kind).eps for kind in (dtype, *(lower for _, lower in lowered())))


def _enabled() -> Lowered:
    found = tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))
    return tuple((kind, dtype) for kind, dtype in found if dtype != torch.float16)
