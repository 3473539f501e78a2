"""Strategies for the condition F(w, λ) = 0: what "trained" means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hoptim.curvature.linearization import Linearization
from hoptim.linalg import dicts
from hoptim.linalg.operators import OnFree, Operator
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.linalg.vjp import VJP
from hoptim.methods.decay import decay_in_condition
from hoptim.methods.inner_step import InnerStep
from hoptim.methods.method import TrainingContext
from hoptim.problem.problem import At, as_leaves


class Condition(ABC):
    """A strategy for F: a frozen dataclass that makes F from the linearised gradient of the training loss."""

    @abstractmethod
    def __call__(self, gradient: Linearization, at: At, loop: TrainingContext) -> Linearization:
        """F with its derivatives, from ∇_w L_T with its derivatives."""


@dataclass(frozen=True, kw_only=True)
class Gradient(Condition):
    """Trained means stationary: F = ∇_w L_T + c ⊙ w, with the inner optimizer's own weight decay c, and A = H + diag(c).

    H is the Hessian, or what the curvature puts in its place. If the decay is coupled, as in SGD and Adam, it is added to
    the gradient, and c = ``weight_decay``. If it is decoupled, as in AdamW, c = ``weight_decay``·(√v̂ + ε), with Adam's
    second moments v̂ held fixed. A learned decay may have a centre, and then it is c ⊙ (w − centre); or the norm 1, and then
    it is c ⊙ sign(w − centre), has no part in A, and weights at their centre stay there: A and F are those of the others.
    Without a decay, or if the inner optimizer is not known, c = 0 and A is the Hessian. Where
    the loss is flat, c > 0 makes A positive. If hoptim does not know how an optimizer applies its ``weight_decay``, a
    warning says that it is left out; a decay under another name, or in a hook, it can't see.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), theorem 1.

    >>> Gradient()
    Gradient()
    """

    def __call__(self, gradient: Linearization, at: At, loop: TrainingContext) -> Linearization:
        """The gradient and the decay with their derivatives."""
        layout, of_gradient = gradient.layout, gradient.mixed
        terms = decay_in_condition(loop, at, layout.unflatten(gradient.value))
        if not terms:
            return gradient
        c = layout.flatten({name: t.factor.to(layout.dtype).expand_as(t.direction) for name, t in terms.items()})
        direction = layout.flatten({name: t.direction for name, t in terms.items()})
        value, diagonal, free = torch.addcmul(gradient.value, c, direction), c, None
        if lasso := [name for name, t in terms.items() if t.norm == 1]:
            kinked = layout.flatten({name: torch.ones_like(terms[name].direction) for name in lasso}) > 0
            free = (direction != 0) | ~kinked
            value, diagonal = value * free, c * ~kinked
        A = gradient.A + diagonal
        learned = {name: term for name, term in terms.items() if term.decay.requires_grad}

        def mixed(x: Tensor) -> OptionalTensors:
            found = of_gradient(x)
            if not learned:
                return found
            named, lead = layout.unflatten(x), x.ndim - 1
            by_decay = {
                name: _sum_by_decay(named[name] * term.scale * term.direction, lead + term.decay.ndim, at, name)
                for name, term in learned.items()
            }
            decays = {name: term.decay for name, term in learned.items()}
            return dicts.add(found, VJP(decays, at.leaves)(by_decay, x.ndim > 1))

        return replace(gradient, value=value, A=A if free is None else OnFree(A, free), mixed=mixed, free=free)


def _sum_by_decay(t: Tensor, ndim: int, at: At, name: str) -> Tensor:
    """The sums of a weight's entries that share a decay: over all but the first ``ndim`` axes, and over all ranks."""
    if at.sharding is None:
        return t.sum(tuple(range(ndim, t.ndim))) if ndim < t.ndim else t
    weight, lead = at.sharding.weights[name], t.ndim - len(at.sharding.weights[name].own)
    if ndim == lead:
        return at.sharding.ranks.mean({"": t.flatten(lead).sum(-1) * weight.pieces})[""]
    rows = torch.stack([weight.whole(row) for row in t]) if lead else weight.whole(t)
    return rows.sum(tuple(range(ndim, rows.ndim))) if ndim < rows.ndim else rows


@dataclass(frozen=True, kw_only=True)
class Update(Condition):
    """Trained means that the inner optimizer no longer moves: F = u, where its step is w ← w − u(w, ∇_w L_T(w, λ), λ).

    Its state (momentum buffers, moments, step counts) is held fixed. With P = ∂u/∂∇L_T and D = ∂u/∂w at a fixed gradient,
    A = P·H + D, where H is the Hessian or what the curvature puts in its place. A is not symmetric, so not for CG or MINRES.
    With plain SGD u = lr·∇L_T, and the answer is that of ``Gradient``. The learning rate and the optimizer's own weight
    decay have a hypergradient too, if they are hyperparameters. On an untrained model it can have the wrong sign, so
    :class:`Unrolled` is the default for these.

    Raises:
        ValueError: when called, no inner optimizer is given.
        TypeError: when called, torch can't differentiate the inner optimizer.

    Source: Clarke, Oldewage and Hernández-Lobato 2022 (arXiv 2110.10461).

    >>> Update()
    Update()
    """

    def __call__(self, gradient: Linearization, at: At, loop: TrainingContext) -> Linearization:
        """The update with its derivatives."""
        if loop.inner is None:
            raise ValueError("Update needs the inner optimizer: call hypergradient(..., inner=optimizer)")
        w = {name: at.weights[name] for name in gradient.layout.names}
        G = as_leaves(gradient.layout.unflatten(gradient.value))
        step = InnerStep.of(loop.inner, at.problem.weights(), at.problem.leaves(), learned=loop.learned)
        moved, _ = step.step(w, G, at.leaves)
        held = {name for group in step.groups for name in group.names}
        u = {name: value - moved[name] for name, value in w.items() if name in held}
        fixed = tuple(name for name in w if name not in held)
        if not u:
            raise ValueError(
                f"the inner optimizer moves none of the weights {list(fixed)}: give the one that trains the model"
            )
        layout = Layout.of({name: w[name] for name in u})
        update = _Update(u, w, G, at.leaves, layout, gradient)
        return Linearization(
            loss=gradient.loss,
            layout=layout,
            value=layout.flatten(u).detach(),
            A=_Jacobian(update),
            mixed=update.mixed,
            untouched=gradient.untouched,
            fixed=fixed,
        )


class _Update:
    """u(w, G, λ) with its graph, where the leaf G stands for ∇_w L_T, and the linearised gradient itself.

    Attributes:
        layout: the layout of u: the weights that the optimizer moves.
        gradient: ∇_w L_T with its derivatives, for the weights that the training loss depends on.
    """

    def __init__(self, u: Tensors, w: Tensors, G: Tensors, leaves: Tensors, layout: Layout, gradient: Linearization) -> None:
        self.u, self.leaves, self.layout, self.gradient = u, leaves, layout, gradient
        self._inputs = {("w", name): value for name, value in w.items()} | {("G", name): value for name, value in G.items()}

    def back(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Dᵀv on the weights of u, and Pᵀv on those of the gradient, where P = ∂u/∂G and D = ∂u/∂w."""
        found = VJP(self.u, self._inputs)(self.layout.unflatten(v), v.ndim > 1)
        by_weight, by_gradient = ({n: t for (k, n), t in found.items() if k == kind} for kind in ("w", "G"))
        lead = v.shape[:-1]
        return self.layout.flatten(by_weight, lead), self.gradient.layout.flatten(by_gradient, lead)

    def along(self, v: Tensor, dG: Tensor) -> Tensor:
        """D v + P dG: the derivative of qᵀ(D, P), which is linear in q, along (v, dG)."""
        q = {name: torch.zeros_like(value, requires_grad=True) for name, value in self.u.items()}
        found = torch.autograd.grad(
            list(self.u.values()), list(self._inputs.values()), list(q.values()), create_graph=True, allow_unused=True
        )
        rows = {key: t for key, t in zip(self._inputs, found, strict=True) if t is not None and t.requires_grad}
        tangents = {"w": self.layout.unflatten(v), "G": self.gradient.layout.unflatten(dG)}
        lead = v.shape[:-1]
        along = {
            (kind, name): tangents[kind].get(name, torch.zeros(()).to(t).expand((*lead, *t.shape)))
            for (kind, name), t in rows.items()
        }
        return self.layout.flatten(VJP(rows, q)(along, v.ndim > 1), lead)

    def mixed(self, x: Tensor) -> OptionalTensors:
        """Bᵀx = (∂u/∂λ)ᵀx at a fixed gradient + (∂∇L_T/∂λ)ᵀ Pᵀx."""
        own = VJP(self.u, self.leaves)(self.layout.unflatten(x), x.ndim > 1)
        return dicts.add(own, self.gradient.mixed(self.back(x)[1]))


class _Jacobian(Operator):
    """A = P·H + D on the weights that the optimizer moves; the others are held fixed."""

    def __init__(self, update: _Update, *, transposed: bool = False) -> None:
        super().__init__(update.layout, is_fixed=update.gradient.A.is_fixed)
        self.update, self.H, self.transposed = update, update.gradient.A, transposed

    @property
    def T(self) -> Operator:  # noqa: N802
        """Aᵀ = H·Pᵀ + Dᵀ."""
        return _Jacobian(self.update, transposed=not self.transposed)

    def __matmul__(self, v: Tensor) -> Tensor:
        own, whole = self.update.layout, self.update.gradient.layout
        if self.transposed:
            D_v, P_v = self.update.back(v)
            return D_v + own.flatten(whole.unflatten(self.H.T @ P_v), v.shape[:-1])
        return self.update.along(v, self.H @ whole.flatten(own.unflatten(v), v.shape[:-1]))
