"""The weight decay of the inner optimizer, with a learned decay for single weights, in three forms.

A coupled decay, as of SGD and Adam, is added to the gradient: ∇L_T + λ⊙w. A decoupled one, as of AdamW, is taken off the
weights before the step: w − lr·λ⊙w. :class:`RealDecay` does so in the optimizer's own steps, :func:`decayed` as a pure
function of one weight, and :func:`decay_in_condition` is its part in F: training ends where it balances the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, optim

from hoptim.linalg.vectors import Tensors
from hoptim.methods.kinds import check_differentiable, is_differentiable, kind_of
from hoptim.methods.learned_options import LearnedOption, bound_decays, bound_options, value_of
from hoptim.methods.method import TrainingContext
from hoptim.problem.problem import At, Problem
from hoptim.problem.sharding import local

DECAYS = ("weight_decay", "lambd")  # ASGD shrinks weights by λ as well


def decayed(w: Tensor, gradient: Tensor, decay: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """A weight and its gradient, as a step of an optimizer with the options ``group`` takes them if it has this decay.

    >>> decayed(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor(0.5), {"lr": 0.1})
    (tensor([2.]), tensor([2.]))
    >>> decayed(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor(0.5), {"lr": 0.1, "decoupled_weight_decay": True})
    (tensor([1.9000]), tensor([1.]))
    """
    pull = (spread(decay, w) * w).to(w.dtype)
    if _is_decoupled(group):
        return w - group["lr"] * pull, gradient
    return w, gradient - pull if group.get("maximize") else gradient + pull


def spread(decay: Tensor, w: Tensor) -> Tensor:
    """A decay whose shape begins that of w, as a factor of w."""
    return decay if decay.ndim == w.ndim else decay.reshape(*decay.shape, *[1] * (w.ndim - decay.ndim))


class RealDecay:
    """The learned decays of single weights in the optimizer's own steps.

    Their natural values are computed once for each value of the leaves. For such a step the group's own number is 0, and
    its other weights get it here, too.
    """

    def __init__(self) -> None:
        self._learned: Sequence[LearnedOption] = ()
        self._places: list[tuple[LearnedOption, Tensor, Tensor]] = []  # with the leaf and the weight
        self._seen: list[tuple[Any, ...]] = []
        self._decays: dict[int, tuple[list[Tensor], list[Tensor]]] = {}  # weights and their λ, by group

    def step(
        self,
        inner: optim.Optimizer,
        closure: Callable[[], Any] | None,
        learned: Sequence[LearnedOption],
        problem: Problem,
    ) -> Any:
        """One step of ``inner``; gradients are as before after it."""
        self._look(inner, learned, problem)
        if not self._decays:
            return inner.step() if closure is None else inner.step(closure)
        groups, kept = [inner.param_groups[number] for number in self._decays], list[tuple[Tensor, Tensor]]()
        numbers = [group["weight_decay"] for group in groups]

        def decay_weights() -> None:
            for group, number, (weights, decays) in zip(groups, numbers, self._decays.values(), strict=True):
                kept.extend(_decay_in_place(group, float(number), weights, decays))

        def decay_after_closure() -> Any:
            assert closure is not None
            loss = closure()
            decay_weights()
            return loss

        try:
            if closure is None:
                decay_weights()
            for group in groups:
                group["weight_decay"] = 0.0
            return inner.step() if closure is None else inner.step(decay_after_closure)
        finally:
            for group, number in zip(groups, numbers, strict=True):
                group["weight_decay"] = number
            for p, gradient in kept:
                p.grad = gradient

    def _look(self, inner: optim.Optimizer, learned: Sequence[LearnedOption], problem: Problem) -> None:
        """Compute the decays again if a leaf or a group's number has changed."""
        if learned is not self._learned:
            live = dict(problem.named_parameters())
            decays = [option for option in learned if option.is_decay]
            self._places = [(o, problem.hparams.get_parameter(o.name), live[str(o.member)]) for o in decays]
            self._learned, self._seen, self._decays = learned, [], {}
        groups = inner.param_groups
        seen = [(leaf.data_ptr(), leaf._version, groups[o.group]["weight_decay"]) for o, leaf, _ in self._places]
        if seen == self._seen:
            return
        self._seen, self._decays = seen, {}
        for option, leaf, p in self._places:
            decay = option.bound(groups[option.group]).value({option.name: leaf.detach()})
            weights, values = self._decays.setdefault(option.group, ([], []))
            weights.append(p)
            values.append(spread(decay, p).to(p))


@torch.no_grad()
def _decay_in_place(
    group: Mapping[str, Any], number: float, weights: list[Tensor], decays: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Decay the weights of a group that have a gradient; returns those whose ``grad`` is another one now, with the old."""
    own = [(p, decay) for p, decay in zip(weights, decays, strict=True) if p.grad is not None]
    known = {id(p) for p in weights} if number else set()
    others = [p for p in group["params"] if number and p.grad is not None and id(p) not in known]
    weights, decays = [p for p, _ in own], [decay for _, decay in own]
    if _is_decoupled(group):
        lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
        if weights:
            torch._foreach_addcmul_(weights, weights, decays, value=-lr)
        if others:
            torch._foreach_mul_(others, 1 - lr * number)
        return []
    sign = -1 if group.get("maximize") else 1
    kept = [(p, p.grad) for p in (*weights, *others) if p.grad is not None]
    found: list[Tensor] = []
    if weights:
        found += torch._foreach_addcmul([g for _, g in kept[: len(weights)]], weights, decays, value=sign)
    if others:
        found += torch._foreach_add([g for _, g in kept[len(weights) :]], others, alpha=sign * number)
    for (p, _), gradient in zip(kept, found, strict=True):
        p.grad = gradient
    return kept


def decay_in_condition(loop: TrainingContext, at: At, gradient: Tensors) -> Tensors:
    """c by weight name, of the weight's shape or one that broadcasts to it, where training ends at ∇_w L_T + c ⊙ w = 0.

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
        learned = bound_decays(number, group, loop.learned)
        held = {name_of[id(p)]: p for p in group["params"] if id(p) in name_of}
        for name, p in held.items():
            own = [spread(learned[name].value(at.leaves), p), *values[1:]] if name in learned else values
            if name in gradient and any(isinstance(value, Tensor) or value for value in own):
                decay = reduce(add, own)
                state = {key: local(value) for key, value in inner.state.get(p, {}).items()}
                scale = _scale(kind, present, state, gradient[name]) if _is_decoupled(group) else 1.0
                product = (-decay if group.get("maximize") else decay) * scale
                found[name] = (
                    product if isinstance(product, Tensor) else torch.full((), product, dtype=p.dtype, device=p.device)
                )
    return found


def doubt_of_decay(loop: TrainingContext, weights: Tensors) -> str | None:
    """Why the inner optimizer's own weight decay is not in F as it should be; ``None`` if it is."""
    inner = loop.inner
    by_weight = {option.group for option in loop.learned if option.is_decay}
    every = [] if inner is None else enumerate(inner.param_groups)
    if not (groups := [group for number, group in every if number in by_weight or _has_decay(group)]):
        return None
    assert inner is not None
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
    groups = [] if loop.inner is None else [group for group in loop.inner.param_groups if _has_decay(group)]
    if loop.learned or not any(_is_decoupled(group) and float(group["betas"][0]) > 0 for group in groups):
        return None
    return (
        f"the condition Update() holds the first moment of {type(loop.inner).__name__} fixed, so that its decoupled "
        "weight_decay counts 1 / (1 - beta1) times beside the gradient. Take the condition Gradient(), which has it right, "
        "or hoptim.Unrolled"
    )


def _has_decay(group: Mapping[str, Any]) -> bool:
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
    return root.div_(correction).add_(epsilon)


def _mu(beta1: float, t: float, group: Mapping[str, Any]) -> float:
    """NAdam's momentum in step t."""
    return beta1 * (1 - 0.5 * 0.96 ** (t * group["momentum_decay"]))
