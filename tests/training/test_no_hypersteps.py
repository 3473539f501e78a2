"""A training that ends before its first hyperstep says so, once, when its optimizer goes or the process ends."""

from __future__ import annotations

import copy
import gc
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCHES, VAL, tiny
from torch import Tensor, nn

import hoptim
from hoptim import BilevelOptimizer, CrossValidated, Unrolled

TOLD = "the training ended after {} steps without a hyperstep, .* would have come after step {}\\. .*every.*warmup"


def optimizer_of(**options: Any) -> BilevelOptimizer:
    problem = tiny()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.05)
    return BilevelOptimizer(
        inner, torch.optim.SGD(problem.hparams.parameters(), lr=0.1), problem, val_batches=[VAL], **options
    )


def train(optimizer: BilevelOptimizer, steps: int) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        optimizer.loss(BATCHES[number % 6]).backward()
        optimizer.step()


def told(use: Callable[[], object]) -> list[str]:
    """What was said of a training without hypersteps while ``use`` ran and its objects went."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        use()
        gc.collect()
    return [str(one.message) for one in caught if "without a hyperstep" in str(one.message)]


@pytest.mark.parametrize(
    ("options", "taken", "first"),
    [
        ({"every": 100}, 60, 100),
        ({}, 3, 100),
        ({"every": 10, "warmup": 35}, 12, 40),
        ({"every": 20, "hypergradient": Unrolled(5)}, 19, 20),
    ],
)
def test_it_is_told_with_its_numbers(options: dict[str, Any], taken: int, first: int) -> None:
    optimizer = optimizer_of(**options)
    train(optimizer, taken)
    held = [optimizer]
    del optimizer
    assert told(lambda: None) == []
    [message] = told(held.clear)
    assert re.match(TOLD.format(taken, first), message)
    assert told(lambda: None) == []  # once


@pytest.mark.parametrize(
    ("options", "taken"),
    [({"every": None}, 5), ({"every": 5}, 5), ({"every": 2, "warmup": 5}, 7), ({"every": 100}, 0)],
    ids=["by hand", "one", "one, and a rest", "no step"],
)
def test_there_is_nothing_to_tell(options: dict[str, Any], taken: int) -> None:
    assert told(lambda: train(optimizer_of(**options), taken)) == []


def test_a_hyperstep_by_hand_is_one() -> None:
    def use() -> None:
        optimizer = optimizer_of(every=100)
        train(optimizer, 5)
        optimizer.hyperstep()
        train(optimizer, 5)

    def after_the_last() -> None:
        optimizer = optimizer_of(every=100)
        train(optimizer, 5)
        optimizer.hyperstep()

    assert told(use) == told(after_the_last) == []


def test_a_resumed_training_counts_its_steps_before() -> None:
    states: list[Any] = []

    def use(taken: int) -> None:
        optimizer = optimizer_of(every=8)
        if states:
            optimizer.load_state_dict(states[-1])
        train(optimizer, taken)
        states.append(copy.deepcopy(optimizer.state_dict()))

    assert "ended after 3 steps" in told(lambda: use(3))[0]
    assert "ended after 5 steps" in told(lambda: use(2))[0]
    assert told(lambda: use(3)) == []  # the eighth
    assert told(lambda: use(2)) == []


def test_a_copy_for_a_framework_does_not_tell_a_second_time() -> None:
    def use() -> None:
        optimizer = optimizer_of(every=100)
        train(optimizer, 2)
        other = copy.copy(optimizer)  # as Lightning does
        other.__dict__ = dict(optimizer.__dict__)
        train(other, 2)

    found = told(use)
    assert len(found) == 1
    assert "ended after 4 steps" in found[0]


def test_the_process_that_just_ends_is_told() -> None:
    code = (
        "import torch, hoptim\n"
        "from torch import nn\n"
        "model, hparams = nn.Linear(1, 1), nn.ParameterDict({'decay': torch.tensor(1.0)})\n"
        "def loss(model, hparams, batch):\n"
        "    return model(batch).square().mean() + hparams['decay'] * model.weight.square().sum()\n"
        "inner, outer = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(hparams.parameters(), lr=0.1)\n"
        "problem, one = hoptim.Problem(model, hparams, loss, loss), torch.ones(1, 1)\n"
        "optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[one], warmup=2000)\n"
        "for _ in range(8):\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.loss(one).backward()\n"
        "    optimizer.step()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stderr.count("ended after 8 steps without a hyperstep") == 1
    assert "after step 2000" in ran.stderr


def test_a_fit_tells_of_itself() -> None:
    """Neither its folds nor its last training are told to have had no hypersteps."""

    def loss(model: nn.Module, hparams: Any, batch: Tensor) -> Tensor:
        return model(batch[:, None].double()).square().mean() + hparams["decay"].exp() * model.weight.square().sum()

    def fit(steps: int) -> hoptim.CrossValidatedFit:
        def loop(model: nn.Module, optimizer: BilevelOptimizer, examples: Tensor) -> None:
            for _ in range(steps):
                optimizer.zero_grad()
                optimizer.loss(examples).backward()
                optimizer.step()

        hparams = nn.ParameterDict({"decay": nn.Parameter(torch.tensor(-1.0))})
        return CrossValidated(
            lambda: nn.Linear(1, 1), hparams, loss, loss, examples=12, steps=12, hypersteps=2,
            inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        ).fit(loop)  # fmt: skip

    def too_short() -> None:
        with pytest.raises(ValueError, match="ended before the first hyperstep"):
            fit(3)

    assert told(lambda: fit(12)) == told(too_short) == []
