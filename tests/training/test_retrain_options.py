"""Options of the inner optimizer that were learned: a retraining has them, schedule or not, as a plain loop has by hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from test_optimizer import through_disk
from torch import Tensor, nn, optim
from torch.distributions import constraints
from torch.optim import lr_scheduler as lrs

import hoptim
from hoptim import BilevelOptimizer, HyperParameters, Problem

DRAW = torch.Generator().manual_seed(0)
N, STEPS = 24, 12
X = torch.randn(N, 4, generator=DRAW, dtype=torch.float64)
Y = torch.randn(N, 1, generator=DRAW, dtype=torch.float64)
TRAIN, VAL, ALL = torch.arange(16), torch.arange(16, N), torch.arange(N)


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X[batch]) - Y[batch]).square().mean()


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """Hyperparameters, with constraints or none; ``options`` that name them; the optimizer of a script without them."""

    values: dict[str, float]
    kinds: dict[str, Any]
    options: dict[str, Any]
    inner: Callable[[nn.Module], optim.Optimizer]
    outer: float = 0.2

    def hparams(self, shift: float = 1.0) -> HyperParameters:
        return HyperParameters({name: double(value * shift) for name, value in self.values.items()}, self.kinds)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.7}]


CASES = {
    "rate": Case(
        {"rate": 0.05},
        {"rate": constraints.positive},
        {"lr": "rate"},
        lambda m: optim.SGD(m.parameters(), lr=0.9, momentum=0.5),
    ),
    "two groups": Case(
        {"one": 0.05, "two": 0.02},
        {"one": constraints.positive, "two": constraints.positive},
        {"lr": ["one", "two"]},
        lambda m: optim.SGD(groups(m), lr=0.9),
    ),
    "one group of two": Case(
        {"rate": 0.05}, {"rate": constraints.positive}, {"lr": ["rate", None]}, lambda m: optim.SGD(groups(m), lr=0.9)
    ),
    "betas": Case(
        {"rate": 0.02, "beta": 0.8, "wd": 0.05},
        {"rate": constraints.positive, "beta": constraints.unit_interval, "wd": constraints.positive},
        {"lr": "rate", "betas": ("beta", None), "weight_decay": "wd"},
        lambda m: optim.Adam(m.parameters(), lr=0.9, betas=(0.5, 0.95), foreach=False),
    ),
    "second beta": Case(
        {"beta": 0.9},
        {"beta": constraints.unit_interval},
        {"betas": (None, "beta")},
        lambda m: optim.Adam(m.parameters(), 0.02),
    ),
    "leaf": Case(
        {"rate": 0.05},
        {},
        {"lr": "rate"},
        lambda m: optim.SGD(m.parameters(), lr=0.9, foreach=False),
        outer=0.01,
    ),
    "nonnegative": Case(
        {"rate": 0.05},
        {"rate": constraints.nonnegative},
        {"lr": "rate"},
        lambda m: optim.SGD(m.parameters(), lr=0.9),
        outer=0.01,
    ),
}

SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "none": lambda o: None,
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=STEPS + 1, cycle_momentum=False),
    "OneCycleLR, momentum": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
}


def loop(schedule: str = "none") -> Callable[[Any, Any, Any], None]:
    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        scheduler = SCHEDULES[schedule](optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            optimizer.loss(examples.roll(step)[:8]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    return train


def built(case: Case, shift: float = 1.0) -> BilevelOptimizer:
    model, hparams = make(), case.hparams(shift)
    problem = Problem(model, hparams, loss, loss)
    outer = optim.Adam(hparams.parameters(), lr=case.outer)
    return BilevelOptimizer(case.inner(model), outer, problem, val_batches=[VAL], every=3, options=case.options)


def learned(case: Case) -> Problem:
    optimizer = built(case)
    loop()(optimizer.problem.model, optimizer, TRAIN)
    assert optimizer.hyper_steps == 4
    for name, value in case.values.items():
        assert abs(float(optimizer.problem.hparams[name].detach()) / value - 1) > 1e-3
    return optimizer.problem


class ByHand:
    """A plain optimizer with the numbers of the starts; a step takes each number times what was learned over its start."""

    def __init__(self, case: Case, model: nn.Module, hparams: Any) -> None:
        self.inner, self.loss = case.inner(model), lambda batch: loss(model, None, batch)
        self.ratios: dict[tuple[int, str, int | None], float] = {}
        for key, names in case.options.items():
            for number, group in enumerate(self.inner.param_groups):
                name = names[number] if isinstance(names, list) else names
                whole = isinstance(name, str)
                for member, one in enumerate([name] if whole or name is None else name):
                    if one is not None:
                        place = (number, key, None if whole else member)
                        self.ratios[place] = float(torch.as_tensor(hparams[one]).detach()) / case.values[one]
                        self.put(group, place, case.values[one])
        self.param_groups = self.inner.param_groups

    def put(self, group: Any, place: Any, value: float) -> None:
        _, key, member = place
        group[key] = value if member is None else tuple(value if n == member else x for n, x in enumerate(group[key]))

    def step(self) -> None:
        before = [dict(group) for group in self.param_groups]
        for place, ratio in self.ratios.items():
            group = self.param_groups[place[0]]
            present = group[place[1]] if place[2] is None else group[place[1]][place[2]]
            self.put(group, place, present * ratio)
        self.inner.step()
        for group, old in zip(self.param_groups, before, strict=True):
            group.update(old)

    def zero_grad(self) -> None:
        self.inner.zero_grad()


def by_hand(case: Case, hparams: Any, schedule: str) -> nn.Module:
    model = make()
    optimizer = ByHand(case, model, hparams)
    scheduler = SCHEDULES[schedule](optimizer.inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch does not see that its step is called
        for step in range(STEPS):
            optimizer.zero_grad()
            optimizer.loss(ALL.roll(step)[:8]).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return model


def assert_close(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=1e-10, atol=1e-12)


SCHEDULED = [
    (name, schedule, how)
    for name in CASES
    for schedule in SCHEDULES
    for how in ("not named", "named again")
    if schedule != "OneCycleLR, momentum" or name in ("rate", "betas")
]


@cache
def problem_of(name: str) -> Problem:
    return learned(CASES[name])


@pytest.mark.parametrize(("name", "schedule", "how"), SCHEDULED)
def test_a_retraining_has_what_was_learned_schedule_or_not(name: str, schedule: str, how: str) -> None:
    case = CASES[name]
    problem = problem_of(name)
    options = case.options if how == "named again" else None
    model = hoptim.retrain(problem, make, loop(schedule), ALL, inner=case.inner, options=options)
    assert_close(model, by_hand(case, problem.hparams, schedule))
    start = by_hand(case, case.values, schedule)
    assert not torch.allclose(model[0].weight, start[0].weight, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("leaf", "none"),
        *((name, schedule) for name in ("rate", "betas", "two groups") for schedule in ("none", "OneCycleLR")),
    ],
)
def test_after_a_checkpoint_that_other_starts_were_built_for(name: str, schedule: str) -> None:
    """The starts are those of the run that was saved, though the second script begins elsewhere."""
    case = CASES[name]
    first = built(case)
    loop()(first.problem.model, first, TRAIN)
    second = built(case, shift=0.5)
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    second.load_state_dict(through_disk(first.state_dict()))
    model = hoptim.retrain(second.problem, make, loop(schedule), ALL, inner=case.inner)
    assert_close(model, by_hand(case, first.problem.hparams, schedule))


def test_a_group_that_the_loop_adds_has_the_learned_default() -> None:
    case, taken = CASES["rate"], []

    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
        optimizer.inner.register_step_pre_hook(lambda o, *_: taken.append([g["lr"] for g in o.param_groups]))
        loop()(model, optimizer, examples)

    problem = learned(case)
    hoptim.retrain(problem, make, train, ALL, inner=case.inner)
    rate = float(problem.hparams["rate"].detach())
    assert taken == [[pytest.approx(rate, rel=1e-12)] * 2] * STEPS


def test_a_key_with_none_is_left_to_the_script() -> None:
    case, problem = CASES["betas"], problem_of("betas")
    left = Case(case.values, case.kinds, {"weight_decay": "wd"}, case.inner)
    model = hoptim.retrain(problem, make, loop(), ALL, inner=case.inner, options={"lr": None, "betas": None})
    assert_close(model, by_hand(left, problem.hparams, "none"))
    all_left = Case({}, {}, {}, lambda m: optim.RMSprop(m.parameters(), lr=0.01))
    options = {"lr": None, "betas": None, "weight_decay": None}
    with pytest.raises(ValueError, match="options has 'betas', and RMSprop has only"):
        hoptim.retrain(problem, make, loop(), ALL, inner=all_left.inner, options=options)
    model = hoptim.retrain(problem_of("rate"), make, loop(), ALL, inner=all_left.inner, options={"lr": None})
    assert_close(model, by_hand(all_left, {}, "none"))


@pytest.mark.parametrize(
    ("name", "inner", "options", "words"),
    [
        (
            "rate",
            lambda m: optim.SGD(groups(m), lr=0.1),
            None,
            "'rate' was learned as the lr of SGD with 1 .* SGD with 2: make",
        ),
        ("rate", lambda m: optim.Adam(m.parameters()), None, "'rate' was learned as the lr of SGD .* makes Adam with 1"),
        (
            "two groups",
            lambda m: optim.SGD(m.parameters(), lr=0.1),
            None,
            "SGD with 2 parameter groups, and inner makes SGD with 1",
        ),
        ("two groups", CASES["two groups"].inner, {"lr": "one"}, r"the lr was learned as \['one', 'two'\]"),
        ("two groups", CASES["two groups"].inner, {"lr": ["two", "one"]}, r"the lr was learned as \['one', 'two'\]"),
        ("betas", CASES["betas"].inner, {"betas": (None, "beta")}, r"the betas was learned as \[\('beta', None\)\]"),
    ],
)
def test_another_optimizer_than_that_of_the_run_is_refused(name: str, inner: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hoptim.retrain(problem_of(name), make, loop(), ALL, inner=inner, options=options)


def test_a_second_optimizer_without_learned_options_forgets_nothing() -> None:
    case = CASES["rate"]
    problem = learned(case)
    BilevelOptimizer(case.inner(problem.model), problem.hparams.optimizer(), problem, val_batches=[VAL], every=None)
    assert_close(hoptim.retrain(problem, make, loop(), ALL, inner=case.inner), by_hand(case, problem.hparams, "none"))


def test_it_is_the_last_training_of_a_fit_with_a_schedule() -> None:
    case = CASES["rate"]
    hparams = case.hparams()
    outer = optim.Adam(hparams.parameters(), lr=0.2)
    settings = {"inner": case.inner, "outer": outer, "options": case.options, "examples": N, "steps": STEPS}
    found = hoptim.CrossValidated(make, hparams, loss, loss, hypersteps=3, **settings).fit(loop("OneCycleLR"))
    assert_close(found.model, by_hand(case, hparams, "OneCycleLR"))


def test_a_copy_of_the_problem_has_them_too() -> None:
    case, problem = CASES["rate"], copy.deepcopy(problem_of("rate"))
    assert_close(hoptim.retrain(problem, make, loop(), ALL, inner=case.inner), by_hand(case, problem.hparams, "none"))
