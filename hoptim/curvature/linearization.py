"""F(w, λ) at one point, and products with A = ∂F/∂w and B = ∂F/∂λ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import dicts
from hoptim.linalg.operators import Embedded, Operator, Symmetric
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors, aypx_, scale_
from hoptim.linalg.vjp import VJP, End, end_of
from hoptim.problem.composite_loss import LossParts
from hoptim.problem.distributed import OverRanks
from hoptim.problem.problem import At
from hoptim.problem.sharded_passes import ShardedPasses
from hoptim.problem.sharding import OverShards, Sharding

Draw = Callable[[], Any]  # draws another training batch
Onto = Callable[[Tensors, Tensor | float, Tensors], OptionalTensors]  # (y, a, v) ↦ A v, as in SymmetricByName
Product = Callable[[Tensors, bool], OptionalTensors]  # of named tensors; the second argument says if each is R of them


@dataclass(frozen=True, kw_only=True)
class Linearization:
    """F and its derivatives at one point.

    ``value`` is a vector that a solve need not hold. So nothing that lives as long holds a linearization: functions like
    ``mixed`` take what they need out of one, and contexts yield it without a name for it.

    Attributes:
        loss: L_T, detached.
        layout: the weights that the training loss touches, as laid out in a flat vector.
        value: F, detached, of shape (n,).
        A: ∂F/∂w on these weights.
        mixed: x ↦ Bᵀx by the names of the hyperparameters, or R of them; ``None`` for one that F does not depend on.
        untouched: the weights that the training loss does not touch.
        fixed: the weights that it touches but the inner optimizer does not hold; known to the condition ``Update`` alone.
        is_on_shards: whether vectors are of shards, and A and F means over the ranks; see :func:`on_shards`.
        free: which weights may move, where others rest at a kink of the loss, of shape (n,); ``None`` for all.
    """

    loss: Tensor
    layout: Layout
    value: Tensor
    A: Operator
    mixed: Callable[[Tensor], OptionalTensors]
    untouched: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    is_on_shards: bool = False
    free: Tensor | None = None

    def on(self, layout: Layout) -> Linearization:
        """The same for the weights of another layout: zero for those that this one does not have."""
        if layout == self.layout:
            return self
        own, of_own = self.layout, self.mixed

        def mixed(x: Tensor) -> OptionalTensors:
            return of_own(own.flatten(layout.unflatten(x), x.shape[:-1]))

        value = layout.flatten(own.unflatten(self.value))
        return replace(self, layout=layout, value=value, A=Embedded(self.A, own, layout), mixed=mixed)


class Curvature(ABC):
    """A strategy for A = ∂F/∂w: a frozen dataclass that linearises F = ∇_w L_T at a point."""

    @property
    def is_first_order(self) -> bool:
        """Whether first derivatives are enough for it."""
        return False

    @abstractmethod
    def linearize(self, at: At, batch: Any, draw: Draw | None = None) -> AbstractContextManager[Linearization]:
        """F and its derivatives on a training batch, for use inside the context.

        Args:
            at: weights and hyperparameters, from :meth:`Problem.at`; for a curvature of first order on a sharded model, from
                :func:`~hoptim.problem.live.at_live`.
            batch: the training batch.
            draw: draws another one; ``None`` if there is no source of more.
        """


class GradientGraph:
    """F = ∇_w L_T with its graph kept: every product with A = ∂F/∂w and B = ∂F/∂λ is one backward pass through it.

    The graph costs one training gradient with ``create_graph=True``, a product 0.9 to 1.9 gradients more. Dropout masks are
    part of the graph: one mask for a whole solve.

    Args:
        loss: L_T, computed from ``weights`` and ``leaves``.
        weights: w, leaves that require a gradient.
        leaves: λ, likewise.
        parts: the parts of the loss, if it is a ``CompositeLoss``.
        passes: how backward passes save memory, if weights are sharded. Then vectors are of shards, F and A means over the
            ranks.

    Attributes:
        value: F, detached, of shape (n,).

    Raises:
        TypeError: a weight has a sparse gradient.
    """

    def __init__(
        self,
        loss: Tensor,
        weights: Tensors,
        leaves: Tensors,
        parts: LossParts | None = None,
        passes: ShardedPasses | None = None,
    ) -> None:
        self.loss, self.parts, self.leaves, self.passes = loss, parts, leaves, passes
        with self.passing() as taken:
            gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True, allow_unused=True)
        found = dict(zip(weights, gradients, strict=True))
        check_dense(found)
        present = dicts.present(found)
        self.weights = {name: weights[name] for name in present}
        self.untouched = tuple(name for name in weights if name not in present)
        own = present if passes is None else passes.shards(present, taken)
        self.layout = Layout.of(own)
        self.value = self.layout.flatten(own).detach()
        self._outputs = {name: end_of(t) for name, t in present.items() if t.requires_grad}

    def passing(self, *, is_wanted: bool = True) -> AbstractContextManager[Tensors]:
        """Inside, backward passes save memory, if weights are sharded."""
        return nullcontext({}) if self.passes is None else self.passes.passing(is_wanted=is_wanted)

    def vjp(self, inputs: Tensors) -> VJP:
        """v ↦ vᵀ ∂F/∂inputs."""
        return VJP(self._outputs, inputs)

    def to_weights(self, outputs: Mapping[str, End]) -> VJP:
        """v ↦ vᵀ ∂outputs/∂w, for :meth:`symmetric`."""
        if self.passes is None:
            return VJP(outputs, self.weights)
        self.passes.take_parts(outputs.values())
        return VJP(outputs, self.weights, self.passes.large)

    def symmetric(self, product: Product) -> Symmetric:
        """The symmetric operator of a product of weights by name."""
        passes = self.passes
        if passes is None:
            return SymmetricByName(product, self.layout)

        def onto(y: Tensors, a: Tensor | float, v: Tensors) -> OptionalTensors:
            large = {name: scale_(t, a) for name, t in y.items() if name in passes.large}
            return passes.product(lambda whole: product(whole, False), v, to_weights=True, onto=large)

        return SymmetricByName(self._sharded(product, to_weights=True), self.layout, onto)

    def _sharded(self, product: Product, *, to_weights: bool) -> Product:
        """A product of whole weights as one of shards, if weights are sharded."""
        passes = self.passes
        if passes is None:
            return product

        def of_shards(v: Tensors, batched: bool) -> OptionalTensors:
            rows = (
                [{name: t[row] for name, t in v.items()} for row in range(len(next(iter(v.values()))))] if batched else [v]
            )
            found = [passes.product(lambda whole: product(whole, False), row, to_weights=to_weights) for row in rows]
            return dicts.stack(found) if batched else found[0]  # no call of itself, which would keep the graph in memory

        return of_shards

    def hessian(self) -> Operator:
        """A = ∂F/∂w, the Hessian of L_T: symmetric, so that vᵀA is A v."""
        return self.symmetric(self.to_weights(self._outputs))

    def linearization(self, A: Operator) -> Linearization:
        """F with its derivatives, given A."""
        return Linearization(
            loss=self.loss.detach(),
            layout=self.layout,
            value=self.value,
            A=A,
            mixed=on_flat(self._sharded(self.vjp(self.leaves), to_weights=False), self.layout),
            untouched=self.untouched,
            is_on_shards=self.passes is not None,
        )


class SymmetricByName(Symmetric):
    """The symmetric operator of a product of named tensors.

    Args:
        product: of a vector by name, or of R of them.
        layout: of a vector.
        onto: (y, a, v) ↦ the product with one vector v; for pieces that it has added to those of a·y, these.
    """

    def __init__(self, product: Product, layout: Layout, onto: Onto | None = None) -> None:
        flat = on_flat(product, layout)
        super().__init__(lambda v: layout.flatten(flat(v), v.shape[:-1]), like=layout)
        self._layout, self._onto = layout, onto or (lambda _y, _a, v: product(v, False))

    def product_onto_(self, y: Tensor, a: Tensor | float, v: Tensor) -> Tensor:
        """y ← A v + a·y in place; returns y."""
        if v.ndim > 1 or torch.float16 in self._layout.dtypes:
            return super().product_onto_(y, a, v)
        views = self._layout.views(y)
        if isinstance(a, Tensor) and a.device.type == "cpu":
            a = a.item()  # once for all pieces
        found = self._onto(views, a, self._layout.unflatten(v))
        for name, t in views.items():
            piece = found.pop(name, None)
            if piece is None:
                scale_(t, a)
            elif piece is not t:
                aypx_(t, a, piece.to(t))
        return y


def on_flat(product: Product, layout: Layout) -> Callable[[Tensor], OptionalTensors]:
    """A linear function of named tensors as a function of their flat vector, or of R of them.

    If weights are in float16, each vector is scaled to a largest entry of 1 for the product, since small ones would vanish.
    """

    def apply(v: Tensor) -> OptionalTensors:
        return product(layout.unflatten(v), v.ndim > 1)

    def scaled(v: Tensor) -> OptionalTensors:
        largest = v.abs().amax(-1)
        size = torch.where(largest > 0, largest, 1.0)
        found = apply(v / size[..., None])
        return {name: None if t is None else _times(t, size) for name, t in found.items()}

    return scaled if torch.float16 in layout.dtypes else apply


def _times(t: Tensor, size: Tensor) -> Tensor:
    """t in float32 or wider, each of R rows times its own size."""
    return t.to(torch.promote_types(t.dtype, torch.float32)) * size.reshape((*size.shape, *[1] * (t.ndim - size.ndim)))


def over_ranks(local: Linearization, at: At) -> Linearization:
    """F and its derivatives averaged over the ranks; a weight is in if any of them touches it."""
    ranks = at.problem.ranks
    if ranks.size == 1:
        return local
    if at.sharding is not None:
        return _over_shards(local, at, at.sharding)
    loss, found = ranks.mean_with_loss(local.loss, local.layout.unflatten(local.value), at.weights)
    value = dicts.present(found)
    here = local.on(Layout.of({name: at.weights[name] for name in value}))
    own = here.mixed
    return replace(
        here,
        loss=loss,
        value=here.layout.flatten(value),
        A=OverRanks(here.A, ranks),
        mixed=lambda x: ranks.mean_of_found(own(x), at.leaves, x.shape[:-1]),
        untouched=tuple(name for name in at.weights if name not in value),
    )


def on_shards(own: Linearization, at: At) -> Linearization:
    """The same on vectors of shards, with the mean of A and F over the ranks, if weights are sharded.

    Each rank linearises its own loss at whole weights. A product gathers its vector and scatters the mean.
    """
    if at.sharding is None or own.is_on_shards:
        return own
    ones = {name: w.new_ones(()) for name, w in at.weights.items()}
    touched = at.sharding.ranks.mean_of_found({name: ones[name] for name in own.layout.names}, ones)  # by any rank
    here = own.on(Layout.of({name: at.weights[name] for name in dicts.present(touched)}))
    space = at.sharding.vectors(here.layout)
    A, mixed = here.A, here.mixed
    return replace(
        here,
        layout=space.shards,
        value=space.mean(here.value),
        A=Symmetric(lambda v: space.mean(A @ space.gathered(v)), like=space.shards, is_fixed=A.is_fixed),
        mixed=lambda x: mixed(space.gathered(x)),
        untouched=tuple(name for name in at.weights if touched[name] is None),
        is_on_shards=True,
    )


def _over_shards(own: Linearization, at: At, sharding: Sharding) -> Linearization:
    """F and its derivatives on shards, averaged over the ranks."""
    sharding.check_losses(own.loss)
    here, ranks = on_shards(own, at), sharding.ranks
    mixed = here.mixed
    return replace(
        here,
        loss=ranks.mean({"": own.loss})[""],
        A=OverShards(here.A, sharding.vectors(here.layout)),
        mixed=lambda x: ranks.mean_of_found(mixed(x), at.leaves, x.shape[:-1]),
    )


def check_dense(gradients: Mapping[str, Tensor | None]) -> None:
    """Raise ``TypeError`` if a gradient is sparse."""
    if sparse := [name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse]:
        raise TypeError(f"the weights {sparse} have sparse gradients: build their layers with sparse=False")
