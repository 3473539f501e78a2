"""Going back through a graph of autograd that is kept, for one vector or for several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hoptim import trees
from hoptim.trees import Found, Tree

_WRONG_AT_ONCE = "NativeGroupNorm"  # torch's rule for several vectors at once fails here, or answers wrongly
_KEY = "hoptim: one by one"


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


def check_given(name: str, loss: Tensor, live: Mapping[int, str]) -> None:
    """Raise where a loss goes past the tensors it is given to the live ones: by a list of parameters made beforehand."""
    ends = (node for node in nodes([loss]) if node.name().endswith("AccumulateGrad"))
    if past := sorted({live[id(node.variable)] for node in ends if id(node.variable) in live}):
        raise ValueError(
            f"{name} uses {past[:5]} past the model and hparams that it is given, so that their derivative would be missed: "
            "take them from its arguments, inside the loss, not from a list or a value made before"
        )


def not_twice(why: str) -> TypeError:
    """The error where a second derivative is missing."""
    return TypeError(f"the training loss has no second derivative: {why}. Take curvature=hoptim.FiniteDifference()")


def pulled_back(outputs: Tree, v: Tree, inputs: Tree, *, batched: bool) -> Found:
    """vᵀ ∂outputs/∂inputs through a graph that is kept; ``batched``: R products, at once where torch can.

    Raises:
        TypeError: an operation has no second derivative.
    """
    try:
        if not batched:
            return _one(outputs, v, inputs)
        return _row_by_row(outputs, v, inputs) if _is_wrong_at_once(outputs) else _at_once(outputs, v, inputs)
    except RuntimeError as error:
        if "derivative" in str(error) and "is not implemented" in str(error):
            raise not_twice(str(error).rstrip(".")) from error
        if not batched:
            raise
    return _row_by_row(outputs, v, inputs)  # an operation without a rule for several at once


def _one(outputs: Tree, v: Tree, inputs: Tree) -> Found:
    ends, vectors = tuple(outputs.values()), tuple(v[name] for name in outputs)
    if _engine is not None:  # autograd.grad without what it looks at each time: a tenth of a small product
        found = _engine(ends, vectors, True, False, tuple(inputs.values()), True, accumulate_grad=False)
    else:
        found = torch.autograd.grad(ends, list(inputs.values()), vectors, retain_graph=True, allow_unused=True)
    return dict(zip(inputs, found, strict=True))


def _at_once(outputs: Tree, v: Tree, inputs: Tree) -> Found:
    ends, vectors = tuple(outputs.values()), tuple(v[name] for name in outputs)
    found = torch.autograd.grad(
        ends, list(inputs.values()), vectors, retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    return dict(zip(inputs, found, strict=True))


def _row_by_row(outputs: Tree, v: Tree, inputs: Tree) -> Found:
    return trees.stack_found([_one(outputs, trees.part(v, row), inputs) for row in range(trees.length(v))])


def _is_wrong_at_once(outputs: Tree) -> bool:
    """Looked up in the graph once, and written down there."""
    first: Any = next(iter(outputs.values())).grad_fn
    known = {} if first is None else first.metadata
    if _KEY not in known:
        known[_KEY] = any(node.name().startswith(_WRONG_AT_ONCE) for node in nodes(outputs.values()))
    return bool(known[_KEY])


_engine = getattr(torch.autograd.graph, "_engine_run_backward", None)  # private; without it autograd.grad serves
