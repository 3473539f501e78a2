"""Any scheduler on the wrapper moves the inner optimizer as on the inner optimizer itself; one on the outer, its rate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cases import same
from test_inner_optimizers import Row, Run, step, two_groups
from test_optimizer import through_disk
from tiny import BATCHES, VAL, tiny
from torch import optim
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from hoptim import BilevelOptimizer, Exact, Implicit, Neumann, Record, Unrolled

pytestmark = pytest.mark.filterwarnings(
    "error",
    "ignore:.*torch.jit.script",
    "ignore:The epoch parameter in `scheduler.step",  # which SequentialLR gives itself, in older versions of torch
    "ignore:Converting a tensor with requires_grad=True to a scalar",  # by ReduceLROnPlateau, likewise
)

STEPS = 12
CHEAP = Implicit(Neumann(terms=2, step_size=0.1), curvature=Exact())
METRICS = [3.0, 2.0, 2.5, 2.6, 2.7, 2.8, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1]

INNERS: dict[str, Row] = {
    "SGD": Row(optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "AdamW, two groups": Row(optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}, groups=two_groups),
    "tensor lr": Row(optim.SGD, {"lr": torch.tensor(0.05), "momentum": 0.9, "foreach": False}),
}


def rates(optimizer: Any) -> list[float]:
    return [0.1 * (i + 1) for i, _ in enumerate(optimizer.param_groups)]


def sequential(o: Any) -> Any:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, total_iters=4), lrs.CosineAnnealingLR(o, 6)], milestones=[4])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda t, i=i: 1 / (1 + i + t) for i, _ in enumerate(o.param_groups)]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda t: 1 - 0.5 / t),
    "StepLR": lambda o: lrs.StepLR(o, step_size=3, gamma=0.5),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 3, 3, 7], gamma=0.5),
    "ConstantLR": lambda o: lrs.ConstantLR(o, factor=0.2, total_iters=4),
    "LinearLR": lambda o: lrs.LinearLR(o, start_factor=0.1, total_iters=6),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, T_max=5, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, T_0=2, T_mult=2),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.5, 3), lrs.ExponentialLR(o, 0.9)], o),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=1, cooldown=1),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, rates(o), step_size_up=2, step_size_down=3, base_momentum=0.7),
    "CyclicLR, no momentum": lambda o: lrs.CyclicLR(o, 1e-3, 0.1, 2, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "CyclicLR, own scale": lambda o: lrs.CyclicLR(o, 1e-3, 0.1, 2, scale_fn=lambda x: 0.5**x, scale_mode="cycle"),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, rates(o), total_steps=STEPS + 1),
    "OneCycleLR, three phases": lambda o: lrs.OneCycleLR(o, 0.2, STEPS + 1, three_phase=True, anneal_strategy="linear"),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}


def tick(scheduler: Any, i: int) -> None:
    scheduler.step(METRICS[i]) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()


def options(optimizer: Any, scheduler: Any) -> list[Any]:
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return copy.deepcopy([groups, scheduler.get_last_lr()])


class Scheduled:
    """A run with a scheduler, and what both have after each step."""

    def __init__(self, scheduler: str, inner: str, every: int | None, *, wrapped: bool = True) -> None:
        self.run = Run(INNERS[inner], every=every, method=CHEAP)
        self.optimizer: Any = self.run.optimizer if wrapped else self.run.inner
        self.loss = self.run.optimizer.loss if wrapped else self.run.problem.loss
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.options: list[Any] = []
        self.weights: list[Any] = []

    def go(self, first: int, last: int) -> Scheduled:
        for i in range(first, last):
            step(self.run.row, self.optimizer, lambda i=i: self.loss(BATCHES[i % 6]))
            tick(self.scheduler, i)
            self.options.append(options(self.optimizer, self.scheduler))
            self.weights.append(copy.deepcopy(self.run.problem.model.state_dict()))
        return self


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    every = {kind for kind in (*vars(lrs).values(), SWALR) if isinstance(kind, type) and issubclass(kind, lrs.LRScheduler)}
    made = {type(make(INNERS["SGD"].build(tiny()))) for make in SCHEDULERS.values()}
    assert every - {lrs.LRScheduler, lrs._LRScheduler} == made


@cache
def bare(name: str, inner: str) -> Scheduled:
    return Scheduled(name, inner, None, wrapped=False).go(0, STEPS)


@pytest.mark.parametrize(
    ("name", "inner"),
    [(name, inner) for name in SCHEDULERS for inner in INNERS if inner != "SGD"]
    + [(name, "SGD") for name in ("LambdaLR", "CyclicLR", "OneCycleLR")],
)
def test_a_schedule_is_the_bare_optimizers_bit_for_bit(name: str, inner: str) -> None:
    plain = bare(name, inner)
    ours = Scheduled(name, inner, None).go(0, STEPS)
    assert len({str(found) for found in plain.options}) > 1
    assert same(ours.options, plain.options)
    assert same(ours.weights, plain.weights)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_hypersteps_leave_a_schedule_alone_and_a_resumed_one_goes_on_to_the_same_bits(name: str) -> None:
    plain = bare(name, "AdamW, two groups")
    whole, second = (Scheduled(name, "AdamW, two groups", every=4) for _ in range(2))
    whole.go(0, 7)
    saved = through_disk([whole.run.problem.model.state_dict(), whole.optimizer.state_dict()])
    schedule = copy.deepcopy(whole.scheduler.state_dict())
    whole.go(7, STEPS)
    assert whole.optimizer.hyper_steps == 3
    assert same(whole.options, plain.options)
    assert not same(whole.weights[-1], plain.weights[-1])

    second.go(0, 2)
    second.run.problem.model.load_state_dict(saved[0])
    second.optimizer.load_state_dict(saved[1])
    second.scheduler.load_state_dict(schedule)
    second.go(7, STEPS)
    assert same(second.options[2:], whole.options[7:])
    assert same(second.weights[2:], whole.weights[7:])
    assert same(second.optimizer.state_dict(), whole.optimizer.state_dict())


# A learning rate that is learned -------------------------------------------------------------------------------------------


def learned_rate(key: str = "lr") -> BilevelOptimizer:
    """SGD whose learning rate, or momentum, is an unconstrained hyperparameter, 0.1 at first."""
    problem = tiny(**{key: 0.1})
    inner = optim.SGD(problem.model.parameters(), **{"lr": 0.05, key: 0.1})
    outer = optim.SGD(problem.hparams.parameters(), lr=0.05)
    method = Unrolled(2)
    return BilevelOptimizer(inner, outer, problem, val_batches=[VAL], every=2, hypergradient=method, options={key: key})


def rates_taken(optimizer: BilevelOptimizer) -> list[list[float]]:
    """The learning rates of all groups in each step, which follow."""
    taken: list[list[float]] = []
    optimizer.inner.register_step_pre_hook(lambda o, *_: taken.append([group["lr"] for group in o.param_groups]))
    return taken


def train(optimizer: BilevelOptimizer, steps: int, after: Callable[[], None] = lambda: None) -> None:
    for i in range(steps):
        optimizer.zero_grad()
        optimizer.loss(BATCHES[i % 6]).backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("on_inner", [False, True])
def test_a_learned_rate_is_halved_on_a_plateau_and_goes_on_to_be_learned(on_inner: bool) -> None:
    optimizer = learned_rate()
    leaf, taken = optimizer.problem.leaves()["lr"], rates_taken(optimizer)
    scheduler = lrs.ReduceLROnPlateau(optimizer.inner if on_inner else optimizer, factor=0.5, patience=0)
    rate, share = leaf.item(), 1.0
    for metric, factor in ((1.0, 1.0), (2.0, 0.5), (0.5, 1.0)):
        train(optimizer, 2)
        assert taken[-2:] == [[pytest.approx(rate * share, rel=1e-12)]] * 2
        slope = optimizer.record.result.grads["lr"].item()
        assert slope != 0
        assert leaf.item() == pytest.approx(rate - 0.05 * slope, rel=1e-6)
        rate, share = leaf.item(), share * factor
        scheduler.step(metric)
        assert leaf.item() == rate
        assert optimizer.param_groups[0]["lr"] == 0.1 * share


def test_a_scheduled_rate_beside_a_learned_momentum() -> None:
    optimizer = learned_rate("momentum")
    scheduler = lrs.ExponentialLR(optimizer, 0.5)
    before = optimizer.problem.leaves()["momentum"].item()
    train(optimizer, 2, scheduler.step)
    assert optimizer.param_groups[0]["lr"] == 0.05 / 4
    slope = optimizer.record.result.grads["momentum"].item()
    assert slope != 0
    assert optimizer.problem.leaves()["momentum"].item() == pytest.approx(before - 0.05 * slope)


@pytest.mark.parametrize("way", ["load", "load of the inner one", "copy"])
def test_a_learned_rate_stays_learned_through_a_load_a_copy_and_an_added_group(way: str) -> None:
    optimizer = learned_rate()
    train(optimizer, 3)
    if way == "load":
        optimizer.load_state_dict(through_disk(optimizer.state_dict()))
    elif way == "load of the inner one":
        optimizer.inner.load_state_dict(through_disk(optimizer.inner.state_dict()))
    else:
        optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.5})
    expected, taken = [], rates_taken(optimizer)
    for _ in range(3):
        expected.append([optimizer.problem.leaves()["lr"].item(), 0.5])
        train(optimizer, 1)
    assert taken == expected
    assert taken[0] != taken[2]


def test_a_schedule_that_steps_first_is_warned_of_as_ever() -> None:
    scheduler = Scheduled("StepLR", "SGD", every=2).scheduler
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


# A scheduler on the outer optimizer ----------------------------------------------------------------------------------------


def outer_scheduled(by_hook: bool, method: Any = CHEAP) -> tuple[BilevelOptimizer, Any, list[Record]]:
    problem, records = tiny(), []
    inner = optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    outer = optim.SGD(problem.hparams.parameters(), lr=0.4, momentum=0.5)
    scheduler = lrs.ExponentialLR(outer, 0.5)

    def hook(record: Record) -> None:
        records.append(record)
        if by_hook and record.moved:
            scheduler.step()

    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], every=2, hypergradient=method, hooks=[hook])
    return optimizer, scheduler, records


@pytest.mark.parametrize("by_hook", [True, False])
def test_a_schedule_of_the_outer_rate_moves_the_hyperparameters_at_that_rate(by_hook: bool) -> None:
    optimizer, scheduler, records = outer_scheduled(by_hook)
    start, steps = optimizer.problem.hparams["decay"].detach().clone(), []

    def by_hand() -> None:
        steps.append(len(records))
        if not by_hook and optimizer.inner_steps % 2 == 0:
            scheduler.step()

    train(optimizer, 6, by_hand)
    assert steps == [0, 1, 1, 2, 2, 3]
    expected, buffer = start, torch.zeros(2)
    for k, record in enumerate(records):
        buffer = 0.5 * buffer + record.result.grads["decay"]
        expected = expected - 0.4 * 0.5**k * buffer
        torch.testing.assert_close(record.hyperparameters["decay"], expected)
    assert optimizer.outer.param_groups[0]["lr"] == 0.05
    assert optimizer.inner.param_groups[0]["lr"] == 0.05


def test_the_outer_rate_and_its_schedule_come_back_from_a_checkpoint() -> None:
    whole, first, second = (outer_scheduled(by_hook=True) for _ in range(3))
    train(whole[0], 6)
    train(first[0], 4)
    saved = through_disk([first[0].problem.model.state_dict(), first[0].state_dict(), first[1].state_dict()])
    second[0].problem.model.load_state_dict(saved[0])
    second[0].load_state_dict(saved[1])
    assert second[0].outer.param_groups[0]["lr"] == 0.1
    second[1].load_state_dict(saved[2])
    for i in (4, 5):
        second[0].zero_grad()
        second[0].loss(BATCHES[i]).backward()
        second[0].step()
    assert same(second[0].state_dict(), whole[0].state_dict())
    assert second[1].get_last_lr() == whole[1].get_last_lr() == [0.05]


def test_a_failed_hyperstep_does_not_move_a_schedule_that_asks_whether_it_moved() -> None:
    optimizer, scheduler, records = outer_scheduled(by_hook=True, method=Implicit(Neumann(terms=1000, step_size=1e3)))
    with pytest.warns(UserWarning, match="failed and moved nothing"):
        train(optimizer, 2)
    assert [record.moved for record in records] == [False]
    assert scheduler.get_last_lr() == [0.4]
