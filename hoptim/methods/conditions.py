"""Strategies for the condition F(w, λ) = 0: what "trained" means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hoptim.curvature.linearization import Linearization
from hoptim.linalg import dicts
from hoptim.linalg.operators import Operator
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
    second moments v̂ held fixed. Without a decay, or if the inner optimizer is not known, c = 0 and A is the Hessian. Where
    the loss is flat, c > 0 makes A positive. If hoptim does not know how an optimizer applies its ``weight_decay``, a
    warning says that it is left out; a decay under another name, or in a hook, it can't see.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), theorem 1.

    >>> Gradient()
    Gradient()
    """

    def __call__(self, gradient: Linearization, at: At, loop: TrainingContext) -> Linearization:
        """The gradient and the decay with their derivatives."""
        layout, of_gradient = gradient.layout, gradient.mixed
        decay = decay_in_condition(loop, at, layout.unflatten(gradient.value))
        if not decay:
            return gradient
        w = {name: at.shards[name].detach() for name in layout.names}
        by_name = {name: one.expand(w[name].shape) for name, one in decay.items()}
        c = layout.flatten({name: one.detach().to(layout.dtype) for name, one in by_name.items()})
        learned = {name: one for name, one in by_name.items() if one.requires_grad}

        def mixed(x: Tensor) -> OptionalTensors:
            found = of_gradient(x)
            if not learned:
                return found
            parts = layout.unflatten(x)
            pulls = {name: (parts[name] * w[name]).to(one.dtype) for name, one in learned.items()}
            return dicts.add(found, VJP(learned, at.leaves)(pulls, x.ndim > 1))

        value = torch.addcmul(gradient.value, c, layout.flatten(w))
        return replace(gradient, value=value, A=gradient.A + c, mixed=mixed)


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
