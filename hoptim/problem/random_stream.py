"""A separate random stream, so that the process's generators go on as if nothing had been drawn."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch

Generators = Mapping[str, torch.Generator]


class RandomStream:
    """Random states that replace the process's own while something is drawn.

    They are those of the global generators of Python, NumPy and torch, on CPU and CUDA, and of other torch generators that
    are given. The global ones start from a seed made of ``torch.initial_seed()``, which is only read, and of a name; the
    others start from their present states.

    Args:
        name: streams with different names draw different numbers.

    >>> stream, before = RandomStream("val_batches"), torch.get_rng_state()
    >>> with stream.drawing():
    ...     first = torch.rand(2)
    >>> with stream.drawing():
    ...     second = torch.rand(2)
    >>> torch.equal(first, second), torch.equal(torch.get_rng_state(), before)
    (False, True)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._states: dict[str, Any] = {}

    @contextmanager
    def drawing(self, others: Generators | None = None) -> Iterator[Callable[[], dict[str, Any]]]:
        """Inside, random numbers come from this stream. Outside, no generator changes. Yields a function for its state."""
        others = others or {}
        outside = _read(others)
        try:
            if not self._states:
                _seed(torch.initial_seed() + zlib.crc32(self._name.encode()))
            _put(self._states, others)
            yield partial(_read, others)
        finally:
            self._states = _read(others)
            _put(outside, others)

    def states(self) -> dict[str, Any]:
        """Its present states; empty before the first use."""
        return dict(self._states)

    def load(self, states: Mapping[str, Any]) -> None:
        """Go to these states, on whatever device a checkpoint was read; to the beginning if they are empty."""
        self._states = {name: state.cpu() if isinstance(state, torch.Tensor) else state for name, state in states.items()}


def global_states() -> dict[str, Any]:
    """The present states of the global generators, as tensors and plain values for a checkpoint."""
    return _read({})


def set_generators(states: Mapping[str, Any]) -> None:
    """Set those global generators to these states that are both in ``states`` and in this process.

    >>> states = global_states()
    >>> first = torch.rand(2)
    >>> set_generators(states)
    >>> torch.equal(torch.rand(2), first)
    True
    """
    _put(states, {})


@contextmanager
def restore_generators() -> Iterator[None]:
    """Restore all global generators afterwards."""
    outside = _read({})
    try:
        yield
    finally:
        _put(outside, {})


def _seed(seed: int) -> None:
    random.seed(seed)
    if _numpy_is_plain():
        np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would also seed a CUDA that is not yet in use
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed % 2**63)


def _read(others: Generators) -> dict[str, Any]:
    """All states by name; that of torch on the CPU has the empty name."""
    states: dict[str, Any] = {"": torch.get_rng_state(), "python": random.getstate()}
    if _numpy_is_plain():
        kind, words, *rest = cast(Any, np.random.get_state())
        states["numpy"] = (kind, words.tolist(), *rest)  # plain values, since a checkpoint takes no arrays
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states | {name: generator.get_state() for name, generator in others.items()}


def _put(states: Mapping[str, Any], others: Generators) -> None:
    """Set those generators that are both in ``states`` and in this process."""
    for name, state in states.items():
        if name in ("", "cpu"):
            torch.set_rng_state(state)
        elif name == "python":
            random.setstate(state)
        elif name == "numpy" and _numpy_is_plain():
            np.random.set_state(state)
        elif name.startswith("cuda:"):
            if torch.cuda.is_initialized() and int(name[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)
        elif name in others:
            others[name].set_state(state)


def _numpy_is_plain() -> bool:
    """Whether NumPy's global generator is its default, not another kind that the user has set."""
    return type(np.random.mtrand._rand._bit_generator) is np.random.MT19937


# ruff: noqa: NPY002 (these are the global generators' own functions)
