"""What every test gets: one thread, also to compile, float64 as the default, and a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from hoptim.training.optimizer import FirstHyperstep

for threads in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):  # of subprocesses too: tests run on all cores already
    os.environ.setdefault(threads, "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Closed forms are compared in float64; a test of float32 asks for it by ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def short_trainings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most trainings in tests are too short for a hyperstep, and would say so in whichever test they are collected."""
    if request.path.name != "test_no_hypersteps.py":
        monkeypatch.setattr(FirstHyperstep, "warn_if_missed", lambda first: None)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test begins at the same random state."""
    torch.manual_seed(0)
    return 0
