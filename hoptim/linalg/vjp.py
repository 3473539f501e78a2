"""Going back through a graph of autograd that is kept, for one vector or for several."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.trees import Found, Tree

_WRONG_AT_ONCE = "NativeGroupNorm"  # torch's rule for several vectors at once fails here, or answers wrongly
_KEY = "hoptim: one by one"

Tensors = tuple[Tensor, ...]


def nodes(ends: Iterable[Tensor]) -> set[Any]:
    """All that autograd may go through from here.

    >>> w = torch.ones(1, requires_grad=True)
    >>> sorted(node.name() for node in nodes([2 * w.exp()]))
    ['ExpBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: set[Any] = set()
    todo: list[Any] = [end.grad_fn for end in ends]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return seen


def not_twice(why: str) -> TypeError:
    """The error where a second derivative is missing."""
    return TypeError(f"the training loss has no second derivative: {why}. Take curvature=hoptim.FiniteDifference()")


def vjp(outputs: Tree, v: Tree, inputs: Tree, *, batched: bool) -> Found:
    """vᵀ ∂outputs/∂inputs, once."""
    return VJP(outputs, inputs)(v, batched)


class VJP:
    """v ↦ vᵀ ∂outputs/∂inputs through a graph that is kept; with ``batched`` for R vectors, at once where torch can.

    Raises:
        TypeError: when called, an operation has no second derivative.

    >>> w = torch.ones(2, requires_grad=True)
    >>> VJP({"w": w**2}, {"w": w})({"w": torch.tensor([1.0, 3.0])})
    {'w': tensor([2., 6.])}
    """

    def __init__(self, outputs: Tree, inputs: Tree) -> None:
        self._names, self._ends = tuple(outputs), tuple(outputs.values())
        self._keys, self._inputs = tuple(inputs), tuple(inputs.values())
        on_cpu = all(end.device.type == "cpu" for end in self._ends)
        self._back = _run if on_cpu else _autograd

    def __call__(self, v: Tree, batched: bool = False) -> Found:
        """The product, by the names of the inputs; ``None`` for one that the outputs do not depend on."""
        if not self._ends or not self._inputs:
            return dict.fromkeys(self._keys)
        try:
            if not batched:
                return self._one(v)
            return self._row_by_row(v) if _is_wrong_at_once(self._ends) else self._at_once(v)
        except RuntimeError as error:
            if "derivative" in str(error) and "is not implemented" in str(error):
                raise not_twice(str(error).rstrip(".")) from error
            if not batched:
                raise
        return self._row_by_row(v)  # an operation without a rule for several at once

    def _one(self, v: Tree) -> Found:
        return dict(
            zip(self._keys, self._back(self._ends, tuple([v[name] for name in self._names]), self._inputs), strict=True)
        )

    def _at_once(self, v: Tree) -> Found:
        vectors = [v[name] for name in self._names]
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": True}
        return dict(zip(self._keys, torch.autograd.grad(self._ends, self._inputs, vectors, **options), strict=True))

    def _row_by_row(self, v: Tree) -> Found:
        return trees.stack_found([self._one(trees.part(v, row)) for row in range(trees.length(v))])


def _autograd(ends: Tensors, vectors: Tensors, inputs: Tensors) -> Tensors:
    return torch.autograd.grad(ends, inputs, vectors, retain_graph=True, allow_unused=True)


def _engine(ends: Tensors, vectors: Tensors, inputs: Tensors) -> Tensors:
    """As ``autograd.grad``, without what that looks at and keeps for other threads each time: a tenth of a small product."""
    return tuple(_BACKWARD(ends, vectors, True, False, inputs, True, accumulate_grad=False))


def _is_wrong_at_once(ends: Tensors) -> bool:
    """Looked up in the graph once, and written down there."""
    first: Any = ends[0].grad_fn
    known = {} if first is None else first.metadata
    if _KEY not in known:
        known[_KEY] = any(node.name().startswith(_WRONG_AT_ONCE) for node in nodes(ends))
    return bool(known[_KEY])


# Private; without it autograd.grad serves. On a CPU a backward pass stays in the thread that asks for it.
_BACKWARD: Any = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)
_run = _autograd if _BACKWARD is None else _engine
