"""Options named by ``options``: the script's own number at the start, bit for bit, and schedulers that came before."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_retrain_options import SCHEDULES
from torch import Tensor, nn, optim
from torch.distributions import constraints
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from hoptim import BilevelOptimizer, HyperParameters, Problem, Status, Unrolled, hypergradient
from hoptim.methods.inner_step import InnerStep

DRAW = torch.Generator().manual_seed(0)
X, Y = (torch.randn(20, n, generator=DRAW, dtype=torch.float32) for n in (4, 1))
POSITIVE, UNIT = constraints.positive, constraints.unit_interval


@pytest.fixture(autouse=True)
def float32(float64: None) -> None:
    """In which exp(log x) is not x."""
    torch.set_default_dtype(torch.float32)


def make() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X) - Y).square().mean()


def train(optimizer: Any, steps: int, schedule: Any = None, compute: Any = None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (compute or optimizer.loss)(0).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()


# A start with the script's own bits ---------------------------------------------------------------------------------------

Built = tuple[dict[str, tuple[float, Any]], dict[str, Any], Callable[[nn.Module], optim.Optimizer]]

SCRIPTS: dict[str, Built] = {
    "sgd": (
        {"rate": (2.5e-4, POSITIVE), "momentum": (0.9, UNIT), "wd": (3e-3, POSITIVE)},
        {"lr": "rate", "momentum": "momentum", "weight_decay": "wd"},
        lambda m: optim.SGD(m.parameters(), lr=2.5e-4, momentum=0.9, weight_decay=3e-3),
    ),
    "adam": (
        {"rate": (2.5e-4, POSITIVE), "one": (0.9, UNIT), "two": (0.999, constraints.interval(0.5, 1.0))},
        {"lr": "rate", "betas": ("one", "two")},
        lambda m: optim.Adam(m.parameters(), lr=2.5e-4),
    ),
    "one beta": (
        {"one": (0.8, UNIT), "eps": (1e-8, POSITIVE)},
        {"betas": ("one", None), "eps": "eps"},
        lambda m: optim.AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.97)),
    ),
    "groups": (
        {"first": (7e-4, POSITIVE), "second": (1.1e-2, POSITIVE)},
        {"lr": ["first", "second"]},
        lambda m: optim.SGD([{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 1.1e-2}], lr=7e-4),
    ),
}


def scripted(name: str, every: int | None, change: float = 1.0) -> BilevelOptimizer:
    values, options, inner = SCRIPTS[name]
    model = make()
    hparams = HyperParameters(
        {key: torch.tensor(value * change) for key, (value, _) in values.items()},
        {key: kind for key, (_, kind) in values.items()},
    )
    outer = optim.SGD(hparams.parameters(), lr=0.0)
    problem = Problem(model, hparams, loss, loss)
    return BilevelOptimizer(inner(model), outer, problem, val_batches=[0], every=every, options=options)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("every", [None, 3])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_training_starts_with_the_bits_of_the_scripts_numbers(name: str, every: int | None, schedule: str) -> None:
    """Hypersteps are off, or move nothing."""
    ours, model = scripted(name, every), make()
    plain = SCRIPTS[name][2](model)
    starts = [o.start for o in ours.learned_options]
    numbers = [o.present(plain.param_groups[o.group]) for o in ours.learned_options]
    assert starts != numbers  # exp(log(2.5e-4)) is another number in float32
    assert starts == pytest.approx(numbers, rel=2e-6)
    if "momentum" in schedule and "momentum" not in SCRIPTS[name][1] and "betas" not in SCRIPTS[name][1]:
        schedule = "none"  # it has none to set
    train(ours, 9, SCHEDULES[schedule](ours))
    train(plain, 9, SCHEDULES[schedule](plain), lambda _: loss(model, None, 0))
    assert equal(weights(ours.problem.model), weights(model))
    if every is not None:
        assert ours.record is not None
        assert ours.record.status is Status.FINISHED
        assert max(abs(float(g)) for g in ours.record.result.grads.values()) > 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_replayed_step_has_the_real_steps_number_to_the_bit(name: str) -> None:
    """At the start, where it is the script's, and after a move; its slope is number/start · t'."""
    optimizer = scripted(name, None)
    leaves = optimizer.problem.leaves()
    for moved in (0.0, 0.3):
        with torch.no_grad():
            for leaf in leaves.values():
                leaf.add_(moved)
        inside = InnerStep.of(optimizer.inner, optimizer.problem.weights(), leaves, learned=optimizer.learned_options)
        taken: list[Any] = []
        handle = optimizer.inner.register_step_pre_hook(lambda o, *_, t=taken: t.append([dict(g) for g in o.param_groups]))
        train(optimizer, 1)
        handle.remove()
        script = SCRIPTS[name][2](make()).param_groups
        for option in optimizer.learned_options:
            real, bound = option.present(taken[0][option.group]), option.present(inside.groups[option.group].options)
            replayed = bound.value(leaves)
            assert float(replayed.detach()) == real
            assert (real == option.present(script[option.group])) is (moved == 0.0)
            (slope,) = torch.autograd.grad(replayed, leaves[option.name])
            (natural,) = torch.autograd.grad(option.transform(leaves[option.name]), leaves[option.name])
            number = option.present(optimizer.param_groups[option.group])
            assert float(slope) == pytest.approx(float(natural) * number / option.start, rel=1e-6)


def test_a_hyperparameter_that_starts_elsewhere_is_what_is_trained_with() -> None:
    for change in (1.01, 0.999, 1.00001):
        optimizer = scripted("groups", None, change)
        for option in optimizer.learned_options:
            assert optimizer.param_groups[option.group]["lr"] == option.start
            assert option.start == float(optimizer.problem.hparams[option.name].detach())


@pytest.mark.parametrize("kind", [constraints.nonnegative, constraints.interval(-0.5, 0.5)], ids=repr)
def test_an_option_that_starts_at_0_is_the_hyperparameter_itself_and_has_no_schedule(kind: Any) -> None:
    model, hparams, bare = make(), HyperParameters({"m": torch.tensor(0.0)}, {"m": kind}), make()
    problem, inner = Problem(model, hparams, loss, loss), optim.SGD(model.parameters(), lr=0.1)
    outer, plain = optim.SGD(hparams.parameters(), lr=0.0), optim.SGD(bare.parameters(), lr=0.1)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[0], every=3, options={"momentum": "m"})
    for value in (0.0, 0.25, 0.4):
        hparams["m"] = torch.tensor(value)
        plain.param_groups[0]["momentum"] = float(hparams["m"].detach())
        train(optimizer, 3)
        train(plain, 3, compute=lambda _: loss(bare, None, 0))
        assert equal(weights(model), weights(bare))
        assert optimizer.record is not None
        assert optimizer.record.result.grads["m"] != 0
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match=r"hyperparameter 'm' is the momentum and started at 0, .*: start elsewhere"):
        train(optimizer, 1)
    rate = HyperParameters({"rate": torch.tensor(0.0)}, {"rate": constraints.nonnegative})
    problem, inner = Problem(model, rate, loss, loss), optim.SGD(model.parameters(), lr=0.1)
    outer = optim.SGD(rate.parameters(), lr=0.1)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[0], every=None, options={"lr": "rate"})
    lrs.StepLR(optimizer, 2)
    with pytest.raises(ValueError, match=r"'rate' is the lr and started at 0, of which a schedule makes no share"):
        train(optimizer, 1)


def test_a_resumed_run_keeps_the_scripts_number() -> None:
    whole, first, second = (scripted("adam", 3) for _ in range(3))
    for one in (whole, first):
        one.outer.param_groups[0]["lr"] = 0.1
    train(whole, 10)
    train(first, 4)
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(second, 6)
    assert equal(weights(whole.problem.model), weights(second.problem.model))
    assert equal([*whole.problem.leaves().values()], [*second.problem.leaves().values()])


# Schedulers that were built before, or on the inner optimizer -------------------------------------------------------------

EVERY: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "StepLR": lambda o: lrs.StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.8),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, total_iters=4),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 8),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 1e-3, 0.1, 3, cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.1, 10, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
PLATEAU = {"ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0)}


def scheduled(
    build: Callable[[Any], Any], when: str, kind: Any, lr: Callable[[Any], Any], options: Any, every: int | None = 2
) -> None:
    """Train beside a plain optimizer whose rate is 0.05: right by value, or an error."""
    model, hparams = make(), HyperParameters({"rate": torch.tensor(0.05)}, {"rate": kind} if kind else {})
    inner = optim.SGD(model.parameters(), lr=lr(hparams), foreach=False)
    bare = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05)
    schedulers = [build(inner)] if when == "before" else []
    outer, problem = optim.SGD(hparams.parameters(), lr=0.0), Problem(model, hparams, loss, loss)
    method = None if every is None else Unrolled(2)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[0], every=every, hypergradient=method, options=options)
    schedulers += [build(inner)] if when == "after" else []
    schedulers.append(build(bare))
    taken: list[float] = []
    inner.register_step_pre_hook(lambda o, *_: taken.append(float(o.param_groups[0]["lr"])))
    for _ in range(6):
        expected = bare.param_groups[0]["lr"]
        train(optimizer, 1)
        bare.step()
        assert taken[-1] == pytest.approx(expected, rel=1e-6)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


NAMED: Any = {"lr": "rate"}


@pytest.mark.parametrize("kind", [POSITIVE, None], ids=["positive", "leaf"])
@pytest.mark.parametrize("name", EVERY)
def test_a_scheduler_that_came_before_the_name_is_refused_with_the_remedy(name: str, kind: Any) -> None:
    words = (
        r"options gives lr 'rate', and a scheduler was built on this SGD before: .* after the BilevelOptimizer, and on that"
    )
    with pytest.raises(ValueError, match=words):
        scheduled(EVERY[name], "before", kind, lambda h: 0.1, NAMED)


@pytest.mark.parametrize("kind", [POSITIVE, constraints.nonnegative, None], ids=["positive", "nonnegative", "leaf"])
@pytest.mark.parametrize("name", EVERY | PLATEAU)
def test_a_scheduler_built_on_the_inner_optimizer_afterwards_is_right(name: str, kind: Any) -> None:
    for every in (2, None):
        scheduled((EVERY | PLATEAU)[name], "after", kind, lambda h: 0.1, NAMED, every=every)


def test_a_plateau_that_came_before_the_name_is_right() -> None:
    scheduled(PLATEAU["ReduceLROnPlateau"], "before", POSITIVE, lambda h: 0.1, NAMED)


@pytest.mark.parametrize("kind", [UNIT, None], ids=["unit", "leaf"])
@pytest.mark.parametrize("key", ["momentum", "betas"])
def test_a_momentum_that_a_scheduler_sets_is_refused_too(key: str, kind: Any) -> None:
    model, hparams = make(), HyperParameters({"m": torch.tensor(0.6)}, {"m": kind} if kind else {})
    inner = optim.SGD(model.parameters(), 0.1, momentum=0.9) if key == "momentum" else optim.Adam(model.parameters())
    lrs.OneCycleLR(inner, 0.1, 10)
    problem, outer = Problem(model, hparams, loss, loss), optim.SGD(hparams.parameters(), lr=0.1)
    options = {key: "m" if key == "momentum" else ("m", None)}
    with pytest.raises(ValueError, match=f"options gives {key} 'm', and a scheduler was built on this"):
        BilevelOptimizer(inner, outer, problem, val_batches=[0], options=options)


def test_what_no_scheduler_sets_may_be_named_beside_one() -> None:
    """A learned weight decay and second beta, with a scheduler of the rate and of the first beta that was built before."""
    model = make()
    values, kinds = {"wd": torch.tensor(0.05), "two": torch.tensor(0.9)}, {"wd": POSITIVE, "two": UNIT}
    hparams, bare = HyperParameters(values, kinds), make()
    inner, plain = (optim.Adam(m.parameters(), betas=(0.9, 0.9), weight_decay=0.05) for m in (model, bare))
    schedulers = [lrs.OneCycleLR(one, 0.1, 10) for one in (inner, plain)]
    problem, outer = Problem(model, hparams, loss, loss), optim.SGD(hparams.parameters(), lr=0.1)
    options = {"weight_decay": "wd", "betas": (None, "two")}
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[0], every=None, options=options)
    train(optimizer, 6, schedulers[0])
    train(plain, 6, schedulers[1], lambda _: loss(bare, None, 0))
    assert equal(weights(model), weights(bare))


@pytest.mark.parametrize(
    ("key", "option", "named"),
    [
        ("lr", lambda h: h["rate"], "{'lr': 'rate'}"),
        ("lr", lambda h: h.rate, "{'lr': 'rate'}"),
        ("weight_decay", lambda h: 2 * h["rate"], "{'weight_decay': 'rate'}"),
        ("betas", lambda h: (0.9, h["rate"]), r"{'betas': ('beta', None)}"),
    ],
)
@pytest.mark.parametrize("way", ["wrapper", "one hypergradient", "added group"])
def test_an_option_that_is_a_tensor_with_a_graph_is_refused_with_the_remedy(
    key: str, option: Any, named: str, way: str
) -> None:
    model, hparams = make(), HyperParameters({"rate": torch.tensor(0.5)}, {"rate": POSITIVE})
    problem, inner = Problem(model, hparams, loss, loss), optim.Adam(model.parameters(), lr=0.02)
    inner.param_groups[0]["lr"] = torch.tensor(0.02)  # without a graph it is a number like any other
    optimizer = BilevelOptimizer(inner, hparams.optimizer(), problem, val_batches=[0], every=None, options={"eps": "rate"})
    given = {key: option(hparams)}
    if way != "added group":
        inner.param_groups[0].update(given)
    ways: dict[str, Callable[[], Any]] = {
        "wrapper": lambda: BilevelOptimizer(inner, hparams.optimizer(), problem, val_batches=[0]),
        "one hypergradient": lambda: hypergradient(problem, 0, 0, inner=inner),
        "added group": lambda: optimizer.add_param_group({"params": nn.Linear(1, 1).parameters(), **given}),
    }
    with pytest.raises(ValueError, match=f"the {key} of Adam has a tensor .* options={re.escape(named)}"):
        ways[way]()
    assert len(inner.param_groups) == 1
