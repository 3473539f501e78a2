"""Backward passes of sharded models, in which a whole gradient or vector exists for a few weights at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.linalg.vjp import End, nodes
from hoptim.problem.distributed import Ranks, all_gather
from hoptim.problem.sharding import Sharding


class ShardedPasses:
    """Backward passes through whole weights that take vectors of shards, and give shards of means over the ranks.

    The gradient of a large weight becomes a shard of the mean as soon as a pass has it, and a large piece of a vector is
    gathered when a pass comes to it. In their places stand tensors of zeros that take no memory. The pieces that are not
    large are gathered before a pass, and averaged after it.

    The collectives are in the order of the pass. That is the same on all ranks if their graphs are: see :func:`are_alike`.

    Args:
        weights: whole weights, leaves that require a gradient.
        sharding: how they are sharded.
    """

    def __init__(self, weights: Tensors, sharding: Sharding) -> None:
        self.sharding, self.large = sharding, frozenset(sharding.large(weights))
        self._weights, self._v = weights, Tensors()
        self._taken: Tensors | None = None  # inside a pass, the means of the gradients of large weights
        self._is_wanted = True

    @contextmanager
    def passing(self, *, is_wanted: bool = True, onto: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[Tensors]:
        """Inside, backward passes are such passes; yields the shards of the gradients of large weights, as far as wanted.

        Those of weights in ``onto`` are added to the tensors there.
        With ``create_graph=True`` the graph of such a gradient takes its part of the vector that :meth:`product` was given.
        """
        hooks = [self._weights[name].register_hook(partial(self._replaced, name)) for name in self.large]
        self._taken, self._is_wanted = dict(onto), is_wanted
        try:
            yield self._taken
        finally:
            self._taken = None
            for hook in hooks:  # which would keep the weights in memory
                hook.remove()

    def take_parts(self, ends: Iterable[End]) -> None:
        """Let passes without a graph, from these tensors on, take each part of a large weight's gradient by itself.

        A Hessian-vector product has two parts for each weight, far apart in the pass, and the first would wait for the
        second. The parts that a linear layer or an elementwise function gives are taken; others wait.
        """
        name_of = {id(self._weights[name]): name for name in self.large}
        for node in nodes(ends):
            for n, (following, _) in enumerate(node.next_functions):
                is_transposed = following is not None and following.name() == "TBackward0"
                end = following.next_functions[0][0] if is_transposed else following
                name = name_of.get(id(getattr(end, "variable", None)))
                if name is not None and (is_transposed or node.name() != "TBackward0"):
                    node.register_hook(partial(self._part_taken, n, name, is_transposed))

    def _part_taken(self, n: int, name: str, is_transposed: bool, gradients: tuple[Tensor | None, ...], _: Any) -> Any:
        part, weight = gradients[n], self._weights[name]
        if self._taken is None or torch.is_grad_enabled() or part is None or part.is_sparse:
            return None
        gradient = part.t() if is_transposed else part
        if (gradient.shape, gradient.dtype) != (weight.shape, weight.dtype):  # autograd has yet to reduce or cast it
            return None
        self._take(name, gradient)
        return tuple(None if k == n else gradient for k, gradient in enumerate(gradients))

    def _take(self, name: str, gradient: Tensor) -> None:
        """Add a gradient's mean to what was taken."""
        assert self._taken is not None
        if self._is_wanted:
            mean = self.sharding.weights[name].mean(gradient.detach())
            self._taken[name] = self._taken[name].add_(mean) if name in self._taken else mean

    def _replaced(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """The gradient of a large weight, which is taken, as zeros; there is none where all its parts were taken."""
        if gradient is None or gradient.is_sparse:
            return None
        self._take(name, gradient)
        if torch.is_grad_enabled() and gradient.requires_grad:
            found: Tensor = _Late.apply(gradient, partial(self._gathered, name))
            return found
        return _nothing(gradient)

    def _gathered(self, name: str) -> Tensor:
        """The whole piece of the vector for this weight."""
        return self.sharding.weights[name].whole(self._v[name])

    def shards(self, gradients: Mapping[str, Tensor | None], taken: Tensors) -> Tensors:
        """The shards of the means of these gradients, of which ``taken`` has those of large weights."""
        small = {name: t for name, t in gradients.items() if t is not None and name not in self.large}
        means = {**taken, **self.sharding.mean_small(small)}
        return {name: means[name] for name in gradients if name in means}

    def product(
        self,
        product: Callable[[Tensors], OptionalTensors],
        v: Tensors,
        *,
        to_weights: bool,
        onto: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> OptionalTensors:
        """``product`` of the vector whose shards are v; the shards of its mean if it is one of weights.

        The shards of large weights in ``onto`` are added to the tensors there, which are then what it returns of them.
        """
        small = {name: shard for name, shard in v.items() if name not in self.large}
        whole = {
            **self.sharding.whole_small(small),
            **{name: _nothing(self._weights[name]) for name in v.keys() & self.large},
        }
        self._v = v
        try:
            with self.passing(is_wanted=to_weights, onto=onto) as taken:
                found = product(whole)
        finally:
            self._v = {}
        return dict(self.shards({**dict.fromkeys(taken), **found}, taken)) if to_weights else found


class _Late(torch.autograd.Function):
    """Zeros in place of a gradient; its backward pass takes the vector from ``gather``."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, gather: Callable[[], Tensor]) -> Tensor:
        ctx.gather = gather
        return _nothing(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gather(), None


def _nothing(like: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return like.new_zeros(()).expand(like.shape)


def are_alike(loss: Tensor, ranks: Ranks) -> bool:
    """Whether the graphs of all ranks' losses have the same operations in the same order, so that passes are alike."""
    number = nodes([loss])
    rows = [(node.name(), [number.get(following) for following, _ in node.next_functions]) for node in number]
    made = sorted(number, key=lambda node: (node._sequence_nr(), number[node]))
    rows += [("made", [number[node] for node in made])]
    digest = hashlib.sha256(repr(rows).encode()).digest()[:7]
    own = torch.tensor([int.from_bytes(digest, "big")], device=loss.device)
    every = own.new_empty(ranks.size)
    all_gather(every, own, ranks.group)
    return bool((every == own).all())
