"""How often the host waits for the device, counted on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ELSEWHERE = torch.device("meta")  # CPU tensors report this device, so that reading them does not look free


@dataclass
class Counter:
    """How often the host has waited for the device, and the tensors on the host, which are free to read."""

    reads: int = 0
    hosted: dict[int, Tensor] = field(default_factory=dict)
    working: bool = False  # inside an operation that has only host tensors

    def keep(self, tensors: Any) -> None:
        self.hosted |= {t.untyped_storage()._cdata: t for t in tree_leaves(tensors) if isinstance(t, Tensor)}

    def has(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.hosted

    def read(self, tensor: Any) -> None:
        self.reads += not (self.working or self.has(tensor))


class _Pretence(TorchFunctionMode):
    """Makes tensors report another device, while they stay on the CPU, and counts copies of whole tensors to the host."""

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
    """Counts the operators that bring a value to the host, which has to wait for the device."""

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
    """Count how often the host would wait for a device, on a machine that has none.

    Inside, ``tensor.device.type`` is not "cpu", so that code which reads more often on a CPU, where reading is free, behaves
    as on an accelerator. It counts item, bool, float, int, tolist, numpy, cpu, nonzero, boolean masks and equal.

    >>> with elsewhere() as counter:
    ...     value = float(torch.ones(3).sum())
    >>> value, counter.reads
    (3.0, 1)
    """
    counter = Counter()
    with mock.patch.object(torch, "Generator", _Generator), _Reads(counter), _Pretence(counter):
        yield counter


class _Generator(torch.Generator):
    def __new__(cls, _: Any = None) -> _Generator:
        return super().__new__(cls)
