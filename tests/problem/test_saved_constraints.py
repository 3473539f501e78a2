"""A state knows the constraints that it was saved under, and is refused under others, by the value that it would have."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions.constraints import Constraint

from hoptim import HyperParameters

POSITIVE, NONNEGATIVE = constraints.positive, constraints.nonnegative


def decay(constraint: Constraint | None, value: float = 0.068) -> HyperParameters:
    return HyperParameters({"net.decay": torch.tensor(value), "free": torch.tensor(-1.0)}, {"net.decay": constraint})


def nested(constraint: Constraint) -> nn.Module:
    return nn.ModuleDict({"net": nn.Linear(2, 1), "all": nn.ModuleDict({"decay": decay(constraint)})})


def from_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WAYS: dict[str, Callable[[Any], Any]] = {"as it is": lambda state: state, "copied": copy.deepcopy, "file": from_file}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (decay, "net.decay"),
        (nested, "all.decay.net.decay"),
        (lambda kind: nn.DataParallel(nested(kind)), "module.all.decay.net.decay"),
    ],
)
def test_a_state_loads_under_its_own_constraint_alone(make: Callable[[Any], nn.Module], name: str, way: str) -> None:
    saved = make(POSITIVE)
    keys = [key for key, _ in saved.named_parameters()]
    state = WAYS[way](saved.state_dict())
    assert list(state) == keys  # nothing is added but names

    again = make(POSITIVE)
    for leaf in again.parameters():
        leaf.data.add_(1.0)
    again.load_state_dict(state)
    assert all(torch.equal(p, dict(saved.named_parameters())[key]) for key, p in again.named_parameters())

    other = make(NONNEGATIVE)
    before = other.get_parameter(name).item()
    words = rf"'{name}' was saved under GreaterThan\(lower_bound=0.0\) and is GreaterThanEq\(lower_bound=0.0\) here"
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state)
    assert other.get_parameter(name).item() == before == 0.068  # and not log 0.068 = −2.69


TWO = torch.tensor([1.0, 2.0], dtype=torch.float64)
DIFFERENT: dict[str, tuple[Any, Any, Tensor]] = {  # two constraints, and a value inside both
    "of another kind": (constraints.unit_interval, POSITIVE, torch.tensor(0.5)),
    "of another bound": (constraints.interval(0.0, 2.0), constraints.interval(0.0, 3.0), torch.tensor(0.5)),
    "of another lower bound": (constraints.greater_than(0.1), constraints.greater_than(0.2), torch.tensor(0.5)),
    "with and without": (None, POSITIVE, torch.tensor(0.5)),
    "bounds that print alike": (
        constraints.less_than(TWO + 1e-9), constraints.less_than(TWO), TWO - 0.5
    ),
    "parts of one vector": (
        constraints.cat([POSITIVE, constraints.real]), constraints.cat([constraints.real, POSITIVE]), TWO
    ),
    "inside another": (
        constraints.independent(POSITIVE, 1), constraints.independent(constraints.greater_than(0.5), 1), TWO
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_number_of_a_constraint_counts(name: str) -> None:
    first, second, value = DIFFERENT[name]
    one, other = (HyperParameters({"x": value}, {"x": kind} if kind else None) for kind in (first, second))
    for saved, loading in ((one, other), (other, one)):
        with pytest.raises(ValueError, match="'x' was saved under"):
            loading.load_state_dict(saved.state_dict())
        saved.load_state_dict(copy.deepcopy(saved).state_dict())


ALIKE: dict[str, tuple[Constraint, Constraint]] = {
    "an int and a float": (POSITIVE, constraints.greater_than(0)),
    "two precisions": (constraints.less_than(TWO), constraints.less_than(TWO.float())),
    "two names": (constraints.unit_interval, constraints.interval(0, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_constraints_that_are_the_same_in_other_words_load(name: str) -> None:
    first, second = (HyperParameters({"x": torch.tensor([0.25, 0.5])}, {"x": kind}) for kind in ALIKE[name])
    second["x"] = torch.tensor([0.75, 0.125])
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second["x"].detach(), torch.tensor([0.25, 0.5]))


def test_a_state_without_its_constraints_loads() -> None:
    saved = decay(POSITIVE).state_dict()
    del saved._metadata[""]["constraints"]  # type: ignore[attr-defined]  # as by safetensors
    for state in (saved, from_file(saved), dict(decay(POSITIVE).state_dict())):
        loaded = decay(POSITIVE, 0.5)
        loaded.load_state_dict(state)
        assert loaded["net.decay"].item() == pytest.approx(0.068)


def test_a_part_of_a_state_is_checked_by_its_own_names() -> None:
    state = decay(POSITIVE).state_dict()
    two = HyperParameters({"net.decay": torch.tensor(0.5), "new": torch.tensor(1.0)}, {"net.decay": POSITIVE})
    assert two.load_state_dict(state, strict=False).missing_keys == ["new"]
    assert two["net.decay"].item() == pytest.approx(0.068)


def test_a_negative_leaf_is_refused_where_a_plain_dict_has_lost_the_constraint() -> None:
    saved = HyperParameters({"decay": torch.tensor(0.068)}, {"decay": constraints.positive}).state_dict()
    there = HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.nonnegative})
    with pytest.raises(ValueError, match=r"'decay' is -2.69, and it is nonnegative here"):
        there.load_state_dict({name: leaf.clone() for name, leaf in saved.items()})
    assert there["decay"].item() == pytest.approx(0.1)
