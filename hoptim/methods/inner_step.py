"""InnerStep: one step of the user's inner optimizer as a pure, differentiable function, computed by torch's own code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, optim
from torch.overrides import TorchFunctionMode

from hoptim.linalg.vectors import Tensors
from hoptim.methods.decay import decayed, shrunk, spread
from hoptim.methods.kinds import Kind, check_differentiable, check_has_derivative, kind_of
from hoptim.methods.learned_options import Bound, LearnedOption, Pull, bound_decays, bound_options, value_of

InnerState = dict[str, dict[str, Tensor]]

MADE_WITH = ("initial_accumulator_value",)  # what older versions of Adagrad make the first state of, when it is built
_PLAIN = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
_TINY = torch.finfo(torch.float32).tiny  # the smallest normal number: adding it does not change another number


@dataclass(frozen=True, kw_only=True)
class Group:
    """Weights of one parameter group by name, and its options: numbers, or :class:`Bound` to a leaf.

    If ``decays`` has the learned decays of these weights, ``options`` has none.
    """

    names: tuple[str, ...]
    options: Mapping[str, Any]
    decays: Mapping[str, Bound] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InnerStep:
    """One step of an inner optimizer, (w, s) ↦ (w⁺, s⁺) = U(w, s, ∇L_T, λ), as a pure function; made by :meth:`of`.

    A new optimizer of the same class takes the step on clones, with ``differentiable=True``: the user's objects do not
    change, and later steps break no graph. The step has derivatives in the weights, gradients, leaves and state. If an
    option is exactly 0, where torch's code leaves a term out or divides by it, the derivative is the one from above. Hooks
    of the optimizer are not called.

    Args:
        kind: the class of ``torch.optim``, one of ``KINDS``.
        groups: the parameter groups: names of weights, and options.
        defaults: the optimizer's ``defaults``, from which Adagrad reads its first accumulator.
        state: s by weight name, then by the optimizer's own key, such as ``"exp_avg"``: tensors only.

    Example: SGD with momentum on L = w²/2, where w⁺ = w − lr·(μ·buffer + w).

    >>> from hoptim.methods.learned_options import learn
    >>> w, hparams = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.ParameterDict({"lr": torch.tensor(0.5)})
    >>> lr, inner = hparams["lr"], torch.optim.SGD([w], momentum=0.9)
    >>> learned = learn(inner, {"lr": "lr"}, hparams, {})
    >>> inner_step = InnerStep.of(inner, {"w": w}, {"lr": lr}, learned)
    >>> inner_step.groups[0].options["lr"].value({"lr": lr}).item()
    0.5
    >>> new, state = inner_step.step({"w": w}, {"w": w.clone()}, {"lr": lr})
    >>> new["w"].item(), state["w"]["momentum_buffer"].item()
    (1.0, 2.0)
    >>> [g.item() for g in torch.autograd.grad(new["w"], [w, lr])]
    [0.5, -2.0]
    """

    kind: Kind
    groups: tuple[Group, ...]
    defaults: Mapping[str, Any]
    state: InnerState

    @classmethod
    def of(
        cls,
        inner: optim.Optimizer,
        weights: Tensors,
        leaves: Tensors,
        learned: Sequence[LearnedOption] = (),
        *,
        with_state: bool = True,
    ) -> InnerStep:
        """The step of ``inner`` as it is now. Options and state are copied, so its later steps do not change them.

        Missing state is filled in with torch's own first values, mostly zeros. SGD's momentum buffer stays missing, since
        the first step of SGD does not dampen the gradient.

        Args:
            inner: the live optimizer; it may hold more than ``weights``, which is ignored.
            weights: the live weights by name, ``Problem.weights()``.
            leaves: the live hyperparameter leaves by name, ``Problem.leaves()``.
            learned: the learned options, which are bound to their leaves: the step has a derivative in them.
            with_state: whether to copy the state too, default ``True``, or only the options.

        Raises:
            TypeError: ``inner`` is of a class, or has a ``step`` of its own, that torch can't differentiate; or an option is
                learned in which the step of this class has no derivative.
        """
        kind = kind_of(inner)
        name_of = {id(p): name for name, p in weights.items()}
        groups = []
        for number, group in enumerate(inner.param_groups):
            check_differentiable(kind, number, group, learned)
            options = {key: one for key, one in bound_options(number, group, learned).items() if key in inner.defaults}
            names = tuple(name_of[id(p)] for p in group["params"] if id(p) in name_of)
            decays = bound_decays(number, group, learned)
            if own := tuple(name for name in names if name in decays):
                groups.append(Group(names=own, options={**options, "weight_decay": 0.0}, decays=decays))
                names = tuple(name for name in names if name not in decays)
            groups.append(Group(names=names, options=options))
        without_state = cls(kind=kind, groups=tuple(groups), defaults=dict(inner.defaults), state={})
        if not with_state:
            return without_state
        held = {name: weights[name] for group in groups for name in group.names}
        state = {
            name: {key: value.detach().clone() for key, value in inner.state.get(p, {}).items() if isinstance(value, Tensor)}
            for name, p in held.items()
        }
        empty = {} if kind is optim.SGD else {name: p for name, p in held.items() if not state[name]}
        return replace(without_state, state=state | without_state._first_state(empty, leaves))

    def fresh(self, weights: Tensors, leaves: Tensors) -> InnerStep:
        """The same with the state of an optimizer that has taken no step.

        Args:
            weights: those in whose shapes the state is.
            leaves: the hyperparameters by name.
        """
        held = {name: weights[name] for group in self.groups for name in group.names}
        return replace(self, state={} if self.kind is optim.SGD else self._first_state(held, leaves))

    def has_live_state(self, leaves: Tensors) -> bool:
        """Whether the live optimizer has the same state after it: at a learned momentum of 0 torch changes no buffer."""
        momenta = [group.options.get("momentum") for group in self.groups]
        return not any(isinstance(one, Bound) and bool(one.value(leaves) == 0) for one in momenta)

    def with_options(self, options: Mapping[str, Any]) -> InnerStep:
        """The same with these options changed in each group: numbers, or tensors of one number with a graph.

        Raises:
            TypeError: one is a tensor, but torch's step has no derivative in it.
            ValueError: the optimizer has no such option.
        """
        for key, value in options.items():
            if key not in self.defaults:
                raise ValueError(f"{self.kind.__name__} has no option {key!r}: its options are {', '.join(self.defaults)}")
            tensors = [one for one in (value if isinstance(value, tuple) else (value,)) if isinstance(one, Tensor)]
            if wrong := [tuple(one.shape) for one in tensors if one.numel() != 1]:
                raise ValueError(f"options gave an {key} of shape {wrong[0]}: give a number, or a tensor of one")
            for group in self.groups if tensors else ():
                check_has_derivative(self.kind, group.options, key, f"the {key}")
        return replace(self, groups=tuple(replace(group, options={**group.options, **options}) for group in self.groups))

    def step(
        self, weights: Tensors, gradients: Tensors, leaves: Tensors, state: InnerState | None = None
    ) -> tuple[Tensors, InnerState]:
        """One step: new weights and new state, with a graph where gradients are enabled.

        Args:
            weights: w by name. Weights that are in no group come back unchanged.
            gradients: ∇L_T by name. A weight without one does not change, nor does its state.
            leaves: the hyperparameters by name, at least those that are options of the optimizer.
            state: s; ``None`` for the state that was copied from the live optimizer.

        Raises:
            ValueError: ``leaves`` lacks a hyperparameter that is an option.
        """
        with torch.enable_grad():  # even if no graph is wanted, so that the bits are the same
            new, after = self._step(weights, gradients, leaves, self.state if state is None else state)
        if torch.is_grad_enabled():
            return new, after
        return _detached(new), {name: _detached(entries) for name, entries in after.items()}

    def _step(self, weights: Tensors, gradients: Tensors, leaves: Tensors, state: InnerState) -> tuple[Tensors, InnerState]:
        gradients = {name: g for name in weights if (g := gradients.get(name)) is not None}
        new = {name: value.clone() for name, value in weights.items()}
        optimizer, rates, lasso = self._optimizer(new, gradients, leaves, state)
        with nullcontext() if self.kind is optim.SGD else _SquareRoots():  # SGD computes none
            inspect.unwrap(self.kind.step)(optimizer)  # without the hooks, which are the user's
        after = dict(state)
        for name in gradients:
            if (entries := optimizer.state.get(new[name])) is not None:
                before = state.get(name, {})
                after[name] = {key: v.to(before[key].dtype) if key in before else v for key, v in entries.items()}
            new[name].grad = None
        for name, rate in rates.items():
            w = weights[name]
            new[name] = (
                w + rate * (new[name] - w) if isinstance(rate, Tensor) and (rate.ndim or rate.requires_grad) else w.clone()
            )
        for name, (size, pull) in lasso.items():
            new[name] = shrunk(new[name], size, pull)
        return new, after

    def _optimizer(
        self, new: Tensors, gradients: Tensors, leaves: Tensors, state: InnerState
    ) -> tuple[optim.Optimizer, dict[str, Any], dict[str, tuple[Tensor, Pull]]]:
        """A new optimizer on the clones ``new`` that have a gradient, with its state; and what it does not have.

        These are rates by weight, and by how much weights are to shrink after the step.

        A step is linear in the lr, but Adam divides by it, and torch takes one number for a group. If lr is 0, or there is
        one for each entry of a weight, the step is taken with lr = 1 and then scaled: w⁺ = w + lr·(its change of w) has the
        right value and the right derivative.
        """
        groups: list[dict[str, Any]] = []
        rates: dict[str, Any] = {}
        lasso: dict[str, tuple[Tensor, Pull]] = {}
        states: InnerState = {}
        for group in self.groups:
            names = [name for name in group.names if name in gradients]
            states |= {name: _cloned(state.get(name, {}), new[name]) for name in names}
            options = {key: self._value(key, option, leaves) for key, option in group.options.items()} | _PLAIN
            lr = options["lr"]
            is_for_each_entry = isinstance(options["lr"], Tensor) and options["lr"].ndim > 0
            if is_for_each_entry or (issubclass(self.kind, (optim.Adam, optim.AdamW)) and options["lr"] == 0):
                rates |= dict.fromkeys(names, options["lr"])
                options["lr"] = 1.0
            for name in names if group.decays else ():
                decay, pull = self._value("weight_decay", group.decays[name], leaves), group.decays[name].pull
                if pull.norm == 1:
                    lasso[name] = (lr * spread(decay, new[name]), pull)
                w, gradients[name] = decayed(new[name], gradients[name], decay, options, pull)
                new[name] = w.clone()  # torch writes to it, and the decay's derivative needs it as it was
            undamped: list[str] = []  # SGD does not dampen a weight's first gradient, nor any if momentum is 0
            if self.kind is optim.SGD and options["momentum"] != 0:
                first = [name for name in names if "momentum_buffer" not in states[name]]
                for name in first:  # torch would start with a detached copy of the gradient
                    states[name]["momentum_buffer"] = torch.zeros_like(new[name])
                undamped = first if options["momentum"] > _TINY else names
            groups.append({**options, "params": [new[name] for name in names if name not in undamped]})
            if undamped:
                groups.append({**options, "params": [new[name] for name in undamped], "dampening": 0})
        made = {key: self.defaults[key] for key in MADE_WITH if key in self.defaults}
        optimizer = self.kind(groups, differentiable=True, **made)  # type: ignore[call-arg]
        optimizer.defaults = {**self.defaults, "differentiable": True}
        for name, entries in states.items():
            new[name].grad = gradients[name].clone()  # torch may add weight decay to it in place
            if entries:  # else the first state may be there already
                optimizer.state[new[name]] = entries
        return optimizer, rates, lasso

    def _first_state(self, empty: Tensors, leaves: Tensors) -> InnerState:
        """The state that torch starts with, for weights without one."""
        if not empty:
            return {}
        with torch.no_grad():
            new = {name: p.clone() for name, p in empty.items()}
            optimizer, *_ = self._optimizer(new, new, leaves, {})
            fill: Any = optimizer._init_group  # type: ignore[attr-defined]
            for filled in optimizer.param_groups:
                fill(filled, *([] for _ in [*inspect.signature(fill).parameters][1:]))
        return {name: dict(optimizer.state[p]) for name, p in new.items()}

    def _value(self, key: str, option: Any, leaves: Tensors) -> Any:
        """The option as a number or a tensor."""
        if isinstance(option, tuple):
            return tuple(self._value(key, member, leaves) for member in option)
        if isinstance(option, Bound) and option.name not in leaves:
            raise ValueError(f"leaves lack {option.name!r}, which is the {key} of {self.kind.__name__}: give it")
        value = value_of(option, leaves)
        is_learned = isinstance(option, Bound) or (isinstance(option, Tensor) and option.requires_grad)
        if not is_learned or key not in ("weight_decay", "momentum"):
            return value
        # At exactly 0 torch leaves these terms out, and with them their derivatives.
        return value.to(torch.promote_types(value.dtype, torch.float32)) + _TINY


class _SquareRoots(TorchFunctionMode):
    """Gives the square roots in optimizers the derivative 0 at 0, where autograd's is ∞; their values do not change.

    √v is 0 while a weight has had no gradient. Then the first moment is 0 as well, so 0 is the true derivative of the step,
    and ∞·0 = NaN would be wrong.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.sqrt:
            return _sqrt(args[0])
        if func is Tensor.sqrt_:
            return args[0].copy_(_sqrt(args[0]))
        return func(*args, **(kwargs or {}))


def _sqrt(v: Tensor) -> Tensor:
    zero = v == 0
    return torch.where(zero, 0, torch.where(zero, 1, v).sqrt())


def _detached(x: Tensors) -> Tensors:
    return {key: value.detach() for key, value in x.items()}


def _cloned(state: Tensors, weight: Tensor) -> Tensors:
    """A copy with the step count in float64: in float32 the 1 − βᵗ of differentiable Adam would lose three digits."""
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    return {key: value.to(wide, copy=True) if key == "step" else value.clone() for key, value in state.items()}
