"""Layers that are frozen, unfrozen or replaced between unrolled steps: the hypergradient is that of the steps since then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCHES, VAL
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim
from hoptim import BilevelOptimizer, HyperParameters, Unrolled


def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    size = sum(p.square().sum() for p in model.parameters())
    return F.cross_entropy(model(batch[0]), batch[1]) + hparams["decay"] * size


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def build(method: Unrolled, frozen: bool = False) -> BilevelOptimizer:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].requires_grad_(not frozen)
    values = {"rate": torch.tensor(0.3), "decay": torch.tensor(0.05)}
    hparams = HyperParameters(values, dict.fromkeys(values, constraints.positive))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.SGD(hparams.parameters(), lr=0.1)
    problem = hoptim.Problem(model, hparams, loss, val_loss)
    every = method.steps
    return BilevelOptimizer(
        inner, outer, problem, val_batches=[VAL], options={"lr": "rate"}, hypergradient=method, every=every
    )


def take(optimizer: BilevelOptimizer, first: int, last: int) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        optimizer.loss(BATCHES[number % 6]).backward()
        optimizer.step()


def difference(optimizer: BilevelOptimizer, name: str, first: int, last: int) -> float:
    """dL_V/dθ by central differences of real steps, from the present weights and momenta."""
    ends = []
    for sign in (1, -1):
        model, state = copy.deepcopy((optimizer.problem.model, optimizer.inner.state_dict()))
        hparams = copy.deepcopy(optimizer.problem.hparams)
        with torch.no_grad():
            hparams.get_parameter(name).add_(sign * 1e-5)
            natural = {key: float(hparams[key]) for key in hparams}
        plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        plain.load_state_dict(state)
        plain.param_groups[0]["lr"] = natural["rate"]
        for number in range(first, last):
            plain.zero_grad()
            loss(model, natural, BATCHES[number % 6]).backward()
            plain.step()
        ends.append(val_loss(model, None, VAL).item())
    return (ends[0] - ends[1]) / 2e-5


def freeze(model: nn.Module) -> None:
    model[0].requires_grad_(False)  # type: ignore[index]


def unfreeze(model: nn.Module) -> None:
    model[0].requires_grad_(True)  # type: ignore[index]


@pytest.mark.parametrize("method", [Unrolled(5), Unrolled(5, checkpoint=True)], ids=str)
@pytest.mark.parametrize("change", [freeze, unfreeze])
@pytest.mark.parametrize("before", [1, 3])
def test_the_hypergradient_is_that_of_the_steps_after_the_change(
    method: Unrolled, change: Callable[[nn.Module], None], before: int
) -> None:
    optimizer = build(method, frozen=change is unfreeze)
    take(optimizer, 0, before)
    change(optimizer.problem.model)
    expected = {name: difference(optimizer, name, before, 5) for name in ("rate", "decay")}
    take(optimizer, before, 5)
    assert optimizer.record is not None
    result = optimizer.record.result
    assert (result.solution.status.name, result.solution.detail) == ("REPLAY_DIFFERS", f"of 5 steps {5 - before} are known")
    for name, value in expected.items():
        assert abs(value) > 1e-4
        assert result.grads[name].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_a_change_between_the_last_loss_and_the_hyperstep_is_refused_with_a_remedy(change: Any) -> None:
    optimizer = build(Unrolled(2), frozen=change is unfreeze)
    take(optimizer, 0, 1)
    optimizer.zero_grad()
    optimizer.loss(BATCHES[1]).backward()
    change(optimizer.problem.model)
    with pytest.raises(ValueError, match=r"none of the last 2 inner steps.*freeze or unfreeze layers before that"):
        optimizer.step()


@pytest.mark.parametrize("change", [freeze, unfreeze])
def test_a_hyperstep_by_hand_after_a_change_is_that_of_the_steps_to_come(change: Any) -> None:
    """As at any time when no steps are kept."""
    optimizer = build(Unrolled(3), frozen=change is unfreeze)
    take(optimizer, 0, 2)
    change(optimizer.problem.model)
    expected = hoptim.hypergradient(optimizer.problem, BATCHES[1], VAL, Unrolled(3), inner=optimizer).grads
    found = optimizer.hyperstep(train_batch=BATCHES[1]).result.grads
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_state_from_within_a_window_loads_after_layers_were_frozen() -> None:
    first, second = build(Unrolled(4)), build(Unrolled(4))
    take(first, 0, 2)
    second.problem.model.load_state_dict(copy.deepcopy(first.problem.model.state_dict()))
    freeze(second.problem.model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    expected = difference(second, "rate", 2, 4)
    take(second, 2, 4)
    assert second.record is not None
    assert second.record.result.solution.detail == "of 4 steps 2 are known"
    assert second.record.result.grads["rate"].item() == pytest.approx(expected, rel=1e-5)
