"""How the benchmark measures time and memory: CPU seconds of calls made in turn, and the peak of the live tensors."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Calls = dict[str, Callable[[], Any]]
SAMPLE = 0.02  # CPU seconds that a measurement takes at least


@dataclass(frozen=True)
class Row:
    """One line of a section's table.

    Attributes:
        case: the problem.
        labels: further labels of the line, by column.
        figures: the measured values by column; a string is a note.
        at_most: targets by column: the largest value allowed.
        at_least: targets by column: the smallest value allowed.
    """

    case: str
    labels: dict[str, str]
    figures: dict[str, float | str]
    at_most: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)


def in_turn(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call in each round. A short call is repeated, so that a measurement takes long enough."""
    repeats = {}
    for name, call in calls.items():
        call()  # warm up
        repeats[name] = max(1, round(SAMPLE / max(seconds(call), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(calls[name], repeats[name]))
    return times


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    """CPU seconds of one call, the mean of ``repeats``."""
    begun = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begun) / repeats


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    """The median over rounds of the time of ``name`` over that of ``to``."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


class Held(TorchDispatchMode):
    """Counts the bytes of the live tensor storages that were created inside this context: now, and at the peak.

    It sees every operator, those of a backward pass too. Unlike resident memory, the numbers are exact and repeatable. It
    does not see the scratch memory of an operator, nor Python objects.
    """

    now = most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in before:
                before.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return outputs

    def _freed(self, size: int) -> None:
        self.now -= size


def peak(call: Callable[[], Any], warm: bool = True) -> tuple[float, float]:
    """The peak of ``call`` in MB, and the MB still held after its result is dropped, before garbage collection."""
    if warm:
        with Held():  # do not count what is imported or cached at first use
            call()
    gc.collect()
    gc.disable()
    with Held() as held:
        call()
    gc.enable()
    return held.most / 1e6, held.now / 1e6
