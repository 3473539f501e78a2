"""How the benchmark measures: CPU time in turn, the peak of the tensors alive, and the reads of the host."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """One line of a section's table. ``case`` and ``labels`` name it; a figure that is a string is a note.

    ``at_most`` and ``at_least`` hold the targets by column.
    """

    case: str
    labels: dict[str, str]
    figures: dict[str, float | str]
    at_most: dict[str, float] = field(default_factory=dict)
    at_least: dict[str, float] = field(default_factory=dict)


def in_turn(calls: Calls, rounds: int, at_least: float = 0.02) -> dict[str, list[float]]:
    """CPU seconds a call in each round; each call is repeated until a sample takes ``at_least`` seconds."""
    repeats = {}
    for name, call in calls.items():
        call()  # warm
        repeats[name] = max(1, round(at_least / max(seconds(call, 1), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(seconds(calls[name], repeats[name]))
    return times


def seconds(call: Callable[[], Any], repeats: int = 1) -> float:
    begun = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - begun) / repeats


def ratio(times: dict[str, list[float]], name: str, to: str) -> float:
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


class Held(TorchDispatchMode):
    """Bytes of the tensor storages alive that were made inside, now and at most; each operator is seen, backward's too.

    Exact and repeatable, unlike resident memory. Scratch space inside an operator is not seen, nor are Python's objects.
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
    """The peak of ``call`` in MB, and what is left when its result is dropped and the garbage collector has not run."""
    if warm:
        with Held():  # what is imported or cached at first use is not the call's
            call()
    gc.collect()
    gc.disable()
    with Held() as held:
        call()
    gc.enable()
    return held.most / 1e6, held.now / 1e6


ELSEWHERE = torch.device("meta")  # what a tensor says that is on the CPU, so that a look is not thought free


@dataclass
class Counter:
    """How often the host waited for the device, and what it has got or made of that: to look there is free."""

    reads: int = 0
    hosted: dict[int, Tensor] = field(default_factory=dict)
    working: bool = False  # on what is on the host alone

    def keep(self, tensors: Any) -> None:
        self.hosted |= {t.untyped_storage()._cdata: t for t in tree_leaves(tensors) if isinstance(t, Tensor)}

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.hosted

    def read(self, tensor: Any) -> None:
        self.reads += not (self.working or self.has(tensor))


class _Pretence(TorchFunctionMode):
    """Tensors say that they are elsewhere, and stay where they are; whole copies to the host are counted."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == Tensor.device.__get__:
            return ELSEWHERE
        args, kwargs = tree_map(_back, (args, kwargs or {}))
        if function in (Tensor.tolist, Tensor.numpy):
            self.counter.read(args[0])
        if function is Tensor.cpu:
            self.counter.read(args[0])
            copy = args[0].clone()
            self.counter.keep(copy)
            return copy
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not given or not all(map(self.counter.has, given)) or function is Tensor.to:
            return function(*args, **kwargs)
        self.counter.working = True
        found = function(*args, **kwargs)
        self.counter.working = False
        self.counter.keep(found)
        return found


def _back(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) and value == ELSEWHERE else value


class _Reads(TorchDispatchMode):
    """Counts the operators that bring a value to the host: a device would have to finish before them."""

    host = tuple(getattr(torch.ops.aten, name) for name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"))
    indexing = tuple(getattr(torch.ops.aten, name) for name in ("index", "index_put", "index_put_"))

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = function.overloadpacket
        masked = packet in self.indexing and any(index is not None and index.dtype == torch.bool for index in args[1])
        if masked or packet in self.host:
            self.counter.read(args[0])
        return function(*args, **(kwargs or {}))


@contextmanager
def elsewhere() -> Iterator[Counter]:
    """Count how often the host waits for a device, on a machine that has none.

    Inside, ``tensor.device.type`` is not "cpu", so that code that looks more often on a CPU, where a look is free,
    behaves as on an accelerator. Counted are item, bool, float, int, tolist, numpy, cpu, nonzero, boolean masks and equal.
    """
    counter = Counter()
    with mock.patch.object(torch, "Generator", _Generator), _Reads(counter), _Pretence(counter):
        yield counter


class _Generator(torch.Generator):
    def __new__(cls, _: Any = None) -> _Generator:
        return super().__new__(cls)
