"""InnerStep: one step of the user's inner optimizer as a pure, differentiable function; torch's own code takes it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, optim
from torch.overrides import TorchFunctionMode

from hoptim.linalg.trees import Tree

State = dict[str, dict[str, Tensor]]
Kind = type[optim.Optimizer]

_PLAIN = {"differentiable": True, "foreach": False, "fused": False, "capturable": False}
# The options that torch's own code differentiates in; of the others it takes a number only, or makes a constant.
_FOLLOWED: dict[Kind, frozenset[str]] = {
    optim.SGD: frozenset({"lr", "momentum", "weight_decay"}),
    optim.Adam: frozenset({"lr", "betas", "eps", "weight_decay"}),
    optim.AdamW: frozenset({"lr", "betas", "eps", "weight_decay"}),
    optim.NAdam: frozenset({"lr", "eps", "momentum_decay"}),
    optim.RAdam: frozenset({"lr", "eps"}),
    optim.Adamax: frozenset({"eps"}),
    optim.RMSprop: frozenset({"eps", "momentum"}),
    optim.Adagrad: frozenset({"eps"}),
    optim.Adadelta: frozenset({"eps"}),
    optim.Rprop: frozenset(),
    optim.ASGD: frozenset(),
}
ADAMS = (optim.Adam, optim.AdamW)  # before torch 2.7 the one is no subclass of the other
KINDS = tuple(_FOLLOWED)


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An option of the optimizer that is a hyperparameter: the name of the leaf."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The weights of one parameter group by name, and its options: numbers, or :class:`Bound` to a leaf."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class InnerStep:
    """One step of an inner optimizer, (w, s) ↦ (w⁺, s⁺) = U(w, s, ∇L_T, λ), as a pure function; made by :meth:`of`.

    The step is torch's own, taken with ``differentiable=True`` by a fresh optimizer over clones: nothing of the user's is
    touched, and no graph is broken by later steps. It differentiates in the weights, gradients, leaves and state. Hooks of
    the optimizer are not part of it.

    Args:
        kind: the class of ``torch.optim``, one of ``KINDS``.
        groups: the parameter groups: names of weights, and options.
        defaults: the optimizer's ``defaults``, which Adagrad reads its first accumulator from.
        state: s by weight name, then by the optimizer's own key, such as ``"exp_avg"``: all tensors.

    Example: SGD with momentum on L = w²/2, where w⁺ = w − lr·(μ·buffer + w).

    >>> w, lr = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(0.5))
    >>> dynamics = InnerStep.of(torch.optim.SGD([w], lr=lr, momentum=0.9), {"w": w}, {"lr": lr})
    >>> dynamics.bound
    ('lr',)
    >>> new, state = dynamics.step({"w": w}, {"w": w.clone()}, {"lr": lr})
    >>> new["w"].item(), state["w"]["momentum_buffer"].item()
    (1.0, 2.0)
    >>> [g.item() for g in torch.autograd.grad(new["w"], [w, lr])]
    [0.5, -2.0]
    """

    kind: Kind
    groups: tuple[Group, ...]
    defaults: Mapping[str, Any]
    state: State

    @classmethod
    def of(cls, inner: optim.Optimizer, weights: Tree, leaves: Tree, *, with_state: bool = True) -> InnerStep:
        """The dynamics of ``inner`` as it stands: options and state are copied, so that its later steps change nothing.

        What the state still lacks is filled in by torch's own first values: zeros in most. SGD's momentum buffer with
        dampening stays out, since its first step, and that one alone, takes the gradient undamped.

        Args:
            inner: the live optimizer; it may hold weights that are not in ``weights``: they are passed over.
            weights: the live weights by name, ``Problem.weights()``.
            leaves: the live hyperparameter leaves by name, ``Problem.leaves()``. An option of ``inner`` that is one of them,
                or a view of its memory, is bound to it: the step differentiates in it.
            with_state: copy the state, default ``True``; without, only the options.

        Raises:
            TypeError: ``inner`` is of a class, or has a ``step`` of its own, that torch can't differentiate; or an option
                that is a leaf is one that this class makes a constant of.
            ValueError: an option is computed from other tensors, is part of a leaf, or a leaf of more than one number; or a
                scheduler sets a learning rate that is a leaf.
        """
        kind = _kind(inner)
        name_of = {id(p): name for name, p in weights.items()}
        groups = []
        check_unscheduled([group for group in inner.param_groups if "initial_lr" in group], leaves)
        for group in inner.param_groups:
            followed = _followed(kind, group)
            options = {key: _bind(kind, key, group[key], leaves, followed) for key in inner.defaults if key in group}
            names = tuple(name_of[id(p)] for p in group["params"] if id(p) in name_of)
            groups.append(Group(names=names, options=options))
        if not with_state:
            return cls(kind=kind, groups=tuple(groups), defaults=dict(inner.defaults), state={})
        held = {name: weights[name] for group in groups for name in group.names}
        state = {
            name: {key: value.detach().clone() for key, value in inner.state.get(p, {}).items() if isinstance(value, Tensor)}
            for name, p in held.items()
        }
        dynamics = cls(kind=kind, groups=tuple(groups), defaults=dict(inner.defaults), state=state)
        return replace(dynamics, state=state | dynamics._first(held, leaves))

    @property
    def bound(self) -> tuple[str, ...]:
        """The names of the leaves that are options of the optimizer."""
        found: dict[str, None] = {}
        for group in self.groups:
            for option in group.options.values():
                members = option if isinstance(option, tuple) else (option,)
                found |= {member.name: None for member in members if isinstance(member, Bound)}
        return tuple(found)

    def step(self, weights: Tree, gradients: Tree, leaves: Tree, state: State | None = None) -> tuple[Tree, State]:
        """One step: new weights and new state, with a graph where gradients are enabled.

        Args:
            weights: w by name. What no group holds comes back as it was.
            gradients: ∇L_T by name. A weight that has none is left alone, and so is its state.
            leaves: the hyperparameters by name; those in ``bound`` are read.
            state: s; ``None`` for the one that was copied from the live optimizer.

        Raises:
            ValueError: ``leaves`` lacks one in ``bound``, or a momentum, or Adam's lr, that is a leaf is 0.
        """
        with torch.enable_grad():
            new, after = self._step(weights, gradients, leaves, self.state if state is None else state)
        if torch.is_grad_enabled():
            return new, after
        detached = {name: {key: value.detach() for key, value in entries.items()} for name, entries in after.items()}
        return {name: value.detach() for name, value in new.items()}, detached

    def _step(self, weights: Tree, gradients: Tree, leaves: Tree, state: State) -> tuple[Tree, State]:
        new = {name: value.clone() for name, value in weights.items()}
        optimizer, held, still = self._instance(new, gradients, leaves, state)
        dtypes: dict[str, torch.dtype] = {}
        if issubclass(
            self.kind, (optim.Adam, optim.AdamW)
        ):  # 1 − βᵗ is a tensor in differentiable Adam: in float32 it loses three digits
            for name in held:
                entries = optimizer.state[new[name]]
                dtypes[name] = entries["step"].dtype
                entries["step"] = entries["step"].to(_widest(new[name]))
        with _Roots():
            inspect.unwrap(self.kind.step)(optimizer)  # past the hooks, which are the user's
        after = dict(state)
        for name in held:
            entries = dict(optimizer.state[new[name]])
            if name in dtypes:
                entries["step"] = entries["step"].to(dtypes[name])
            after[name] = entries
            new[name].grad = None
        return new | {name: weights[name].clone() for name in still}, after

    def _instance(
        self, new: Tree, gradients: Tree, leaves: Tree, state: State
    ) -> tuple[optim.Optimizer, list[str], list[str]]:
        """A fresh optimizer over the clones ``new`` that have a gradient, its state complete; their names; who stays."""
        groups: list[dict[str, Any]] = []
        first: list[str] = []
        still: list[str] = []
        for group in self.groups:
            names = [name for name in group.names if name in new and gradients.get(name) is not None]
            options = {key: self._value(key, option, leaves) for key, option in group.options.items()} | _PLAIN
            if issubclass(self.kind, ADAMS) and group.options["lr"] == 0:  # its 1/lr has no derivative: w stays
                options["lr"], still = 1.0, still + names
            if self.kind is optim.SGD and options["momentum"] != 0:
                empty = [name for name in names if "momentum_buffer" not in state.get(name, {})]
                groups.append({**options, "params": [new[name] for name in empty], "dampening": 0})
                names, first = [name for name in names if name not in empty], first + empty
            groups.append({**options, "params": [new[name] for name in names]})
        held = [name for group in self.groups for name in group.names if name in new and gradients.get(name) is not None]
        optimizer = self.kind(groups, differentiable=True)  # type: ignore[call-arg]
        optimizer.defaults = {**self.defaults, "differentiable": True}
        for name in held:
            new[name].grad = gradients[name].clone()  # torch adds a tensor's weight decay to it in place
            optimizer.state[new[name]] = {key: value.clone() for key, value in state.get(name, {}).items()}
        for name in first:  # torch would put a detached copy of the gradient there
            optimizer.state[new[name]]["momentum_buffer"] = torch.zeros_like(new[name])
        fill: Any = optimizer._init_group  # type: ignore[attr-defined]
        for filled in optimizer.param_groups:
            fill(filled, *([] for _ in [*inspect.signature(fill).parameters][1:]))
        return optimizer, held, still

    def _first(self, held: Tree, leaves: Tree) -> State:
        """What torch begins with, for the weights whose state is still empty."""
        damped = {name for group in self.groups if group.options.get("dampening", 0) != 0 for name in group.names}
        empty = {name: p.detach() for name, p in held.items() if not self.state[name] and name not in damped}
        with torch.no_grad():
            new = {name: p.clone() for name, p in empty.items()}
            optimizer, _, _ = self._instance(new, empty, leaves, {})
        return {name: dict(optimizer.state[p]) for name, p in new.items()}

    def _value(self, key: str, option: Any, leaves: Tree) -> Any:
        if isinstance(option, tuple):
            return tuple(self._value(key, member, leaves) for member in option)
        if not isinstance(option, Bound):
            return option
        if option.name not in leaves:
            raise ValueError(f"leaves lack {option.name!r}, which is the {key} of {self.kind.__name__}: give it")
        value = leaves[option.name].reshape(())
        if (key == "momentum" or (key == "lr" and issubclass(self.kind, ADAMS))) and value == 0:
            raise ValueError(
                f"{option.name!r}, the {key} of {self.kind.__name__}, is 0, where torch's step has no derivative in it: "
                "set it above 0; constraints.nonnegative keeps it from falling below"
            )
        # torch leaves a weight decay of 0 out, and its derivative with it: the smallest number rounds away instead.
        return value + torch.finfo(value.dtype).tiny if key == "weight_decay" else value


class _Roots(TorchFunctionMode):
    """Lets autograd follow the optimizers' square roots, whose values stay as they are.

    √v has the slope 0, not ∞, at v = 0, where a weight has had no gradient so far. There the first moment is 0 as well, so
    this is the true derivative of the step, and ∞·0 = NaN would be wrong.
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


def _kind(inner: optim.Optimizer) -> Kind:
    """The class of torch.optim whose step ``inner`` takes."""
    works = f"take one of torch.optim's {', '.join(kind.__name__ for kind in KINDS)}, or Implicit() on Gradient()"
    own = type(inner).__name__
    kind = next((base for base in type(inner).__mro__ if base in KINDS), None)
    if kind is None:
        raise TypeError(f"the inner optimizer is of class {own}, whose step has no differentiable form: {works}")
    for method in ("step", "_init_group"):
        found = inspect.unwrap(getattr(inner, method))
        if getattr(found, "__func__", found) is not inspect.unwrap(getattr(kind, method)):
            raise TypeError(f"the inner optimizer, of class {own}, has a {method} that is not {kind.__name__}'s: {works}")
    return kind


def _followed(kind: Kind, group: Mapping[str, Any]) -> frozenset[str]:
    """The options of this group that torch's step differentiates in."""
    found = _FOLLOWED[kind]
    if group.get("decoupled_weight_decay"):
        found |= {"weight_decay"}
    return found - {"momentum"} if group.get("nesterov") else found


def _bind(kind: Kind, key: str, value: Any, leaves: Tree, followed: frozenset[str]) -> Any:
    """The option as a constant, a copy; or bound to the leaf that it is."""
    if isinstance(value, (tuple, list)):
        return tuple(_bind(kind, key, member, leaves, followed) for member in value)
    if not isinstance(value, Tensor):
        return value
    option = f"the {key} of {kind.__name__}"
    for name, leaf in leaves.items():
        if not (value is leaf or _overlap(value, leaf)):
            continue
        if leaf.numel() != 1:
            raise ValueError(f"{option} is part of {name!r}, of shape {tuple(leaf.shape)}: make it a leaf of one number")
        if key not in followed:
            works = f"{', '.join(sorted(followed))} may be one" if followed else "none may be one"
            raise TypeError(
                f"hyperparameter {name!r} is {option}, in which torch's step has no derivative, given its other options: "
                f"{works}; SGD, Adam and AdamW follow lr and weight_decay"
            )
        return Bound(name=name)
    if value.grad_fn is not None:
        raise ValueError(
            f"{option} is computed from other tensors, once and for all: give a leaf of hparams, or detach() it"
        )
    return value.detach().clone()


def check_unscheduled(groups: Iterable[Mapping[str, Any]], leaves: Tree) -> None:
    """Raise where the learning rate of one of these groups, which a scheduler sets, is a hyperparameter."""
    rates = [group["lr"] for group in groups if isinstance(group.get("lr"), Tensor)]
    if learned := [name for name, leaf in leaves.items() for rate in rates if _overlap(rate, leaf)]:
        raise ValueError(
            f"hyperparameter {learned[0]!r} is the inner optimizer's lr, and a scheduler would write over what is learned: "
            "do without one, build it on optimizer.outer, or give the inner optimizer a number as its lr"
        )


def _overlap(x: Tensor, leaf: Tensor) -> bool:
    start = leaf.data_ptr()
    return x.device == leaf.device and start != 0 and start <= x.data_ptr() < start + leaf.numel() * leaf.element_size()


def _widest(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
