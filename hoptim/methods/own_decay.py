"""The inner optimizer's own weight decay as a part of F: training ends where it and the gradient are in balance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, optim

from hoptim.linalg.vectors import Tensors
from hoptim.methods.inner_step import check_differentiable, is_differentiable, kind_of
from hoptim.methods.learned_options import bound_options, value_of
from hoptim.methods.method import TrainingContext
from hoptim.problem.problem import At
from hoptim.problem.sharding import local

DECAYS = ("weight_decay", "lambd")  # ASGD shrinks weights by λ as well


def own_decay(loop: TrainingContext, at: At, gradient: Tensors) -> Tensors:
    """c by weight name, of the weight's shape or of one number, where training ends at ∇_w L_T + c ⊙ w = 0.

    Coupled decay is added to the gradient, so that c is the group's ``weight_decay``. Decoupled decay, as AdamW's, is added
    to the step ∇L_T / D, so that c = ``weight_decay`` · D. For AdamW D = √v̂ + ε, with the second moments v̂ held fixed.

    Args:
        loop: the inner optimizer, and which of its options are learned.
        at: has the tensors in place of the leaves, to which a learned decay has a graph.
        gradient: ∇_w L_T by name. Before the first step of a weight v̂ is its square, as after a step with it.
    """
    inner, fixed = loop.inner, {name: leaf.detach() for name, leaf in at.leaves.items()}
    if inner is None or not is_differentiable(inner):
        return {}
    kind, name_of = kind_of(inner), {id(p): name for name, p in at.problem.weights().items()}
    found: Tensors = {}
    for number, group in enumerate(inner.param_groups):
        check_differentiable(kind, number, group, loop.learned, DECAYS)
        options = bound_options(number, group, loop.learned)
        values = [value_of(options[key], at.leaves) for key in DECAYS if key in options]
        present = {key: value_of(option, fixed) for key, option in options.items()}
        held = {name_of[id(p)]: p for p in group["params"] if id(p) in name_of}
        for name, p in held.items():
            if name in gradient and any(isinstance(value, Tensor) or value for value in values):
                decay = sum(values) * (-1 if group.get("maximize") else 1)
                state = {key: local(value) for key, value in inner.state.get(p, {}).items()}
                scale = _scale(kind, present, state, gradient[name]) if _is_decoupled(group) else 1.0
                product = decay * scale
                found[name] = (
                    product if isinstance(product, Tensor) else torch.full((), product, dtype=p.dtype, device=p.device)
                )
    return found


def doubt_of_decay(loop: TrainingContext, weights: Tensors) -> str | None:
    """Why the inner optimizer's own weight decay is not in F as it should be; ``None`` if it is."""
    inner = loop.inner
    if inner is None or not (groups := [group for group in inner.param_groups if _decays(group)]):
        return None
    name = type(inner).__name__
    if not is_differentiable(inner):
        return (
            f"hoptim does not know how {name} applies its weight_decay of {groups[0]['weight_decay']}, so that the "
            "condition Gradient() leaves it out, and the hypergradient is that of a training without it. Set it to 0 and "
            "put the decay into train_loss, as hoptim.recipes.WeightDecay does"
        )
    decoupled = [p for group in groups if _is_decoupled(group) for p in group["params"]]
    fresh = [p for p in decoupled if not inner.state.get(p) and any(p is w for w in weights.values())]
    if not fresh:
        return None
    return (
        f"{name} has taken no step with {len(fresh)} of its weights, so that the second moments by which its weight_decay "
        "counts are not known: they are taken to be this gradient's. Give the optimizer that trained the model"
    )


def doubt_of_momentum(loop: TrainingContext) -> str | None:
    """Why the condition ``Update`` may be off: the first moment is fixed in it, and a decoupled decay is not.

    ``None`` if options are learned, which ``Gradient`` does not see.
    """
    groups = [] if loop.inner is None else [group for group in loop.inner.param_groups if _decays(group)]
    if loop.learned or not any(_is_decoupled(group) and float(group["betas"][0]) > 0 for group in groups):
        return None
    return (
        f"the condition Update() holds the first moment of {type(loop.inner).__name__} fixed, so that its decoupled "
        "weight_decay counts 1 / (1 - beta1) times beside the gradient. Take the condition Gradient(), which has it right, "
        "or hoptim.Unrolled"
    )


def _decays(group: Mapping[str, Any]) -> bool:
    decay = group.get("weight_decay", 0)
    return isinstance(decay, (int, float, Tensor)) and bool(torch.as_tensor(decay).any())


def _is_decoupled(group: Mapping[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay"))


def _scale(kind: type[optim.Optimizer], group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor) -> Tensor:
    """D of Adam, AdamW, NAdam or RAdam, whose step is lr · ∇L_T / D if the gradient was always the same."""
    beta1, beta2 = (float(beta) for beta in group["betas"])
    t = float(state["step"]) if state else 1.0
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"]) if state else (1 - beta2) * gradient.square()
    root, correction, epsilon = v.sqrt(), (1 - beta2**t) ** 0.5, float(group["eps"])
    if kind is optim.NAdam:
        product = float(state["mu_product"]) if state else _mu(beta1, 1, group)
        share = (1 - _mu(beta1, t, group)) / (1 - product)
        following = _mu(beta1, t + 1, group)
        following *= (1 - beta1**t) / (1 - product * following)
        return (root / correction + epsilon) / (share + following)
    if kind is optim.RAdam:
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / (1 - beta2**t)
        if length <= 5:
            return torch.ones_like(root)
        rectified = ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5
        return (root + epsilon) / (correction * rectified)
    return root / correction + epsilon


def _mu(beta1: float, t: float, group: Mapping[str, Any]) -> float:
    """NAdam's momentum in step t."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
