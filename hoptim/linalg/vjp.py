"""Products with the transposed Jacobian, through an autograd graph that is kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hoptim.linalg import dicts

Named = Mapping[Any, Tensor]  # by names, or by any other keys
End = Tensor | GradientEdge  # of a graph: a tensor, or its place there, which does not hold the values

AT_ONCE = 2**20  # the longest vectors that go through the graph several at once: longer ones take 1.5 to 2.3 times as long
# With these nodes vectors go one by one: torch's batched rule for group norm is wrong, and convolutions are slower (1.08).
_ONE_BY_ONE = ("NativeGroupNorm", "Convolution")


def end_of(t: Tensor) -> End:
    """The place of a tensor in its graph; the tensor itself, if a node in Python made it, which alone keeps no graph alive.

    >>> w = torch.ones(1, requires_grad=True)
    >>> VJP({"w": end_of(w**2)}, {"w": w})({"w": torch.ones(1)})
    {'w': tensor([2.])}
    """
    return t if isinstance(t.grad_fn, BackwardCFunction) else get_gradient_edge(t)


def nodes(ends: Iterable[End]) -> dict[Any, int]:
    """All nodes of the graph behind these ends, numbered as they are found, which depends on the graph alone.

    >>> w = torch.ones(1, requires_grad=True)
    >>> sorted(node.name() for node in nodes([2 * w.exp()]))
    ['ExpBackward0', 'MulBackward0', 'torch::autograd::AccumulateGrad']
    """
    seen: dict[Any, int] = {}
    todo: list[Any] = [end.grad_fn if isinstance(end, Tensor) else end.node for end in ends]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = len(seen)
            todo += [following for following, _ in node.next_functions]
    return seen


def ends_of(t: Tensor) -> set[int]:
    """The ids of the leaves in the graph of a tensor.

    >>> w = torch.ones(1, requires_grad=True)
    >>> ends_of(2 * w) == ends_of(w) == {id(w)}
    True
    """
    return {id(t)} if t.grad_fn is None else {id(node.variable) for node in nodes([t]) if hasattr(node, "variable")}


def no_second_derivative(why: str) -> TypeError:
    """The error for a missing second derivative."""
    return TypeError(f"the training loss has no second derivative: {why}. Take curvature=hoptim.FiniteDifference()")


class VJP:
    """v ↦ vᵀ ∂outputs/∂inputs by named tensors; R products where each tensor of v has a leading axis of R.

    The R vectors go through the graph at once, or one by one if torch cannot do that or they are long. The products of
    inputs in ``taken`` are left out, since a hook takes them.

    Raises:
        TypeError: when called, an operation has no second derivative.

    >>> w = torch.ones(2, requires_grad=True)
    >>> VJP({"w": w**2}, {"w": w})({"w": torch.tensor([1.0, 3.0])})
    {'w': tensor([2., 6.])}
    """

    def __init__(self, outputs: Mapping[Any, End], inputs: Named, taken: Collection[Any] = ()) -> None:
        self._names = tuple(outputs)
        self._outputs: Any = tuple(outputs.values())
        self._keys, self._inputs = tuple(inputs), tuple(inputs.values())
        self._taken = taken
        self._at_once: bool | None = None  # not yet decided

    def __call__(self, v: Named, batched: bool = False) -> dict[Any, Tensor | None]:
        """The product by the names of the inputs; ``None`` for an input that the outputs do not depend on."""
        if not self._outputs or not self._inputs:
            return dict.fromkeys(self._keys)
        try:
            if not batched:
                return self._back(v)
            if self._at_once is None:
                self._at_once = self._can_at_once(v)
            if self._at_once:
                return self._back(v, is_grads_batched=True)
        except RuntimeError as error:
            if "derivative" in str(error) and "is not implemented" in str(error):
                raise no_second_derivative(str(error).rstrip(".")) from error
            if not batched:
                raise
            self._at_once = False  # some operation has no rule for several vectors at once
        rows = len(next(iter(v.values())))
        return dicts.stack([self._back({name: t[row] for name, t in v.items()}) for row in range(rows)])

    def _back(self, v: Named, **options: bool) -> dict[Any, Tensor | None]:
        vectors = tuple([v[name] for name in self._names])
        if _run_backward is not None and not options:
            found = _run_backward(self._outputs, vectors, True, False, self._inputs, True, accumulate_grad=False)
        else:
            found = torch.autograd.grad(
                self._outputs, self._inputs, vectors, retain_graph=True, allow_unused=True, **options
            )
        named = dict(zip(self._keys, found, strict=True))
        return {key: None if key in self._taken else t for key, t in named.items()} if self._taken else named

    def _can_at_once(self, v: Named) -> bool:
        if sum(v[name][0].numel() for name in self._names) > AT_ONCE:
            return False
        return not any(node.name().startswith(_ONE_BY_ONE) for node in nodes(self._outputs))


# What autograd.grad calls after checking its arguments. A kept graph does not need these checks each time, and they take 3 %
# to 8 % of a small product. If a version of torch lacks this function, autograd.grad is used.
_run_backward: Any = getattr(getattr(torch.autograd.Variable, "_execution_engine", None), "run_backward", None)
