"""What every test gets: one thread, float64 as the default, and a seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Closed forms are compared in float64; a test of float32 asks for it by ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test begins at the same random state."""
    torch.manual_seed(0)
    return 0
