"""A run that was begun without hoptim goes on with it: a bare optimizer's state is taken, with one warning."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCHES, VAL, tiny
from torch import Tensor, nn, optim
from torch.distributions import constraints
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs

import hoptim
from hoptim import BilevelOptimizer, HyperParameters, Unrolled

BARE = r"no 'hoptim' entry: it is a bare optimizer's.*hyperparameters, the outer optimizer and counters stay as they are"


def steps(optimizer: Any, loss: Callable[[Any], Tensor], first: int, last: int, scheduler: Any = None) -> None:
    for number in range(first, last):
        optimizer.zero_grad()
        loss(BATCHES[number % 6]).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def wrapped(problem: hoptim.Problem, inner: optim.Optimizer, **more: Any) -> BilevelOptimizer:
    outer = optim.Adam(problem.hparams.parameters(), lr=0.1)
    return BilevelOptimizer(inner, outer, problem, val_batches=[VAL], **more)


@pytest.mark.parametrize("kind", [lambda p: optim.AdamW(p, lr=0.01), lambda p: optim.SGD(p, lr=0.05, momentum=0.9)])
def test_the_run_goes_on_to_the_bits_and_counters_and_hyperparameters_stay(kind: Any) -> None:
    whole = tiny()
    bare = kind(whole.model.parameters())
    steps(bare, whole.loss, 0, 5)
    weights, state = copy.deepcopy((whole.model.state_dict(), bare.state_dict()))
    steps(bare, whole.loss, 5, 9)

    problem = tiny()
    optimizer = wrapped(problem, kind(problem.model.parameters()), every=2)
    steps(optimizer, optimizer.loss, 0, 2)
    optimizer.every = None
    before = copy.deepcopy(optimizer.state_dict()["hoptim"])
    problem.model.load_state_dict(weights)
    with pytest.warns(UserWarning, match=BARE) as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    after = optimizer.state_dict()["hoptim"]
    assert (after["inner_steps"], after["hyper_steps"]) == (before["inner_steps"], before["hyper_steps"]) == (2, 1)
    assert all(torch.equal(after["hparams"][name], value) for name, value in before["hparams"].items())
    assert str(after["outer"]) == str(before["outer"])
    with torch.no_grad():  # those of the bare run
        for leaf, other in zip(problem.hparams.parameters(), whole.hparams.parameters(), strict=True):
            leaf.copy_(other)
    steps(optimizer, optimizer.loss, 5, 9)
    assert all(map(torch.equal, problem.model.state_dict().values(), whole.model.state_dict().values()))


def test_the_state_of_another_model_is_refused_by_torch_and_nothing_changes() -> None:
    problem = tiny()
    optimizer = wrapped(problem, optim.Adam(problem.model.parameters()), every=2)
    steps(optimizer, optimizer.loss, 0, 3)
    before = copy.deepcopy(optimizer.state_dict())
    other = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    for wrong in (
        optim.Adam(other.parameters()).state_dict(),
        optim.Adam([{"params": [p]} for p in problem.model.parameters()]).state_dict(),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ValueError, match="parameter group"):
                optimizer.load_state_dict(wrong)
        assert str(optimizer.state_dict()) == str(before)


def test_a_window_of_unrolled_steps_starts_anew() -> None:
    problem = tiny()
    optimizer = wrapped(problem, optim.SGD(problem.model.parameters(), lr=0.05), every=4, hypergradient=Unrolled(4))
    steps(optimizer, optimizer.loss, 0, 2)
    with pytest.warns(UserWarning, match=BARE):
        optimizer.load_state_dict(copy.deepcopy(optimizer.inner.state_dict()))
    steps(optimizer, optimizer.loss, 2, 4)
    assert optimizer.record is not None
    solution = optimizer.record.result.solution
    assert (solution.status.name, solution.detail) == ("REPLAY_DIFFERS", "of 4 steps 2 are known")


# Learned rates --------------------------------------------------------------------------------------------------------


def loss(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def learned(**more: Any) -> BilevelOptimizer:
    """An optimizer with a learned rate, which is 0.03 at the start and 0.06 now."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    hparams = HyperParameters(
        {"rate": torch.tensor(0.03), "momentum": torch.tensor(0.5), "decay": torch.tensor(0.02)},
        {"rate": constraints.positive, "momentum": constraints.unit_interval},
    )
    problem = hoptim.Problem(model, hparams, loss, loss)
    inner = optim.SGD(model.parameters(), lr=9.0, momentum=0.9, weight_decay=0.1)
    options = {"lr": "rate", "momentum": "momentum", "weight_decay": "decay"}
    optimizer = wrapped(problem, inner, options=options, every=None, **more)
    with torch.no_grad():
        hparams.get_parameter("rate").add_(torch.tensor(2.0).log())
    return optimizer


def used(optimizer: BilevelOptimizer) -> dict[str, float]:
    """The options with which the next step is taken."""
    found: dict[str, Any] = {}
    keys = ("lr", "momentum", "weight_decay")
    handle = optimizer.inner.register_step_pre_hook(lambda o, *_: found.update({k: o.param_groups[0][k] for k in keys}))
    steps(optimizer, optimizer.loss, 0, 1)
    handle.remove()
    return {key: float(torch.as_tensor(value).detach()) for key, value in found.items()}


def bare_state(schedule: Callable[[optim.Optimizer], Any] | None, taken: int = 5) -> tuple[Any, Any]:
    """The states of a bare run at lr 0.1 with another momentum and decay, and of its scheduler."""
    problem = tiny()
    bare = optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.8, weight_decay=0.0)
    scheduler = None if schedule is None else schedule(bare)
    steps(bare, problem.loss, 0, taken, scheduler)
    return copy.deepcopy((bare.state_dict(), None if scheduler is None else scheduler.state_dict()))


@pytest.mark.parametrize(
    ("schedule", "share", "next_share"),
    [
        (None, 1.0, 1.0),
        (lambda o: lrs.StepLR(o, 2, gamma=0.5), 0.25, 0.125),
        (lambda o: lrs.LambdaLR(o, lambda i: 1 / (1 + i)), 1 / 6, 1 / 7),
        (lambda o: lrs.CosineAnnealingLR(o, 10), 0.5, (1 + torch.tensor(0.6 * torch.pi).cos().item()) / 2),
    ],
    ids=["none", "steps", "lambda", "cosine"],
)
def test_a_learned_rate_goes_on_as_far_down_as_the_bare_runs_schedule(
    schedule: Any, share: float, next_share: float
) -> None:
    state, scheduled = bare_state(schedule)
    optimizer = learned()
    scheduler = None if schedule is None else schedule(optimizer)
    with pytest.warns(UserWarning, match=BARE):
        optimizer.load_state_dict(state)
    if scheduler is not None:
        scheduler.load_state_dict(scheduled)
    now = used(optimizer)
    assert now["lr"] == pytest.approx(0.06 * share, rel=1e-6)
    assert now["momentum"] == pytest.approx(0.5, rel=1e-6)  # not 0.8 relative to its start
    assert now["weight_decay"] == pytest.approx(0.02, rel=1e-6)
    assert optimizer.inner.param_groups[0]["weight_decay"] == pytest.approx(0.02, rel=1e-6)
    if scheduler is not None:
        scheduler.step()
    assert used(optimizer)["lr"] == pytest.approx(0.06 * next_share, rel=1e-6)


def test_a_scheduler_that_is_built_after_the_load_goes_on_too() -> None:
    state, _ = bare_state(lambda o: lrs.LambdaLR(o, lambda i: 1 / (1 + i)))
    optimizer = learned()
    with pytest.warns(UserWarning, match=BARE):
        optimizer.load_state_dict(state)
    scheduler = lrs.LambdaLR(optimizer, lambda i: 1 / (1 + i), last_epoch=4)  # whose construction takes the fifth step
    assert used(optimizer)["lr"] == pytest.approx(0.06 / 6, rel=1e-6)
    scheduler.step()
    assert used(optimizer)["lr"] == pytest.approx(0.06 / 7, rel=1e-6)


def test_a_refused_state_leaves_learned_options_as_they_were() -> None:
    optimizer = learned()
    before = used(optimizer)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(optim.SGD([torch.ones(1)], lr=0.7).state_dict())
    assert used(optimizer) == before
