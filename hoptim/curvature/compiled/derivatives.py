"""L_T, F = ∇_w L_T, A v and Bᵀv at one point as one function of tensors, to be traced: see ``compiled.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.trees import Found, Tree
from hoptim.problem.composite_loss import LossParts
from hoptim.problem.functional import in_place_of
from hoptim.problem.problem import Problem

Derivatives = tuple[Tensor, Found, Found, Found]  # L_T, F, A v, Bᵀv
Then = Callable[[Tensor, LossParts | None], Derivatives]
Way = Literal["forward", "reverse"]


def derivatives(
    problem: Problem, point: tuple[Tree, Tree, Tree, Tree, Tree, Any], v: Tree, way: Way, gauss_newton: bool
) -> Derivatives:
    """L_T, F, A v and Bᵀv at ``point``: w, λ, frozen weights, constant hyperparameters, buffers and the batch.

    forward: the derivative of (∇_w L, ∇_λ L) along v by dual numbers: the fewest operations, but not each of torch's has the
    formula. reverse: a second backward pass.
    """
    weights, leaves, frozen, constant, buffers, batch = point
    weights = {name: t.detach().requires_grad_() for name, t in weights.items()}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    forward = way == "forward"
    then = _forward(weights, leaves, gauss_newton) if forward else _reverse(weights, leaves, v, gauss_newton)

    given = {id(live): buffers[name] for name, live in problem.joint.named_buffers()}
    with torch.enable_grad(), forward_ad.dual_level(), in_place_of(list(problem.joint.modules()), given):
        at = {name: forward_ad.make_dual(w, v[name]) for name, w in weights.items()} if forward else weights
        loss, *found = problem.pure("train_loss", at | frozen, leaves | constant, batch, then)
    F, product, mixed = ({name: None if t is None else t.detach() for name, t in tree.items()} for tree in found)
    return loss.detach(), F, product, mixed


def _forward(weights: Tree, leaves: Tree, gauss_newton: bool) -> Then:
    def then(loss: Tensor, parts: LossParts | None) -> Derivatives:
        both = _grad(loss, {("w", name): w for name, w in weights.items()} | {("λ", name): t for name, t in leaves.items()})
        F = {name: both["w", name] for name in weights}
        value = {name: _part(t, 0) for name, t in F.items()}
        mixed = {name: _part(both["λ", name], 1) for name in leaves}
        if not gauss_newton:
            return forward_ad.unpack_dual(loss).primal, value, {name: _part(t, 1) for name, t in F.items()}, mixed
        assert parts is not None
        product: Found = dict.fromkeys(weights)
        z, Jv = forward_ad.unpack_dual(parts.z)
        if Jv is not None:
            at = z.detach().requires_grad_()
            HJv = _part(_grad(parts.criterion(forward_ad.make_dual(at, Jv.detach())), {"z": at})["z"], 1)
            if HJv is not None:
                product = {name: _part(t, 0) for name, t in _grad(parts.z, weights, HJv.detach()).items()}
        if parts.penalty is not None:
            second = _grad(parts.penalty, weights)
            product = {name: trees.sum_of(product[name], _part(second[name], 1)) for name in weights}
        return forward_ad.unpack_dual(loss).primal, value, product, mixed

    return then


def _reverse(weights: Tree, leaves: Tree, v: Tree, gauss_newton: bool) -> Then:
    def pulled(F: Found, u: Tree, inputs: Tree) -> Found:
        outputs = {name: t for name, t in F.items() if t is not None and t.requires_grad}
        if not outputs:
            return dict.fromkeys(inputs)
        u = {name: u[name] for name in outputs}
        found = torch.autograd.grad(
            list(outputs.values()), list(inputs.values()), list(u.values()), retain_graph=True, allow_unused=True
        )
        return dict(zip(inputs, found, strict=True))

    def then(loss: Tensor, parts: LossParts | None) -> Derivatives:
        F = _grad(loss, weights, create_graph=True)
        mixed = pulled(F, v, leaves)
        if not gauss_newton:
            return loss, F, pulled(F, v, weights), mixed
        assert parts is not None
        product: Found = dict.fromkeys(weights)
        u = torch.zeros_like(parts.z).requires_grad_()  # Jᵀu is linear in u: its derivative along v is J v
        Jv = pulled(_grad(parts.z, weights, u, create_graph=True), v, {"u": u})["u"]
        if Jv is not None:
            at = parts.z.detach().requires_grad_()
            HJv = pulled(_grad(parts.criterion(at), {"z": at}, create_graph=True), {"z": Jv}, {"z": at})["z"]
            if HJv is not None:
                product = _grad(parts.z, weights, HJv)
        if parts.penalty is not None:
            second = pulled(_grad(parts.penalty, weights, create_graph=True), v, weights)
            product = {name: trees.sum_of(product[name], second[name]) for name in weights}
        return loss, F, product, mixed

    return then


def _grad(output: Tensor, inputs: dict[Any, Tensor], v: Tensor | None = None, create_graph: bool = False) -> dict[Any, Any]:
    if not output.requires_grad:
        return dict.fromkeys(inputs)
    found = torch.autograd.grad(
        output, list(inputs.values()), v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return dict(zip(inputs, found, strict=True))


def _part(dual: Tensor | None, which: Literal[0, 1]) -> Tensor | None:
    """A dual number's value (0) or its tangent (1)."""
    return None if dual is None else forward_ad.unpack_dual(dual)[which]
