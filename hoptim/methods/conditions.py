"""Strategies for the condition F(w, λ) = 0: what "trained" means."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from hoptim.curvature.linearization import Linearization, Point
from hoptim.linalg import trees
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Found, Tree
from hoptim.linalg.vjp import vjp
from hoptim.methods.inner_step import InnerStep


class Condition(ABC):
    """A strategy for F: a frozen dataclass that makes it from the linearised gradient of the training loss."""

    @abstractmethod
    def __call__(self, gradient: Linearization, point: Point, inner: Optimizer | None) -> Linearization:
        """F with its derivatives, from ∇_w L_T with its own."""


@dataclass(frozen=True, kw_only=True)
class Gradient(Condition):
    """Trained means stationary: F = ∇_w L_T, so that A is the Hessian.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), theorem 1.

    >>> Gradient()
    Gradient()
    """

    def __call__(self, gradient: Linearization, point: Point, inner: Optimizer | None) -> Linearization:
        """The gradient itself."""
        return gradient


@dataclass(frozen=True, kw_only=True)
class Update(Condition):
    """Trained means that the inner optimizer no longer moves: F = u, where its step is w ← w − u(w, ∇_w L_T(w, λ), λ).

    Its state (momentum buffers, moments, step counts) is held fixed. With P = ∂u/∂∇L_T and D = ∂u/∂w at a fixed gradient,
    A = P·H + D for the Hessian, or what the curvature puts in its place: not symmetric, so that CG and MINRES will not do.
    With plain SGD u = lr·∇L_T, and the answer is that of ``Gradient``. Only here do the learning rate and the optimizer's
    own weight decay have a hypergradient, when they are tensors among the hyperparameters.

    Raises:
        ValueError: when called, no inner optimizer is given.
        TypeError: when called, the inner optimizer is none of those that torch can differentiate.

    Source: Clarke, Oldewage and Hernández-Lobato 2022 (arXiv 2110.10461).

    >>> Update()
    Update()
    """

    def __call__(self, gradient: Linearization, point: Point, inner: Optimizer | None) -> Linearization:
        """The update with its derivatives."""
        if inner is None:
            raise ValueError("Update needs the inner optimizer: call hypergradient(..., inner=optimizer)")
        w = {name: point.weights[name] for name in gradient.value}
        G = {name: value.detach().clone().requires_grad_() for name, value in gradient.value.items()}
        dynamics = InnerStep.of(inner, *point.live)
        moved, _ = dynamics.step(w, G, point.leaves)
        held = {name for group in dynamics.groups for name in group.names}
        u = {name: value - moved[name] for name, value in w.items() if name in held}
        still = [name for name in w if name not in held]
        if not u:
            raise ValueError(f"the inner optimizer moves none of the weights {still}: give the one that trains the model")
        return Linearization(
            loss=gradient.loss,
            value=trees.map_tree(torch.Tensor.detach, u),
            A=_Jacobian(u, {name: w[name] for name in u}, G, gradient.A),
            mixed=_mixed(u, G, point.leaves, gradient),
            untouched=gradient.untouched,
            fixed=tuple(still),
        )


class _Jacobian(Operator):
    """A = P·H + D on the weights that the optimizer moves, the others being fixed."""

    def __init__(self, u: Tree, w: Tree, G: Tree, H: Operator, *, transposed: bool = False) -> None:
        super().__init__({name: value.detach() for name, value in w.items()})
        self.u, self.w, self.G, self.H, self.transposed = u, w, G, H, transposed

    def __matmul__(self, v: Tree) -> Tree:
        return self._pulled(v) if self.transposed else self._pushed(v)

    @property
    def T(self) -> Operator:  # noqa: N802
        """Aᵀ = H·Pᵀ + Dᵀ."""
        return _Jacobian(self.u, self.w, self.G, self.H, transposed=not self.transposed)

    def _pulled(self, v: Tree) -> Tree:
        """Aᵀv: back through the update, then through the Hessian."""
        batched = self.is_batched(v)
        back = _pull(self.u, v, {"w": self.w, "G": self.G}, batched)
        through = self.H.T @ back["G"]
        return {name: through[name] + part for name, part in back["w"].items()}

    def _pushed(self, v: Tree) -> Tree:
        """A v, from the derivative of ⟨u, q⟩'s gradient along q: the product with Pᵀ and Dᵀ is linear in q."""
        batched = self.is_batched(v)
        whole = {name: v[name] if name in v else _zeros(value, v, self.like) for name, value in self.H.like.items()}
        tangent = {"w": v, "G": self.H @ whole}
        q = trees.map_tree(lambda value: torch.zeros_like(value, requires_grad=True), self.u)
        inputs = {f"{kind}:{name}": value for kind, tree in (("w", self.w), ("G", self.G)) for name, value in tree.items()}
        found = torch.autograd.grad(
            list(self.u.values()), list(inputs.values()), list(q.values()), create_graph=True, allow_unused=True
        )
        rows = {key: part for key, part in zip(inputs, found, strict=True) if part is not None and part.requires_grad}
        along = {key: tangent[key[0]][key[2:]] for key in rows}
        pushed = vjp(rows, along, q, batched=batched)
        return trees.filled(pushed, v)


def _zeros(value: torch.Tensor, v: Tree, like: Tree) -> torch.Tensor:
    """A zero entry for a weight that ``v`` does not have, with v's leading axis if there is one."""
    name, first = next(iter(v.items()))
    return value.new_zeros((*first.shape[: first.ndim - like[name].ndim], *value.shape))


def _pull(u: Tree, v: Tree, inputs: dict[str, Tree], batched: bool) -> dict[str, Tree]:
    """vᵀ ∂u/∂inputs, with zeros for what u does not depend on."""
    flat = {f"{kind}:{name}": value for kind, tree in inputs.items() for name, value in tree.items()}
    found = vjp(u, v, flat, batched=batched)
    lead = next(iter(v.values())).shape[:1] if batched else ()
    full = {key: flat[key].new_zeros((*lead, *flat[key].shape)) if part is None else part for key, part in found.items()}
    return {kind: {name: full[f"{kind}:{name}"] for name in tree} for kind, tree in inputs.items()}


def _mixed(u: Tree, G: Tree, leaves: Tree, gradient: Linearization) -> Callable[[Tree], Found]:
    """x ↦ Bᵀx = (∂u/∂λ)ᵀx at a fixed gradient + (∂∇L_T/∂λ)ᵀPᵀx."""

    def mixed(x: Tree) -> Found:
        name, value = next(iter(x.items()))
        batched = value.ndim > u[name].ndim
        own = vjp(u, x, leaves, batched=batched)
        through = gradient.mixed(_pull(u, x, {"G": G}, batched)["G"])
        return {name: trees.sum_of(own[name], through[name]) for name in leaves}

    return mixed
