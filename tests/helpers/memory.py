"""The most memory that tensors take at once, counted from their storages: the same in each run."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hoptim


class Peak(TorchDispatchMode):
    """Inside, ``bytes`` is the most that tensors take at once which operations inside have made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._now = 0
        self._live: dict[int, int] = {}  # the size of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it has made."""
        given = {id(t.untyped_storage()) for t in _plain((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in _plain(out):
            storage = t.untyped_storage()
            if id(storage) not in given and id(storage) not in self._live:
                self._live[id(storage)] = storage.nbytes()
                self._now += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage))
        self.bytes = max(self.bytes, self._now)
        return out

    def _free(self, key: int) -> None:
        self._now -= self._live.pop(key)


def _plain(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if type(t) in (Tensor, nn.Parameter)]


def wide_problem(model: nn.Module | None = None) -> hoptim.Problem:
    """A net of 33,000 weights in two matrices, whose activations take little beside them."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64))
    hparams = nn.ParameterDict({"weight": torch.tensor(0.5)})
    train = hoptim.CompositeLoss(lambda m, h, x: m(x), lambda z, h, x: h["weight"] * (z - 1).square().mean())
    return hoptim.Problem(model, hparams, train, lambda m, h, x: m(x).square().mean())


def vectors_held(problem: hoptim.Problem, method: hoptim.Implicit, inner: Any = None) -> float:
    """The most memory that a hypergradient takes, in vectors."""
    x = torch.randn(2, 1, 64)
    hoptim.hypergradient(problem, x[0], x[1], method, inner=inner)  # checks what is checked once
    with Peak() as peak:
        found = hoptim.hypergradient(problem, x[0], x[1], method, inner=inner)
    assert found.solution.products == 5
    return peak.bytes / sum(p.nbytes for p in problem.model.parameters())
