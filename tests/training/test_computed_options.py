"""Options of the inner optimizer under a constraint, such as a rate on a log scale, beside a schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import same
from sklearn.datasets import load_digits
from test_optimizer import through_disk
from test_schedulers import SCHEDULERS
from test_schedulers import tick as ticked
from tiny import BATCHES, VAL, tiny
from torch import Tensor, nn, optim
from torch.distributions import constraints
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs

from hoptim import BilevelOptimizer, HyperParameters, Identity, Implicit, Problem, Status, Unrolled, Update, hypergradient

pytestmark = pytest.mark.filterwarnings(
    "error", "ignore:.*torch.jit.script", "ignore:The epoch parameter in `scheduler.step"
)

POSITIVE, UNIT = constraints.positive, constraints.unit_interval
Option = Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A class of optimizers, its hyperparameters, and its options made of their values."""

    kind: Any
    learned: dict[str, tuple[float, Any]]
    options: Option


ROWS = {
    "sgd": Row(
        optim.SGD,
        {"lr": (0.1, POSITIVE), "momentum": (0.6, UNIT), "wd": (0.05, POSITIVE)},
        lambda h: {"lr": h["lr"], "momentum": h["momentum"], "weight_decay": h["wd"]},
    ),
    "adam": Row(
        optim.Adam,
        {"lr": (0.02, POSITIVE), "one": (0.8, UNIT), "two": (0.95, UNIT), "wd": (0.05, POSITIVE)},
        lambda h: {"lr": h["lr"], "betas": (h["one"], h["two"]), "weight_decay": h["wd"], "foreach": False},
    ),
    "adamw": Row(
        optim.AdamW,
        {"lr": (0.02, POSITIVE), "one": (0.8, constraints.interval(0.5, 0.99))},
        lambda h: {"lr": h["lr"], "betas": (h["one"], torch.tensor(0.95)), "weight_decay": 0.1, "foreach": False},
    ),
}


def floats(options: dict[str, Any]) -> dict[str, Any]:
    def plain(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(plain(member) for member in x)
        return float(x.detach()) if isinstance(x, Tensor) else x

    return {key: plain(value) for key, value in options.items()}


class Names:
    """In place of hyperparameters: each has its name for its value."""

    def __getitem__(self, name: str) -> Any:
        return name

    __getattr__ = __getitem__


def named(row: Row) -> dict[str, Any]:
    """What ``options`` says of a row."""
    found = {
        key: tuple(x if isinstance(x, str) else None for x in value) if isinstance(value, tuple) else value
        for key, value in row.options(Names()).items()
    }
    return {key: value for key, value in found.items() if isinstance(value, (str, tuple))}


def val_loss(m: Any, h: Any, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])


def build(
    row: Row, *, every: int | None = 3, method: Any = None, outer: float = 0.1, shift: float = 1.0, **more: Any
) -> BilevelOptimizer:
    """A small net, without any penalty, and an inner optimizer whose options are values of ``HyperParameters``."""
    model = tiny().model
    values = {name: torch.tensor(value * shift) for name, (value, _) in row.learned.items()}
    hparams = HyperParameters(values, {name: constraint for name, (_, constraint) in row.learned.items()})
    problem = Problem(model, hparams, val_loss, val_loss)
    inner = row.kind(model.parameters(), **floats(row.options(hparams)))
    rate, more = optim.SGD(hparams.parameters(), lr=outer), {"options": named(row), **more}
    return BilevelOptimizer(inner, rate, problem, val_batches=[VAL], every=every, hypergradient=method, **more)


def train(optimizer: Any, first: int, last: int, after: Callable[[int], None] = lambda i: None, loss: Any = None) -> None:
    for i in range(first, last):
        optimizer.zero_grad()
        (loss or optimizer.loss)(BATCHES[i % 6]).backward()
        optimizer.step()
        after(i)


def shape(i: int) -> float:
    return 1 / (1 + 0.3 * i)


def retrained(row: Row, start: tuple[Any, Any], hparams: HyperParameters, first: int, scheduled: bool) -> Tensor:
    """L_V after three real steps of a plain optimizer with plain numbers, from the same weights and state."""
    model, state = copy.deepcopy(start)
    options = floats(row.options(hparams))
    inner = row.kind(model.parameters(), **options)
    inner.load_state_dict({**state, "param_groups": inner.state_dict()["param_groups"]})
    for i in range(first, first + 3):
        inner.param_groups[0]["lr"] = options["lr"] * (shape(i) if scheduled else 1.0)
        inner.zero_grad()
        val_loss(model, None, BATCHES[i % 6]).backward()
        inner.step()
    return val_loss(model, None, VAL).detach()


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_unrolled_hypergradients_are_central_differences_of_real_retraining(name: str, scheduled: bool) -> None:
    """At the first hyperstep and at the third, when the leaves have moved and the shape has not its start value."""
    row = ROWS[name]
    optimizer = build(row, method=Unrolled(3))
    scheduler = lrs.LambdaLR(optimizer, shape) if scheduled else None
    hparams = optimizer.problem.hparams
    for first in (0, 3, 6):
        start = copy.deepcopy((optimizer.problem.model, optimizer.inner.state_dict()))
        before = copy.deepcopy(hparams)
        train(optimizer, first, first + 3, lambda i: scheduler.step() if scheduler else None)
        assert optimizer.record.status is Status.FINISHED
        for key, leaf in before.named_parameters():
            ends = []
            for sign in (1, -1):
                moved = copy.deepcopy(before)
                with torch.no_grad():
                    moved.get_parameter(key).add_(sign * 1e-5)
                ends.append(retrained(row, start, moved, first, scheduled))
            truth = float(ends[0] - ends[1]) / 2e-5
            assert optimizer.record.result.grads[key].item() == pytest.approx(truth, rel=1e-5, abs=1e-9), (key, first)
            assert hparams.get_parameter(key).item() == pytest.approx(leaf.item() - 0.1 * truth, rel=1e-4)
            assert abs(truth) > 1e-7


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_updates_hypergradient_is_a_central_difference_of_a_real_step(name: str, scheduled: bool) -> None:
    """Without products, x = g, it is −∂u/∂θᵀg: the slope of gᵀw⁺ of one real step."""
    row = ROWS[name]
    optimizer = build(row, every=None)
    scheduler = lrs.LambdaLR(optimizer, shape) if scheduled else None
    train(optimizer, 0, 2, lambda i: scheduler.step() if scheduler else None)
    with torch.no_grad():
        for leaf in optimizer.problem.hparams.parameters():
            leaf.add_(0.05)
    result = hypergradient(optimizer.problem, BATCHES[2], VAL, Implicit(Identity(), condition=Update()), inner=optimizer)
    g = torch.autograd.grad(val_loss(optimizer.problem.model, None, VAL), list(optimizer.problem.model.parameters()))
    for key in result.grads:
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(optimizer)
            with torch.no_grad():
                moved.problem.hparams.get_parameter(key).add_(sign * 1e-5)
            train(moved, 2, 3)
            ends.append(sum((a * p).sum() for a, p in zip(g, moved.problem.model.parameters(), strict=True)))
        truth = float((ends[0] - ends[1]).detach() / 2e-5)
        assert result.grads[key].item() == pytest.approx(truth, rel=1e-5, abs=1e-9)
        assert abs(truth) > 1e-6


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_schedule_a_step_is_that_of_the_present_values_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    row = ROWS[name]
    ours = build(row, every=None)
    bare = copy.deepcopy(ours.problem.model)
    plain = row.kind(bare.parameters(), **floats(row.options(ours.problem.hparams)))
    for first in (0, 3):
        train(ours, first, first + 3)
        train(plain, first, first + 3, loss=lambda b: val_loss(bare, None, b))
        assert same(ours.problem.model.state_dict(), bare.state_dict())
        ours.problem.hparams["lr"] = torch.tensor(0.07)
        plain.param_groups[0]["lr"] = float(ours.problem.hparams["lr"].detach())


@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_foreach_and_fused_steps_take_an_unconstrained_option(way: str) -> None:
    learned = {"lr": (0.02, constraints.real), "one": (0.8, constraints.real)}
    row = Row(optim.Adam, learned, lambda h: {"lr": h["lr"], "betas": (h["one"], 0.95), way: True})
    ours = build(row, every=None)
    bare = copy.deepcopy(ours.problem.model)
    plain = row.kind(bare.parameters(), lr=0.02, betas=(0.8, 0.95), **{way: True})
    for first in (0, 3):
        train(ours, first, first + 3)
        train(plain, first, first + 3, loss=lambda b: val_loss(bare, None, b))
        assert same(ours.problem.model.state_dict(), bare.state_dict())
        ours.problem.hparams["lr"], ours.problem.hparams["one"] = torch.tensor(0.25), torch.tensor(0.5)
        plain.param_groups[0].update(lr=0.25, betas=(0.5, 0.95))


@pytest.mark.parametrize(("kind", "outer"), [(POSITIVE, 1.0), (constraints.real, 0.01)], ids=repr)
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("CyclicLR", "OneCycleLR, three phases")])
def test_every_scheduler_sees_a_number_and_sets_the_shape(name: str, kind: Any, outer: float) -> None:
    """Bit for bit that of a plain optimizer; what a step takes is the number times the learned value over its start."""
    learned = {"lr": (0.05, kind)}
    row = Row(optim.SGD, learned, lambda h: {"lr": h["lr"], "momentum": 0.9})
    optimizer = build(row, every=4, outer=outer)
    (option,) = optimizer.learned_options
    assert type(option.start) is float
    assert optimizer.param_groups[0]["lr"] == optimizer.inner.defaults["lr"] == option.start
    bare = optim.SGD([nn.Parameter(torch.ones(1))], lr=option.start, momentum=0.9)
    schedulers = SCHEDULERS[name](optimizer), SCHEDULERS[name](bare)
    taken: list[float] = []
    optimizer.inner.register_step_pre_hook(lambda o, *_: taken.append(o.param_groups[0]["lr"]))
    size = []
    for i in range(12):
        size.append(float(optimizer.problem.hparams["lr"].detach()))
        number = optimizer.param_groups[0]["lr"]
        train(optimizer, i, i + 1)
        bare.step()
        assert taken[-1] == pytest.approx(number * size[-1] / option.start, rel=1e-12)
        for scheduler in schedulers:
            ticked(scheduler, i)
        assert optimizer.param_groups[0]["lr"] == bare.param_groups[0]["lr"]
    assert len(set(size)) == 3
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


@pytest.mark.parametrize(
    ("kind", "outer"), [(POSITIVE, 10.0), (constraints.nonnegative, 1.0), (constraints.real, 1.0)], ids=repr
)
def test_a_loop_may_write_the_shape_itself(kind: Any, outer: float) -> None:
    """As nanoGPT's does: a number under the key is the shape; what is learned stays the size."""
    taken: list[float] = []
    row = Row(optim.SGD, {**ROWS["sgd"].learned, "lr": (0.1, kind)}, ROWS["sgd"].options)
    optimizer = build(row, every=3, outer=outer)
    optimizer.inner.register_step_pre_hook(lambda o, *_: taken.append(o.param_groups[0]["lr"]))
    start = optimizer.param_groups[0]["lr"]
    for i in range(6):
        optimizer.param_groups[0]["lr"] = 0.02
        train(optimizer, i, i + 1)
        assert optimizer.param_groups[0]["lr"] == 0.02
    size = optimizer.problem.hparams["lr"].detach()
    assert taken[:3] == pytest.approx([0.02] * 3, rel=1e-12)
    assert taken[3] != pytest.approx(0.02, rel=1e-3)
    train(optimizer, 6, 7)
    assert taken[6] == pytest.approx(0.02 * float(size) / start, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sgd", each) for each in (None, "LambdaLR", "CosineAnnealingLR", "OneCycleLR", "ReduceLROnPlateau")]
    + [("adam", None), ("adam", "OneCycleLR"), ("adamw", "LambdaLR"), ("adamw", "OneCycleLR")],
)
@pytest.mark.parametrize("method", [Unrolled(3), Implicit(Identity(), condition=Update())], ids=["unrolled", "update"])
def test_a_resumed_run_has_the_same_bits(name: str, method: Any, scheduler: str | None) -> None:
    """Also where the second run is built with other values, and resumed in the middle of the steps that are unrolled."""

    def made(shift: float = 1.0) -> tuple[BilevelOptimizer, Any]:
        optimizer = build(ROWS[name], method=method, shift=shift)
        return optimizer, SCHEDULERS[scheduler](optimizer) if scheduler else None

    def go(run: tuple[BilevelOptimizer, Any], first: int, last: int) -> None:
        train(run[0], first, last, lambda i: ticked(run[1], i) if run[1] else None)

    whole, second = made(), made(shift=0.9)
    go(whole, 0, 7)
    saved = through_disk([whole[0].problem.model.state_dict(), whole[0].state_dict()])
    schedule = copy.deepcopy(whole[1].state_dict()) if scheduler else None
    go(whole, 7, 11)
    second[0].problem.model.load_state_dict(saved[0])
    second[0].load_state_dict(saved[1])
    if scheduler:
        second[1].load_state_dict(schedule)
    go(second, 7, 11)
    assert second[0].hyper_steps == 3
    assert same(second[0].state_dict(), whole[0].state_dict())
    assert same(second[0].problem.model.state_dict(), whole[0].problem.model.state_dict())


def test_a_refused_state_leaves_the_starts_alone() -> None:
    optimizer, other = build(ROWS["sgd"]), build(ROWS["sgd"], shift=0.5)
    before = optimizer.learned_options
    state = other.state_dict()
    state["hoptim"] = {**state["hoptim"], "val_batches": {}}
    with pytest.raises(KeyError):
        optimizer.load_state_dict(state)
    assert optimizer.learned_options == before


def test_the_number_is_back_in_its_place_after_a_step_that_raises() -> None:
    optimizer = build(ROWS["adam"], every=None)
    before = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert (type(before["lr"]), [type(beta) for beta in before["betas"]]) == (float, [float, float])
    optimizer.problem.hparams["lr"] = torch.tensor(0.5)
    seen = []

    def closure() -> None:
        seen.append(optimizer.param_groups[0]["lr"])
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(closure)
    assert seen == [pytest.approx(0.5)]
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == before


def test_a_number_that_a_hook_of_the_step_has_set_stays() -> None:
    optimizer = build(ROWS["sgd"], every=None)
    optimizer.inner.register_step_post_hook(lambda o, *_: o.param_groups[0].update(lr=0.03))
    train(optimizer, 0, 1)
    assert optimizer.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_copy_and_an_added_group_go_on_learning(is_loaded: bool) -> None:
    """A group that is added without a rate has the learned one, as it would have the default, also after a load."""
    optimizer = copy.deepcopy(build(ROWS["adam"]))
    train(optimizer, 0, 4)
    if is_loaded:
        saved, optimizer = optimizer, build(ROWS["adam"], shift=0.9)
        optimizer.problem.model.load_state_dict(saved.problem.model.state_dict())
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    taken: list[Any] = []
    optimizer.inner.register_step_pre_hook(lambda o, *_: taken.append([(g["lr"], g["betas"]) for g in o.param_groups]))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 0.5})
    hparams = optimizer.problem.hparams
    for i in range(4, 8):
        now = floats({"lr": hparams["lr"], "betas": (hparams["one"], hparams["two"])})
        train(optimizer, i, i + 1)
        for rate, betas in taken[-1][:2]:
            assert rate == pytest.approx(now["lr"], rel=1e-12)
            assert betas == pytest.approx(now["betas"], rel=1e-12)
        assert taken[-1][2][0] == 0.5
    assert len({step[0] for step in taken}) > 1


def test_one_hypergradient_names_options_too_and_the_optimizer_stays_as_it_is() -> None:
    """Its slope is a difference of real trainings, at the hyperparameter's value, whatever number the optimizer has."""
    model, hparams = tiny().model, HyperParameters({"lr": torch.tensor(0.1)}, {"lr": POSITIVE})
    problem = Problem(model, nn.ModuleDict({"options": hparams}), val_loss, val_loss)
    inner, options = optim.SGD(model.parameters(), lr=0.3), {"lr": "options.lr"}
    for _ in range(2):
        result = hypergradient(problem, BATCHES[0], VAL, inner=inner, options=options)  # Unrolled(), since a rate is learned
        assert result.solution.products == 20
        ends = []
        for sign in (1, -1):
            plain = copy.deepcopy(model)
            rate = float((hparams.lr.detach() + sign * 1e-5).exp())
            stepper = optim.SGD(plain.parameters(), lr=rate)
            train(stepper, 0, 20, loss=lambda _: val_loss(plain, None, BATCHES[0]))  # noqa: B023
            ends.append(val_loss(plain, None, VAL).item())
        assert result.grads["options.lr"].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)
        assert inner.param_groups[0]["lr"] == inner.defaults["lr"] == 0.3
        with torch.no_grad():
            hparams.lr.sub_(0.5)
    optimizer = build(ROWS["sgd"])
    for wrong, words in ((None, "inner is None"), (optimizer, "a BilevelOptimizer, which has its own")):
        with pytest.raises(ValueError, match=words):
            hypergradient(problem, BATCHES[0], VAL, inner=wrong, options=options)


# Which method ----------------------------------------------------------------------------------------------------------


def test_where_an_option_is_learned_the_default_is_to_unroll_twenty_steps_or_as_many_as_there_are() -> None:
    row = Row(optim.SGD, {"lr": (0.1, POSITIVE)}, lambda h: {"lr": h["lr"]})
    leaf = Row(optim.SGD, {"lr": (0.1, constraints.nonnegative)}, lambda h: {"lr": h.lr, "foreach": False})
    plain = Row(optim.SGD, {"lr": (0.1, POSITIVE)}, lambda h: {"lr": 0.1})
    for case, every, method in (
        (row, 100, Unrolled(20)),
        (leaf, 100, Unrolled(20)),
        (leaf, None, Unrolled(20)),
        (row, 7, Unrolled(7)),
        (plain, 7, Implicit()),
    ):
        assert build(case, every=every).hypergradient == method


def test_a_rate_that_the_method_does_not_see_is_named_with_the_remedy() -> None:
    optimizer = build(ROWS["sgd"])
    with pytest.raises(
        ValueError, match=r"'lr' is the inner optimizer's lr.*hoptim\.Unrolled\(20\).*condition=hoptim\.Update"
    ):
        hypergradient(optimizer.problem, BATCHES[0], VAL, Implicit(), inner=optimizer)


def test_an_option_without_an_effect_so_far_does_not_end_a_run_whose_method_sees_options() -> None:
    """RAdam uses no eps in its first five steps."""
    row = Row(optim.RAdam, {"lr": (0.1, POSITIVE), "eps": (1e-3, POSITIVE)}, lambda h: {"lr": h["lr"], "eps": h["eps"]})
    optimizer = build(row, method=Unrolled(3))
    train(optimizer, 0, 3)
    assert optimizer.record.result.grads["eps"] == 0
    train(optimizer, 3, 9)
    assert optimizer.record.result.grads["eps"] != 0


def test_update_on_an_untrained_net_is_told_once_with_figures_and_remedy() -> None:
    optimizer = build(ROWS["adam"], method=Implicit(condition=Update()), outer=1e-6)
    with pytest.warns(
        UserWarning, match=r"'lr' is the inner.*Update\(\).*real part -\d.*wrong sign.*Unrolled\(20\)"
    ) as caught:
        train(optimizer, 0, 9)
    assert len(caught) == 1
    assert optimizer.hyper_steps == 3
    assert optimizer.record.result.solution.negative_curvature
    with pytest.warns(UserWarning, match=r"wrong sign.*Unrolled\(20\)"):
        hypergradient(optimizer.problem, BATCHES[0], VAL, Implicit(condition=Update()), inner=optimizer)


def test_a_rate_that_starts_too_low_is_learned_up_on_digits_where_update_has_the_wrong_sign() -> None:
    """Adam at 1e-4, under a cosine: the rate rises more than tenfold, and the test loss falls to less than a half."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    x = x.float() / 16
    train_set, val, test = torch.randperm(len(x)).split([600, 200, 997])

    def loss(m: Any, h: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(x[b]), y[b])

    def run(every: int | None) -> tuple[BilevelOptimizer, float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        hparams = HyperParameters({"lr": torch.tensor(1e-4)}, {"lr": POSITIVE})
        inner = optim.Adam(model.parameters(), lr=1e-4)
        outer = optim.Adam(hparams.parameters(), lr=0.4)
        problem = Problem(model, hparams, loss, loss)
        optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[val], every=every, options={"lr": "lr"})
        scheduler = lrs.CosineAnnealingLR(optimizer, T_max=96)
        for i in range(16):
            for b in train_set[torch.randperm(600)].split(100):
                optimizer.zero_grad()
                optimizer.loss(b).backward()
                optimizer.step()
                scheduler.step()
            if i == 3:
                with pytest.warns(UserWarning, match=r"wrong sign.*Unrolled\(20\)"):
                    slopes.append(hypergradient(problem, b, val, Implicit(condition=Update()), inner=optimizer).grads["lr"])
                slopes.append(hypergradient(problem, b, val, inner=optimizer).grads["lr"])
        return optimizer, loss(model, None, test).item()

    slopes: list[Tensor] = []
    (_, without), (optimizer, learned) = run(None), run(4)
    assert slopes[0] > 0 > slopes[1]
    assert optimizer.record.hyperparameters["lr"] > 1e-3
    assert learned < without / 2


def test_each_group_has_the_rate_of_its_name_and_added_groups_have_the_common_one() -> None:
    model = tiny().model
    values = {"rate": torch.tensor(0.1), "slow": torch.tensor(0.01)}
    hparams = HyperParameters(values, dict.fromkeys(values, POSITIVE))
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 0.3}, {"params": list(model[3].parameters())}]
    inner, problem = optim.SGD(groups, lr=0.5), Problem(model, hparams, val_loss, val_loss)
    rate = optim.SGD(hparams.parameters(), lr=0.1)
    options = {"lr": ["rate", None, "slow"]}
    built = BilevelOptimizer(inner, rate, problem, val_batches=[VAL], every=3, options=options)
    assert [group["lr"] for group in built.param_groups] == [pytest.approx(0.1), 0.3, pytest.approx(0.01)]
    assert [(option.name, option.group) for option in built.learned_options] == [("rate", 0), ("slow", 2)]
    inner = optim.SGD([model[0].weight, model[0].bias, model[3].weight], lr=0.5)
    one = HyperParameters({"rate": torch.tensor(0.1)}, {"rate": POSITIVE})
    rate, problem = optim.SGD(one.parameters(), lr=0.1), Problem(model, one, val_loss, val_loss)
    with pytest.warns(match="does not hold"):
        built = BilevelOptimizer(inner, rate, problem, val_batches=[VAL], every=3, options={"lr": "rate"})
    built.add_param_group({"params": [model[3].bias]})
    train(built, 0, 3)
    assert [(option.name, option.group) for option in built.learned_options] == [("rate", 0), ("rate", 1)]
    assert built.record.moved


@pytest.mark.parametrize(
    ("options", "method", "error", "words"),
    [
        ({"rate": "lr"}, None, ValueError, "options has 'rate', and SGD has only lr, momentum"),
        ({"lr": "rate"}, None, ValueError, "lr 'rate', which is no hyperparameter that is learned: give one of ['lr'"),
        ({"lr": 0.1}, None, ValueError, "options gives lr 0.1, which is no hyperparameter that is learned"),
        ({"lr": ("lr", "wd")}, None, ValueError, "options gives lr the pair ('lr', 'wd'), and it is 0.3: give one name"),
        ({"lr": ["lr", "wd"]}, None, ValueError, "options gives lr 2 names, and there are 1 parameter groups"),
        ({"lr": "lr"}, Implicit(), ValueError, "options makes lr hyperparameters, in which Implicit("),
        ({"dampening": "lr"}, None, TypeError, "the dampening of SGD"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_bound_is_named(options: Any, method: Any, error: type[Exception], words: str) -> None:
    model, hparams = tiny().model, build(ROWS["sgd"]).problem.hparams
    inner, rate = optim.SGD(model.parameters(), lr=0.3), optim.SGD(hparams.parameters(), lr=0.1)
    problem = Problem(model, hparams, val_loss, val_loss)

    def begin() -> None:
        built = BilevelOptimizer(inner, rate, problem, val_batches=[VAL], hypergradient=method, options=options)
        built.loss(BATCHES[0])

    with pytest.raises(error) as caught:
        begin()
    assert words in str(caught.value)
