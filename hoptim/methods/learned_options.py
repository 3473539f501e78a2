"""Options of the inner optimizer that are hyperparameters, such as a learned rate: ``options={"lr": "rate"}``.

The optimizer holds an ordinary number in the place of such an option, which schedulers may change, and each step uses

    option = number · t(θ) / t(θ₀),

where t(θ) is ``hparams["rate"]`` now, and t(θ₀), the start, is its value when the number was put there. The number is the
start; or, if the optimizer had a number that is the start but for rounding, this one, so that training starts with the bits
that it would have without hoptim. If number and start are 0, the option is t(θ) itself.

The weight decay may have a hyperparameter for each weight: ``options={"weight_decay": decays}``, with a recipe such as
``WeightDecay`` or a dict of names by weight. The number is then the group's own, a factor for schedules, which stays the
decay of its other weights; :mod:`hoptim.methods.decay` applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.distributions.transforms import Transform, identity_transform

from hoptim.checks import listed
from hoptim.linalg.vectors import Tensors
from hoptim.methods.kinds import DECOUPLED, kind_of
from hoptim.problem.hyperparameters import transforms_of

# What torch's schedulers add to a group whose option they set; of a pair it is the first member.
SCHEDULED_BY = {"lr": "initial_lr", "momentum": "max_momentum", "betas": "max_momentum"}


class Pull(NamedTuple):
    """How a learned decay λ pulls its weight w.

    Attributes:
        norm: 2 for λ⊙(w − c), 1 for λ⊙sign(w − c), which the step takes as a soft threshold after the optimizer's own.
        decoupled: whether it acts on the weight, beside the optimizer's step; ``None``: as the optimizer's own decay does.
        centre: c; ``None`` for zero.
    """

    norm: int = 2
    decoupled: bool | None = None
    centre: Tensor | None = None

    def is_decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether it acts on the weight in a parameter group with these options."""
        return bool(self.norm == 1 or (group.get("decoupled_weight_decay") if self.decoupled is None else self.decoupled))


PLAIN = Pull()


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Stands for an option of a step that is number · transform(leaf) / start, of the leaf of this name.

    The leaf has one number, or one for each entry of a weight. ``pull`` is for decays of single weights alone.
    """

    name: str
    transform: Transform
    number: float
    start: float
    pull: Pull = PLAIN

    def value(self, leaves: Tensors) -> Tensor:
        """The option as a tensor of one number, or of the leaf's shape."""
        leaf, natural = leaves[self.name], self.transform(leaves[self.name])
        wide = torch.float32 if leaf.device.type == "mps" else torch.float64  # as precise as in the real step
        if leaf.numel() == 1:
            natural = natural.reshape(()).to(wide)
        if self.number == self.start:
            return natural
        if leaf.numel() > 1:
            return natural * (self.number / self.start)
        # At the start it is the number itself, bit for bit, as in the real step.
        return torch.where(natural == self.start, self.number * (natural / self.start), self.number / self.start * natural)

    def in_real_step(self, leaf: Tensor) -> float:
        """The same as a number."""
        natural = float(self.transform(leaf.detach()))
        if self.number == self.start:
            return natural
        return self.number if natural == self.start else self.number / self.start * natural


class LearnedOption(NamedTuple):
    """An option of one parameter group that is a hyperparameter.

    Attributes:
        name: the leaf's name.
        group: the number of the parameter group.
        key: the option's key in it.
        member: the index in a pair, such as betas; the name of the weight whose decay it is; else ``None``.
        transform: t.
        start: t(θ₀).
        is_default: whether groups that are added without this option have it too.
        pull: how the decay of one weight pulls it.
    """

    name: str
    group: int
    key: str
    member: int | str | None
    transform: Transform
    start: float
    is_default: bool
    pull: Pull = PLAIN

    @property
    def place(self) -> tuple[str, int, str, int | str | None]:
        """What tells it from others, in checkpoints too."""
        return self.name, self.group, self.key, self.member

    @property
    def is_decay(self) -> bool:
        """Whether it is the decay of one weight, for which no number in the group stands."""
        return isinstance(self.member, str)

    def present(self, group: Mapping[str, Any]) -> Any:
        """What the group holds in its place now."""
        return group[self.key][self.member] if isinstance(self.member, int) else group[self.key]

    def bound(self, group: Mapping[str, Any]) -> Bound:
        """The option of the next step, with the number in its place as a schedule has changed it.

        Raises:
            ValueError: it starts at 0, and a schedule has changed the number, or will.
        """
        number = float(self.present(group))
        is_scheduled = not self.member and SCHEDULED_BY.get(self.key, self.key + " is not scheduled") in group
        if self.start == 0 and (number != 0 or is_scheduled):
            raise ValueError(
                f"hyperparameter {self.name!r} is the {self.key} and started at 0, of which a schedule makes no share: "
                "start elsewhere, or do without the schedule"
            )
        return Bound(name=self.name, transform=self.transform, number=number, start=self.start, pull=self.pull)


def learn(
    inner: optim.Optimizer,
    options: Mapping[str, Any],
    hparams: nn.Module,
    weights: Tensors,
    starts: Iterable[Sequence[Any]] = (),
    *,
    in_a_real_step: bool = True,
) -> list[LearnedOption]:
    """Make options of ``inner`` hyperparameters: put their numbers in its groups, and return what is learned.

    Args:
        inner: the optimizer.
        options: the name of the hyperparameter by that of the option, such as ``{"lr": "rate"}``; for a pair such as betas a
            tuple of two, one of which may be ``None``; or a list with a name for each parameter group, ``None`` for none.
            For ``weight_decay`` also a dict of names by weight, or a module of ``hparams`` with ``names_by_weight()``.
        hparams: the hyperparameters.
        weights: the model's parameters by name.
        starts: the starts of options that were learned before, which hold here too.
        in_a_real_step: whether ``inner`` itself is to take steps with them. If not, a group of one weight may have a rate
            for each of its entries.

    Raises:
        TypeError: it is not known how ``inner`` applies a weight decay.
        ValueError: there is no such option or hyperparameter, it has several numbers, the list has the wrong length, a
            scheduler sets the option already, a weight with a decay is not in ``inner``, or ``inner`` was built with a
            tensor that requires a gradient.

    >>> from torch.distributions import constraints
    >>> from hoptim.problem.hyperparameters import HyperParameters
    >>> hparams = HyperParameters({"rate": torch.tensor(0.25)}, {"rate": constraints.positive})
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    >>> [(option.name, option.key, option.start) for option in learn(inner, {"lr": "rate"}, hparams, {})]
    [('rate', 'lr', 0.25)]
    >>> inner.param_groups[0]["lr"]
    0.25
    """
    leaves, transforms, groups = _leaves(hparams), transforms_of(hparams), inner.param_groups
    for group in groups:
        _check_no_gradient(inner, group)
    before = {tuple(place): start for *place, start in starts}
    found = []
    for key, names in options.items():
        if key not in inner.defaults:
            raise ValueError(f"options has {key!r}, and {type(inner).__name__} has only {', '.join(inner.defaults)}")
        if key == "weight_decay" and isinstance(names, (Mapping, nn.Module)):
            found += _learn_decays(inner, names, hparams, weights, before)
            continue
        if isinstance(names, list) and len(names) != len(groups):
            raise ValueError(f"options gives {key} {len(names)} names, and there are {len(groups)} parameter groups")
        for index, name in enumerate(_in_groups(names, len(groups))):
            group = groups[index]
            for member, one in _members(inner, group, key, name):
                shape = () if in_a_real_step or key != "lr" else _shape_of_entries(group)
                leaf, place = _leaf(key, one, leaves, shape).detach(), (one, index, key, member)
                transform = transforms.get(one, identity_transform)
                if leaf.numel() > 1:  # no number in the group stands for it
                    found.append(LearnedOption(*place, transform, float(group[key]), is_default=False))
                    continue
                start = before.get(place, float(transform(leaf)))
                option = LearnedOption(*place, transform, start, is_default=not isinstance(names, list))
                number = _first_number(option.present(group), start, transform, leaf)
                group[key] = _replaced(_numbers(group[key]), member, number)
                found.append(option)
        if not isinstance(names, list) and names is not None:
            inner.defaults[key] = groups[0][key]  # for groups that are added later
    return found


def _check_no_gradient(inner: optim.Optimizer, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if an option of the group is a tensor to be learned, whose graph a step would not keep."""
    for key in [key for key in getattr(inner, "defaults", ()) if key in group]:
        is_pair = isinstance(group[key], (tuple, list))
        if any(isinstance(one, Tensor) and one.requires_grad for one in (group[key] if is_pair else [group[key]])):
            example = {key: ("beta", None) if is_pair else "rate"}
            raise ValueError(
                f"the {key} of {type(inner).__name__} has a tensor that requires a gradient: build it with a number, and "
                f"give the name of the hyperparameter, options={example}"
            )


def _learn_decays(
    inner: optim.Optimizer,
    names: Mapping[str, str] | nn.Module,
    hparams: nn.Module,
    weights: Tensors,
    before: Mapping[tuple[Any, ...], float],
) -> list[LearnedOption]:
    """The learned decays of single weights; the optimizer does not change."""
    kind = kind_of(inner)  # else it is not known whether its decay is coupled
    leaves, transforms, pull_of = _leaves(hparams), transforms_of(hparams), getattr(names, "pull_of", lambda _: PLAIN)
    by_weight = names if isinstance(names, Mapping) else names_by_weight(names, hparams)
    group_of = {id(p): number for number, group in enumerate(inner.param_groups) for p in group["params"]}
    found = []
    for weight, leaf in by_weight.items():
        w = weights.get(weight)
        if w is None or id(w) not in group_of:
            why = "the optimizer does not hold" if w is not None else f"the model does not have, but {listed(list(weights))}"
            raise ValueError(f"options gives a weight_decay to {weight!r}, which {why}: leave it out, or add it there")
        if leaf not in leaves or leaves[leaf].shape != w.shape[: leaves[leaf].ndim]:
            wrong = f"has shape {tuple(leaves[leaf].shape)}" if leaf in leaves else "is no hyperparameter that is learned"
            raise ValueError(
                f"options gives {weight!r}, of shape {tuple(w.shape)}, the weight_decay {leaf!r}, which {wrong}: give a "
                "hyperparameter of one number, of one for each row, or of the weight's shape"
            )
        number = group_of[id(w)]
        place, group, pull = (leaf, number, "weight_decay", weight), inner.param_groups[number], pull_of(weight)
        if pull.is_decoupled(group) and kind not in DECOUPLED:
            raise TypeError(
                f"options gives {weight!r} a decay that acts beside the step of {kind.__name__}, whose size hoptim knows "
                f"for {', '.join(one.__name__ for one in DECOUPLED)} alone: take one of these, or norm=2 without decoupled"
            )
        start, transform = before.get(place, float(group["weight_decay"])), transforms.get(leaf, identity_transform)
        found.append(LearnedOption(*place, transform, start, is_default=False, pull=pull))
    return found


def names_by_weight(decays: nn.Module, hparams: nn.Module) -> dict[str, str]:
    """The names in ``hparams`` of the decays by weight that one of its modules has.

    Raises:
        AttributeError: the module has none.
        ValueError: it is no part of ``hparams``.
    """
    own: Any = decays.names_by_weight
    prefix = next((name for name, module in hparams.named_modules() if module is decays), None)
    if prefix is None:
        raise ValueError(f"options gives weight_decay a {type(decays).__name__} that is no part of the problem's hparams")
    return {weight: f"{prefix}.{name}" if prefix else name for weight, name in own().items()}


def _leaves(hparams: nn.Module) -> Tensors:
    return {name: leaf for name, leaf in hparams.named_parameters() if leaf.requires_grad}


def _in_groups(names: Any, groups: int) -> list[Any]:
    return names if isinstance(names, list) else [names] * groups


def _members(inner: optim.Optimizer, group: Mapping[str, Any], key: str, name: Any) -> list[tuple[int | None, Any]]:
    """The names that are given to an option, by member of a pair."""
    if name is None:
        return []
    present, is_pair = group[key], isinstance(name, tuple)
    if is_pair != isinstance(present, (tuple, list)) or (is_pair and len(present) != len(name)):
        fitting = f'a tuple of {len(present)}, such as ("beta", None)' if isinstance(present, (tuple, list)) else "one name"
        raise ValueError(f"options gives {key} {'the pair ' * is_pair}{name!r}, and it is {present!r}: give {fitting}")
    first = name[0] if is_pair else name
    if first is not None and SCHEDULED_BY.get(key, key + " is not scheduled") in group:
        raise ValueError(
            f"options gives {key} {first!r}, and a scheduler was built on this {type(inner).__name__} before: it would go "
            f"on from its own numbers, whatever {first!r} is. Build it after the BilevelOptimizer, and on that, which "
            "hypergradient and audit take as inner too"
        )
    return [(n, one) for n, one in enumerate(name) if one is not None] if is_pair else [(None, name)]


def _shape_of_entries(group: Mapping[str, Any]) -> Sequence[int]:
    """The shape of rates for the entries of a group's weight, if it has one alone."""
    return group["params"][0].shape if len(group["params"]) == 1 else ()


def _leaf(key: str, name: Any, leaves: Tensors, shape: Sequence[int]) -> Tensor:
    """The leaf of this name, of one number or of this shape."""
    if name not in leaves or (leaves[name].numel() != 1 and leaves[name].shape != shape):
        wrong = "is no hyperparameter that is learned" if name not in leaves else f"has {leaves[name].numel()} numbers"
        fitting = [name for name, leaf in leaves.items() if leaf.numel() == 1]
        raise ValueError(
            f"options gives {key} {name!r}, which {wrong}: give one of {listed(fitting)}, of one number each. A rate for "
            "each entry of a weight can be learned by hypergradient(), such as with PerTask, if each weight has a parameter "
            "group of its own"
        )
    return leaves[name]


def _first_number(script: Any, start: float, transform: Transform, leaf: Tensor) -> float:
    """The script's own number, if it is the start but for the rounding of the leaf and of its transform; else the start.

    >>> from torch.distributions.transforms import ExpTransform
    >>> one = torch.tensor(2.5e-4).log()
    >>> start = float(one.exp())
    >>> [_first_number(script, start, ExpTransform(), one) for script in (2.5e-4, 2.6e-4)] == [2.5e-4, start]
    True
    >>> start == 2.5e-4
    False
    """
    script = _numbers(script)
    if not isinstance(script, (int, float)):
        return start
    rounded = float(transform(transform.inv(leaf.new_tensor(script))))
    return float(script) if math.isclose(rounded, start, rel_tol=8 * torch.finfo(leaf.dtype).eps) else start


def each(change: Callable[[Any], Any], option: Any) -> Any:
    """The option changed, of a pair each member."""
    return tuple(map(change, option)) if isinstance(option, (tuple, list)) else change(option)


def _numbers(option: Any) -> Any:
    """An option with numbers in place of tensors of one."""
    return each(lambda one: one.item() if isinstance(one, Tensor) and one.numel() == 1 else one, option)


def _replaced(whole: Any, member: int | str | None, value: Any) -> Any:
    """The option with a new value, or with one member of its pair replaced."""
    return value if not isinstance(member, int) else tuple(value if n == member else other for n, other in enumerate(whole))


# In a step


@contextmanager
def in_effect(inner: optim.Optimizer, options: Sequence[LearnedOption], hparams: nn.Module) -> Iterator[None]:
    """Give the options, none of which is a decay by weight, their present values, number · t(θ) / t(θ₀), for one step."""
    before: dict[tuple[int, str], Any] = {}
    put: dict[tuple[int, str], Any] = {}
    for option in options:
        group, place = inner.param_groups[option.group], (option.group, option.key)
        before[place] = group[option.key]
        now = option.bound(group).in_real_step(hparams.get_parameter(option.name))
        put[place] = _replaced(put.get(place, before[place]), option.member, now)
    for (number, key), value in put.items():
        inner.param_groups[number][key] = value
    try:
        yield
    finally:
        for (number, key), value in put.items():
            if inner.param_groups[number][key] is value:  # else a hook of the step has set another
                inner.param_groups[number][key] = before[number, key]


def bound_options(number: int, group: Mapping[str, Any], learned: Iterable[LearnedOption]) -> dict[str, Any]:
    """The options of parameter group ``number``: copied constants, and :class:`Bound` for what is learned."""
    found = {key: each(_copied, value) for key, value in group.items() if key != "params"}
    for option in learned:
        if option.group == number and not option.is_decay:
            found[option.key] = _replaced(found[option.key], option.member, option.bound(group))
    return found


def bound_decays(number: int, group: Mapping[str, Any], learned: Iterable[LearnedOption]) -> dict[str, Bound]:
    """The learned decays of parameter group ``number`` by weight."""
    return {str(option.member): option.bound(group) for option in learned if option.group == number and option.is_decay}


def _copied(option: Any) -> Any:
    return option.detach().clone() if isinstance(option, Tensor) else option


def value_of(option: Any, leaves: Tensors) -> Any:
    """An option of :func:`bound_options` at these leaves."""
    return each(lambda one: one.value(leaves) if isinstance(one, Bound) else one, option)


# Other groups, other states, other optimizers


def add_group(inner: optim.Optimizer, added: Mapping[str, Any], known: Sequence[LearnedOption]) -> list[LearnedOption]:
    """Add a parameter group, with the learned options that are defaults of the optimizer; returns all learned options."""
    _check_no_gradient(inner, {**inner.defaults, **added})
    inner.add_param_group(dict(added))
    new, group = len(inner.param_groups) - 1, inner.param_groups[-1]
    inherited = [o._replace(group=new) for o in known if o.is_default and o.group == 0 and o.key not in added]
    for option in inherited:
        group[option.key] = _replaced(group[option.key], option.member, option.start)
    return [*known, *inherited]


def starts(options: Iterable[LearnedOption]) -> list[list[Any]]:
    """The starts of the options, for a checkpoint."""
    return [[*option.place, option.start] for option in options]


def restarted(options: Iterable[LearnedOption], saved: Iterable[Sequence[Any]]) -> list[LearnedOption]:
    """The options with the starts that were saved."""
    by_place = {tuple(place): start for *place, start in saved}
    return [option._replace(start=by_place.get(option.place, option.start)) for option in options]


def resumed(inner: optim.Optimizer, options: Sequence[LearnedOption], before: Sequence[Any]) -> list[LearnedOption]:
    """The options after ``inner`` got the state of a run that did not learn them; ``before`` is what was in their places.

    A rate goes on as far down as that run's schedule had come: option = t(θ) · number / initial number.
    """
    found = []
    for option, number in zip(options, before, strict=True):
        group = inner.param_groups[option.group]
        if option.member is None and (initial := group.get("initial_" + option.key)):
            option = option._replace(start=float(initial))
        else:
            group[option.key] = _replaced(group[option.key], option.member, number)
        found.append(option)
    return found


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a retraining has to know of the options that were learned.

    Attributes:
        kind: the class of the inner optimizer.
        groups: the number of its parameter groups, at first.
        options: the names of hyperparameters by option, as they were given.
        starts: the starts of the options.
    """

    kind: type[optim.Optimizer]
    groups: int
    options: Mapping[str, Any]
    starts: Sequence[Sequence[Any]]

    @classmethod
    def of(cls, inner: optim.Optimizer, options: Mapping[str, Any], found: Sequence[LearnedOption]) -> Learned:
        """What was found in ``inner``, with ``options`` as they were given."""
        names = {key: options[key] for key in dict.fromkeys(o.key for o in found)}
        return cls(kind=type(inner), groups=len(inner.param_groups), options=names, starts=starts(found))

    def named_again(self, inner: optim.Optimizer, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` with the names of all that was learned, for a new ``inner``; a key with ``None`` is left to it.

        Raises:
            ValueError: ``inner`` is of another class or has another number of groups; ``options`` has another
                hyperparameter in the place of one that was learned.
        """
        wanted = {key: names for key, names in self.options.items() if options.get(key, names) is not None}
        count = len(inner.param_groups)
        for key, names in wanted.items():
            before = _in_groups(names, self.groups)
            if (type(inner), count) != (self.kind, self.groups):
                name = next(one for one in before if one is not None)
                raise ValueError(
                    f"{name!r} was learned as the {key} of {self.kind.__name__} with {self.groups} parameter groups, and "
                    f"inner makes {type(inner).__name__} with {count}: make it as it was, or give options={{{key!r}: None}} "
                    "for the number that inner has itself"
                )
            if _in_groups(options.get(key, names), count) != before:
                raise ValueError(
                    f"the {key} was learned as {before}, for each parameter group, and retrain is to take other "
                    f"hyperparameters for it: name the same, or give options={{{key!r}: None}} for the number of inner"
                )
        return {**options, **wanted}


def in_stand_in(
    inner: optim.Optimizer, options: Mapping[str, Any], hparams: nn.Module, weights: Tensors
) -> tuple[optim.Optimizer, list[LearnedOption]]:
    """``inner`` and what is learned of it, for one look at it: its own groups do not change.

    If something is learned, what comes back holds the same weights and state, and has groups of its own.
    """
    other = object.__new__(type(inner))
    groups = [dict(group) for group in inner.param_groups]
    vars(other).update(vars(inner), param_groups=groups, defaults=dict(getattr(inner, "defaults", {})))
    found = learn(other, options, hparams, weights, in_a_real_step=False)
    return (other, found) if found else (inner, found)
