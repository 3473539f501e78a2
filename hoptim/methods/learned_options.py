"""Options of the inner optimizer that are hyperparameters, such as a learned rate.

Such an option is a leaf of ``hparams`` itself, or a view of it, which torch's own step reads. Or it is ``hparams["lr"]``,
computed from a leaf by a constraint such as ``positive``. The optimizer then holds an ordinary number in its place, which
schedulers may change, and each step uses

    option = number · t(θ) / t(θ₀),

where t(θ) is the value of ``hparams["lr"]`` now, and t(θ₀), the start, is its value when the number was put there. The
number is the start; or, if the optimizer had a number that is the start but for rounding, this one, so that training starts
with the bits that it would have without hoptim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.distributions.transforms import Transform

from hoptim.linalg.vectors import Tree
from hoptim.problem.hyperparameters import transforms_of

WRITTEN_OVER = (
    "hyperparameter {name!r} was the inner optimizer's {key}, which is now {now!r}: a scheduler, a loaded state or the loop "
    "itself, as in group[{key!r}] = ..., wrote over it. For a schedule beside what is learned give it a constraint, such as "
    "positive, and the inner optimizer hparams[name]; or do without, or build the scheduler on optimizer.outer, or give the "
    "inner optimizer a number as its {key}"
)
COMPUTED = (
    "{option} is computed from other tensors, and not the present hparams[name] of one hyperparameter: give hparams[name] "
    "itself, anew after each move in a loop of your own, and build schedulers on the BilevelOptimizer; or detach() it"
)

SCHEDULED_LEAF = (
    "hyperparameter {name!r} is the inner optimizer's lr, and a scheduler would write over what is learned: do without one, "
    "build it on optimizer.outer, or give the inner optimizer a number as its lr"
)


class LearnedOption(NamedTuple):
    """An option of one parameter group that is a hyperparameter.

    Attributes:
        name: the leaf's name.
        group: the number of the parameter group.
        key: the option's key in it.
        value: the tensor that was found there.
        member: the index in a pair, such as betas; ``None`` for an option that is no pair.
        transform: t, for an option computed from the leaf; ``None`` if it is the leaf itself.
        start: t(θ₀), for an option computed from the leaf, once :func:`take_over` has put a number in its place; before that
            ``None``, and the option is t(θ) without a factor.
        is_default: whether it is also the optimizer's default, for groups that are added without this option.
        script: the number that the optimizer had before it was given the name of the hyperparameter; ``None`` for none.
    """

    name: str
    group: int
    key: str
    value: Any
    member: int | None = None
    transform: Transform | None = None
    start: float | None = None
    is_default: bool = False
    script: float | None = None

    def present(self, group: Mapping[str, Any]) -> Any:
        """What the group holds in its place now."""
        whole = group.get(self.key)
        return whole if self.member is None or not isinstance(whole, (tuple, list)) else whole[self.member]

    def scale(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """The number in its place, as a schedule has changed it, and its start."""
        if self.start is None:
            return 1.0, 1.0
        now = self.present(group)  # a tensor from a scheduler that was built on the optimizer before
        return float(now.detach() if isinstance(now, Tensor) else now), self.start


def find_learned_options(inner: optim.Optimizer, hparams: nn.Module) -> list[LearnedOption]:
    """The options of ``inner`` that are leaves of ``hparams``, views of a leaf, or computed as ``hparams[name]``.

    Raises:
        ValueError: an option is computed from leaves in another way, or was computed before they moved.

    >>> from torch.distributions import constraints
    >>> from hoptim.problem.hyperparameters import HyperParameters
    >>> hparams = HyperParameters({"rate": torch.tensor(0.1)}, {"rate": constraints.positive})
    >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=hparams["rate"])
    >>> [(option.name, option.group, option.key) for option in find_learned_options(inner, hparams)]
    [('rate', 0, 'lr')]
    """
    leaves: Tree = {name: leaf for name, leaf in hparams.named_parameters() if leaf.requires_grad}
    transforms = transforms_of(hparams)
    defaults = getattr(inner, "defaults", {})  # which some optimizers lack
    found = []
    for number, group in enumerate(inner.param_groups):
        for key, whole in group.items():
            if key == "params":
                continue
            default = defaults.get(key)
            for member, value in _members(whole):
                if not isinstance(value, Tensor):
                    continue
                own = [name for name, leaf in leaves.items() if shares_memory(value, leaf)]
                found += [LearnedOption(name, number, key, value, member) for name in own]
                if not own and key in defaults and (origins := _origins(value, leaves)):
                    name = origins[0]
                    if len(origins) > 1 or not _is_natural_value(value, leaves[name], transforms.get(name)):
                        raise ValueError(COMPUTED.format(option=f"the {key} of {type(inner).__name__}"))
                    found.append(
                        LearnedOption(name, number, key, value, member, transforms[name], is_default=whole is default)
                    )
    for key, whole in defaults.items():  # these show a hyperparameter even if something overwrote it in the groups
        for _, value in _members(whole):
            own = [name for name, leaf in leaves.items() if isinstance(value, Tensor) and shares_memory(value, leaf)]
            names = own or (_origins(value, leaves) if isinstance(value, Tensor) else [])
            if names and not any(option.key == key for option in found):
                raise ValueError(WRITTEN_OVER.format(name=names[0], key=key, now=inner.param_groups[0].get(key)))
    return found


def _members(whole: Any) -> Iterable[tuple[int | None, Any]]:
    return enumerate(whole) if isinstance(whole, (tuple, list)) else [(None, whole)]


def _origins(value: Tensor, leaves: Tree) -> list[str]:
    """The names of the leaves from which ``value`` is computed."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    todo, seen, found = [value.grad_fn], set(), []
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (name := names.get(id(getattr(node, "variable", None)))) is not None:
            found.append(name)
        todo += [before for before, _ in node.next_functions]
    return found


@torch.no_grad()
def _is_natural_value(value: Tensor, leaf: Tensor, transform: Transform | None) -> bool:
    if transform is None or leaf.numel() != 1:
        return False
    return math.isclose(float(value), float(transform(leaf)), rel_tol=8 * torch.finfo(leaf.dtype).eps)


@torch.no_grad()
def take_over(inner: optim.Optimizer, options: Sequence[LearnedOption], hparams: nn.Module) -> list[LearnedOption]:
    """Put plain numbers in place of the computed options; returns all options, the computed ones with their starts.

    An option that has a start already keeps it.

    Raises:
        ValueError: an option that is computed from a leaf is 0.
    """
    taken, values = [], [option.value for option in options]
    for option in options:
        if option.transform is not None:
            group, leaf = inner.param_groups[option.group], hparams.get_parameter(option.name)
            start = float(option.transform(leaf)) if option.start is None else option.start
            if start == 0:
                raise ValueError(
                    f"hyperparameter {option.name!r} is the {option.key} and starts at 0, so that a step's share of it is "
                    "not defined: start elsewhere, or leave its constraint out"
                )
            whole = group[option.key]
            if option.member is not None:  # torch takes a pair of numbers or one of tensors
                whole = [x.item() if isinstance(x, Tensor) and all(x is not y for y in values) else x for x in whole]
            group[option.key] = _replaced(whole, option.member, _first_number(option.script, start, option.transform, leaf))
            if option.is_default:
                inner.defaults[option.key] = group[option.key]
            option = option._replace(start=start, value=None)
        taken.append(option)
    return taken


def _first_number(script: float | None, start: float, transform: Transform, leaf: Tensor) -> float:
    """The script's own number, if it is the start but for the rounding of the leaf and of its transform; else the start.

    >>> from torch.distributions.transforms import ExpTransform
    >>> one = torch.tensor(2.5e-4).log()
    >>> start = float(one.exp())
    >>> [_first_number(script, start, ExpTransform(), one) for script in (2.5e-4, 2.6e-4)] == [2.5e-4, start]
    True
    >>> start == 2.5e-4
    False
    """
    if script is None:
        return start
    rounded = float(transform(transform.inv(leaf.new_tensor(script))))
    return script if math.isclose(rounded, start, rel_tol=8 * torch.finfo(leaf.dtype).eps) else start


def add_group(
    inner: optim.Optimizer, added: Mapping[str, Any], known: Sequence[LearnedOption], hparams: nn.Module
) -> list[LearnedOption]:
    """Add a parameter group, with the learned options that are defaults of the optimizer; returns all learned options."""
    inherited: dict[str, Any] = {}
    for option in known:
        if option.transform is not None and option.is_default:
            before = inherited.get(option.key, inner.defaults[option.key])
            inherited[option.key] = _replaced(before, option.member, option.transform(hparams.get_parameter(option.name)))
    inner.add_param_group({**inherited, **added})
    computed = [option for option in known if option.transform is not None]
    return [*computed, *take_over(inner, find_learned_options(inner, hparams), hparams)]


@contextmanager
def in_effect(inner: optim.Optimizer, options: Sequence[LearnedOption], hparams: nn.Module) -> Iterator[None]:
    """Give the computed options their present values, number · t(θ) / t(θ₀), for one step.

    Raises:
        ValueError: a leaf that is an option was overwritten, or will be by a scheduler.
    """
    check_in_place(inner, options)
    before: dict[tuple[int, str], Any] = {}
    put: dict[tuple[int, str], Any] = {}
    for option in options:
        if option.transform is not None:
            group, place = inner.param_groups[option.group], (option.group, option.key)
            before[place] = group[option.key]
            with torch.no_grad():
                natural = float(option.transform(hparams.get_parameter(option.name)))
            number, start = option.scale(group)
            now = number if natural == start else number / start * natural
            put[place] = _replaced(put.get(place, before[place]), option.member, now)
    for (number, key), value in put.items():
        inner.param_groups[number][key] = value
    try:
        yield
    finally:
        for (number, key), value in put.items():
            if inner.param_groups[number][key] is value:  # else a hook of the step has set another
                inner.param_groups[number][key] = before[number, key]


def _replaced(whole: Any, member: int | None, value: Any) -> Any:
    """The option with a new value, or with one member of its pair replaced."""
    return value if member is None else tuple(value if n == member else other for n, other in enumerate(whole))


def starts(options: Iterable[LearnedOption]) -> list[list[Any]]:
    """The starts of the computed options, for a checkpoint."""
    return [[o.name, o.group, o.key, o.member, o.start] for o in options if o.transform is not None]


def restarted(options: Iterable[LearnedOption], saved: Iterable[Sequence[Any]]) -> list[LearnedOption]:
    """The options with the starts that were saved."""
    by_place = {tuple(place): start for *place, start in saved}
    return [o._replace(start=by_place.get((o.name, o.group, o.key, o.member), o.start)) for o in options]


def check_in_place(inner: optim.Optimizer, options: Iterable[LearnedOption]) -> None:
    """Raise ``ValueError`` if a leaf that is an option was overwritten, so that it would no longer be learned, or will be.

    ``ReduceLROnPlateau`` did so before torch 2.10, ``OneCycleLR`` does for a momentum, ``inner.load_state_dict`` for all.
    """
    for option in options:
        if option.transform is None and (now := option.present(inner.param_groups[option.group])) is not option.value:
            raise ValueError(WRITTEN_OVER.format(name=option.name, key=option.key, now=now))
        if option.transform is None and option.key == "lr" and "initial_lr" in inner.param_groups[option.group]:
            raise ValueError(SCHEDULED_LEAF.format(name=option.name))


def put_back(inner: optim.Optimizer, options: Iterable[LearnedOption]) -> None:
    """Put the leaves that are options back into ``inner``, after a state was loaded into it."""
    for option in options:
        if option.transform is None:
            group = inner.param_groups[option.group]
            group[option.key] = _replaced(group[option.key], option.member, option.value)


def resumed(inner: optim.Optimizer, options: Sequence[LearnedOption], before: Sequence[Any]) -> list[LearnedOption]:
    """The options after ``inner`` got the state of a run that did not learn them; ``before`` is what was in their places.

    A rate goes on as far down as that run's schedule had come: option = t(θ) · number / initial number.
    """
    found = []
    for option, number in zip(options, before, strict=True):
        group = inner.param_groups[option.group]
        if option.transform is not None and option.member is None and (initial := group.get("initial_" + option.key)):
            option = option._replace(start=float(initial))
        else:
            group[option.key] = _replaced(group[option.key], option.member, number)
        found.append(option)
    return found


def check_unscheduled(groups: Iterable[Mapping[str, Any]], leaves: Tree) -> None:
    """Raise ``ValueError`` if the learning rate of one of these groups, which a scheduler sets, is a hyperparameter."""
    rates = [group["lr"] for group in groups if isinstance(group.get("lr"), Tensor)]
    if learned := [name for name, leaf in leaves.items() for rate in rates if shares_memory(rate, leaf)]:
        raise ValueError(SCHEDULED_LEAF.format(name=learned[0]))


def shares_memory(x: Tensor, leaf: Tensor) -> bool:
    """Whether ``x`` is ``leaf``, or a view of its memory."""
    start = leaf.data_ptr()
    inside = x.device == leaf.device and start != 0 and start <= x.data_ptr() < start + leaf.numel() * leaf.element_size()
    return x is leaf or inside
