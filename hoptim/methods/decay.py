"""The weight decay of the inner optimizer, with a learned decay for single weights, in three forms.

A coupled decay, as of SGD and Adam, is added to the gradient: ∇L_T + λ⊙(w − c), where c is zero or a given centre. A
decoupled one, as of AdamW, is taken off the weights before the step: w − lr·λ⊙(w − c). Of norm 1 it is the proximal step of
Σ λ|w − c|: after the step, w − c moves towards zero by lr·λ, and stays zero where it was nearer. :class:`RealDecay` does so
in the optimizer's own steps, :func:`decayed` and :func:`shrunk` as pure functions of one weight, and
:func:`decay_in_condition` is its part in F: training ends where it balances the gradient.

Sources: Loshchilov and Hutter 2019, Decoupled weight decay regularization; Li, Grandvalet and Davoine 2018, Explicit
inductive bias for transfer learning (the centre); Parikh and Boyd 2014, Proximal algorithms, section 6.5.2 (norm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, optim

from hoptim.curvature.linearization import check_dense
from hoptim.linalg.vectors import Tensors
from hoptim.methods.kinds import check_differentiable, is_differentiable, kind_of
from hoptim.methods.learned_options import PLAIN, LearnedOption, Pull, bound_decays, bound_options, value_of
from hoptim.methods.method import TrainingContext
from hoptim.problem.problem import At, Problem
from hoptim.problem.sharding import ShardedWeight, local

DECAYS = ("weight_decay", "lambd")  # ASGD shrinks weights by λ as well


# As pure functions of one weight


def decayed(
    w: Tensor, gradient: Tensor, decay: Tensor, group: Mapping[str, Any], pull: Pull = PLAIN
) -> tuple[Tensor, Tensor]:
    """A weight and its gradient, as a step of an optimizer with the options ``group`` takes them if it has this decay.

    >>> decayed(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor(0.5), {"lr": 0.1})
    (tensor([2.]), tensor([2.]))
    >>> decayed(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor(0.5), {"lr": 0.1, "decoupled_weight_decay": True})
    (tensor([1.9000]), tensor([1.]))
    """
    if pull.norm == 1:
        return w, gradient
    change = (spread(decay, w) * from_centre(w, pull)).to(w.dtype)
    if pull.is_decoupled(group):
        return w - group["lr"] * change, gradient
    return w, gradient - change if group.get("maximize") else gradient + change


def shrunk(w: Tensor, size: Tensor, pull: Pull) -> Tensor:
    """A weight after the step, moved towards its centre by ``size``, or to it: the soft threshold of a decay of norm 1.

    >>> shrunk(torch.tensor([2.0, -0.2]), torch.tensor(0.5), Pull(norm=1))
    tensor([1.5000, 0.0000])
    """
    far, size = from_centre(w, pull), spread(size, w).to(w.dtype)
    return torch.where(far.abs() > size, w - far.sign() * size, 0.0 if pull.centre is None else pull.centre)


def spread(decay: Tensor, w: Tensor) -> Tensor:
    """A decay whose shape begins that of w, as a factor of w."""
    return decay if decay.ndim == w.ndim else decay.reshape(*decay.shape, *[1] * (w.ndim - decay.ndim))


def from_centre(w: Tensor, pull: Pull) -> Tensor:
    """w − c."""
    return w if pull.centre is None else w - pull.centre


# In the optimizer's own steps


Own = tuple[Any, Tensor, Pull]  # a weight, its λ, and how it pulls, these two on the part that this rank holds


class _GroupDecay(NamedTuple):
    """The weights of a parameter group by what a step does with them.

    Attributes:
        number: the group's own ``weight_decay``.
        beside: those whose decay is taken off them.
        added: those whose decay is added to their gradients.
        lasso: those that shrink after the step.
        others: those that have the group's number.
    """

    number: Any
    beside: list[Own]
    added: list[Own]
    lasso: list[Own]
    others: list[Any]

    @classmethod
    def of(cls, group: Mapping[str, Any], own: Sequence[Own]) -> _GroupDecay:
        """Those of a group in which these weights have learned decays."""
        number, known = group["weight_decay"], {id(p) for p, *_ in own}
        squared = [one for one in own if one[2].norm == 2]
        return cls(
            number=number,
            beside=[one for one in squared if one[2].is_decoupled(group)],
            added=[one for one in squared if not one[2].is_decoupled(group)],
            lasso=[one for one in own if one[2].norm == 1],
            others=[p for p in group["params"] if float(number) and id(p) not in known],
        )


class RealDecay:
    """The learned decays of single weights in the optimizer's own steps.

    Their natural values are computed once for each value of the leaves. For such a step the group's own number is 0, and
    its other weights get it here, too.
    """

    def __init__(self) -> None:
        self._learned: Sequence[LearnedOption] = ()
        self._places: list[tuple[LearnedOption, Tensor, Any, Pull]] = []  # with the leaf, the weight, and how it is pulled
        self._seen: list[tuple[Any, ...]] = []
        self._decays: dict[int, _GroupDecay] = {}

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
        groups = [(inner.param_groups[number], decay) for number, decay in self._decays.items()]
        kept: list[tuple[Any, Any]] = []

        def decay_weights() -> None:
            for group, decay in groups:
                kept.extend(_decay_in_place(group, decay))

        def decay_after_closure() -> Any:
            assert closure is not None
            loss = closure()
            decay_weights()
            return loss

        try:
            if closure is None:
                decay_weights()
            for group, _ in groups:
                group["weight_decay"] = 0.0
            result = inner.step() if closure is None else inner.step(decay_after_closure)
        finally:
            for group, decay in groups:
                group["weight_decay"] = decay.number
            for p, gradient in kept:
                p.grad = gradient
        for group, decay in groups:
            _shrink_in_place(group, decay)
        return result

    def _look(self, inner: optim.Optimizer, learned: Sequence[LearnedOption], problem: Problem) -> None:
        """Compute the decays again if a leaf or a group's number has changed."""
        if learned is not self._learned:
            live: dict[str, Any] = dict(problem.named_parameters())
            decays = [(option, live[str(option.member)]) for option in learned if option.is_decay]
            self._places = [
                (option, problem.hparams.get_parameter(option.name), p, _pull_on_shard(option.pull, p))
                for option, p in decays
            ]
            self._learned, self._seen, self._decays = learned, [], {}
        groups = inner.param_groups
        seen = [(leaf.data_ptr(), leaf._version, groups[option.group]["weight_decay"]) for option, leaf, *_ in self._places]
        if seen == self._seen:
            return
        check_dense({str(option.member): p.grad for option, _, p, _ in self._places})
        own: dict[int, list[Own]] = {}
        for option, leaf, p, pull in self._places:
            decay = option.bound(groups[option.group]).value({option.name: leaf.detach()})
            own.setdefault(option.group, []).append((p, _on_shard(spread(decay, p).to(local(p)), p), pull))
        self._seen, self._decays = seen, {number: _GroupDecay.of(groups[number], some) for number, some in own.items()}


def _on_shard(t: Tensor, p: Any) -> Tensor:
    """A whole tensor like p, or that broadcasts to it, on the part of p that this rank holds."""
    if not hasattr(p, "device_mesh") or not t.ndim:
        return t
    return local(t) if hasattr(t, "device_mesh") else ShardedWeight.of(p, None).shard(t.expand(p.shape))


def _pull_on_shard(pull: Pull, p: Any) -> Pull:
    return pull if pull.centre is None else pull._replace(centre=_on_shard(pull.centre, p))


def _with_gradient(own: Sequence[Own]) -> tuple[list[Any], list[Tensor], list[Tensor]]:
    """The weights that have a gradient, and on this rank their λ and w − c."""
    found = [one for one in own if one[0].grad is not None]
    far = [from_centre(local(p.detach()), pull) for p, _, pull in found]
    return [p for p, *_ in found], [decay for _, decay, _ in found], far


@torch.no_grad()
def _decay_in_place(group: Mapping[str, Any], decay: _GroupDecay) -> list[tuple[Any, Any]]:
    """Decay the weights of a group that have a gradient; returns those whose ``grad`` is another one now, with the old."""
    params, values, far = _with_gradient(decay.beside)
    if params:
        torch._foreach_addcmul_([local(p) for p in params], far, values, value=-_lr_of(group))
    others = [p for p in decay.others if p.grad is not None]
    if others and group.get("decoupled_weight_decay"):
        torch._foreach_mul_([local(p) for p in others], 1 - _lr_of(group) * float(decay.number))
        others = []
    params, values, far = _with_gradient(decay.added)
    kept, sign = [(p, p.grad) for p in (*params, *others)], -1 if group.get("maximize") else 1
    if params:
        found = torch._foreach_addcmul([_gradient_on_shard(p) for p in params], far, values, value=sign)
        for p, gradient in zip(params, found, strict=True):
            p.grad = ShardedWeight.of(p, None).tensor(gradient) if hasattr(p, "device_mesh") else gradient
    for p in others:
        p.grad = torch.add(p.grad, p, alpha=sign * float(decay.number))
    return kept


@torch.no_grad()
def _shrink_in_place(group: Mapping[str, Any], decay: _GroupDecay) -> None:
    """Move weights towards their centres after the step, where the decay is of norm 1."""
    for p, size, pull in decay.lasso:
        if p.grad is not None:
            w = local(p)
            w.copy_(shrunk(w, _lr_of(group) * size, pull))


def _gradient_on_shard(p: Any) -> Tensor:
    return local(p.grad.redistribute(placements=p.placements)) if hasattr(p, "device_mesh") else p.grad


def _lr_of(group: Mapping[str, Any]) -> float:
    lr = group["lr"]
    return lr.item() if isinstance(lr, Tensor) else lr


# In F


class Term(NamedTuple):
    """The part s·λ⊙(w − c) of F for one weight, or s·λ⊙sign(w − c), on the part that this rank holds.

    Attributes:
        decay: λ, of a shape that begins the whole weight's, with a graph to the leaves if it is learned.
        scale: s = ±D, a number or of the weight's shape.
        factor: s·λ, of a shape that broadcasts to the weight's.
        direction: w − c or its sign.
        norm: 2 or 1. Where the sign is 0, a weight of norm 1 stays at its centre, and is not free.
    """

    decay: Tensor
    scale: Tensor | float
    factor: Tensor
    direction: Tensor
    norm: int


def decay_in_condition(loop: TrainingContext, at: At, gradient: Tensors) -> dict[str, Term]:
    """By weight name, the decay's part in F: training ends at ∇_w L_T + s·λ⊙(w − c) = 0.

    Coupled decay is added to the gradient, so that s is 1, or −1 if the optimizer maximizes. Decoupled decay, as AdamW's, is
    added to the step ∇L_T / D, so that s = D. For AdamW D = √v̂ + ε, with the second moments v̂ held fixed, for SGD with
    momentum μ it is (1 − μ)/(1 − dampening).

    Args:
        loop: the inner optimizer, and which of its options are learned.
        at: has the tensors in place of the leaves, to which a learned decay has a graph.
        gradient: ∇_w L_T by name. Before the first step of a weight v̂ is its square, as after a step with it.
    """
    inner, fixed = loop.inner, {name: leaf.detach() for name, leaf in at.leaves.items()}
    if inner is None or not is_differentiable(inner):
        return {}
    kind, live = kind_of(inner), at.problem.weights()
    name_of, weights = {id(p): name for name, p in live.items()}, at.shards
    found: dict[str, Term] = {}
    for number, group in enumerate(inner.param_groups):
        check_differentiable(kind, number, group, loop.learned, DECAYS)
        options = bound_options(number, group, loop.learned)
        values = [value_of(options[key], at.leaves) for key in DECAYS if key in options]
        present = {key: value_of(option, fixed) for key, option in options.items()}
        learned = bound_decays(number, group, loop.learned)
        held = {name_of[id(p)]: p for p in group["params"] if id(p) in name_of}
        for name, p in held.items():
            own, pull = values, PLAIN
            if name in learned:
                own, pull = [learned[name].value(at.leaves), *values[1:]], _pull_on_shard(learned[name].pull, p)
            if name in gradient and any(isinstance(value, Tensor) or value for value in own):
                state = {key: local(value) for key, value in inner.state.get(p, {}).items()}
                scale = _scale(kind, present, state, gradient[name]) if pull.is_decoupled(group) else 1.0
                scale = -scale if group.get("maximize") else scale
                far = from_centre(weights[name].detach(), pull)
                decay = torch.as_tensor(reduce(add, own), dtype=None if name in learned else far.dtype, device=far.device)
                factor = _on_shard(spread(decay.detach(), p), p) * scale
                found[name] = Term(decay, scale, factor, far.sign() if pull.norm == 1 else far, pull.norm)
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
    pulls = {str(option.member): option.pull for option in loop.learned if option.is_decay}
    group_of = {id(p): group for group in groups if "betas" in group for p in group["params"]}
    fresh = [
        name
        for name, p in weights.items()
        if id(p) in group_of and not inner.state.get(p) and pulls.get(name, PLAIN).is_decoupled(group_of[id(p)])
    ]
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
    decoupled = [group for group in groups if group.get("decoupled_weight_decay")]
    if loop.learned or not any(float(group["betas"][0]) > 0 for group in decoupled):
        return None
    return (
        f"the condition Update() holds the first moment of {type(loop.inner).__name__} fixed, so that its decoupled "
        "weight_decay counts 1 / (1 - beta1) times beside the gradient. Take the condition Gradient(), which has it right, "
        "or hoptim.Unrolled"
    )


def _has_decay(group: Mapping[str, Any]) -> bool:
    decay = group.get("weight_decay", 0)
    return isinstance(decay, (int, float, Tensor)) and bool(torch.as_tensor(decay).any())


def _scale(
    kind: type[optim.Optimizer], group: Mapping[str, Any], state: Mapping[str, Any], gradient: Tensor
) -> Tensor | float:
    """D of SGD, Adam, AdamW, NAdam or RAdam, whose step is lr · ∇L_T / D if the gradient was always the same."""
    if kind is optim.SGD:
        momentum = float(group["momentum"])
        return (1 - momentum) / (1 - float(group["dampening"])) if momentum else 1.0
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
