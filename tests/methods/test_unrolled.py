"""Unrolled against central differences of taking the last inner steps again, with the real optimizers."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import flat, same, snapshot, through_disk
from tiny import (
    BATCHES,
    SIZE,
    VAL,
    g_of,
    grad,
    joined,
    leaf_vector,
    leaves_of,
    linear_val,
    slope,
    tiny,
    train,
    weights_of,
)
from torch import Tensor, nn, optim
from torch.func import hessian, jacrev
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.checkpoint import checkpoint

from hoptim import (
    BilevelOptimizer,
    Exact,
    HyperParameters,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Status,
    Unrolled,
    hypergradient,
)

INNERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.3),
    "momentum": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: optim.Adam(p, lr=0.05),
    "adamw": lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.3),
}


def optimizer_of(problem: Problem, name: str = "nesterov", method: Any = None, **options: Any) -> BilevelOptimizer:
    return BilevelOptimizer(
        INNERS[name](list(problem.model.parameters())),
        optim.SGD(problem.hparams.parameters(), lr=0.05),
        problem,
        val_batches=[VAL],
        **{"hypergradient": method or Unrolled(3), "every": 3, **options},
    )


def step(optimizer: Any, batches: list[Any]) -> None:
    """One inner step on the sum of the losses of some batches."""
    optimizer.zero_grad()
    for b in batches:
        optimizer.loss(b).backward()
    optimizer.step()


class Window:
    """The live objects as they were before some inner steps, which can be taken again with other hyperparameters."""

    def __init__(self, optimizer: BilevelOptimizer) -> None:
        self.problem, self.inner = copy.deepcopy((optimizer.problem, optimizer.inner))
        self.rng = torch.get_rng_state()
        self.steps: list[tuple[list[Any], float]] = []
        self.shares = [1.0]
        self.shift = 0.0  # added to the weights between two steps

    def again(self, l: Tensor, lr: float | None = None, wd: float | None = None) -> tuple[Problem, float]:  # noqa: E741
        """The problem after the steps, and its validation loss there."""
        problem, inner = copy.deepcopy((self.problem, self.inner))
        problem.hparams["decay"].data.copy_(l[:2])
        problem.hparams["scale"].data.copy_(l[2])
        inner.param_groups[0].update({k: v for k, v in (("lr", lr), ("weight_decay", wd)) if v is not None})
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.rng)
            for number, (batches, rate) in enumerate(self.steps):
                _shift(problem, self.shift if number else 0.0)
                inner.param_groups[0]["lr"] = rate if lr is None else lr
                inner.zero_grad()
                for share, b in zip(self.shares * len(batches), batches, strict=False):
                    (share * problem.loss(b)).backward()
                inner.step()
        return problem, problem.val_loss(problem.model, problem.hparams, VAL).item()

    def slope(self, l: Tensor, h: float = 1e-5) -> Tensor:  # noqa: E741
        ends = [[self.again(l + s * h * e)[1] for s in (1, -1)] for e in torch.eye(len(l))]
        return torch.tensor([(up - down) / (2 * h) for up, down in ends])


def _shift(problem: Problem, by: float) -> None:
    for p in problem.model.parameters():
        p.data.add_(by)


def recorded(optimizer: BilevelOptimizer, plan: list[list[Any]], keep: int, after: Callable[[], None] = lambda: None) -> Any:
    """The user's loop over the plan; a window on its last ``keep`` steps, and the hyperparameters that they had."""
    window = Window(optimizer)
    for number, batches in enumerate(plan):
        if number == len(plan) - keep:
            window, l = Window(optimizer), leaves_of(optimizer.problem)  # noqa: E741
        window.steps.append((batches, optimizer.param_groups[0]["lr"]))
        step(optimizer, batches)
        after()
    assert len(window.steps) == keep
    return window, l


# One call, no loop


@functools.cache
def minimum() -> tuple[Tensor, Tensor]:
    """A minimum of the training loss, by Newton's method made definite, and the Hessian there."""
    problem = tiny()
    w, l = weights_of(problem), leaves_of(problem)  # noqa: E741
    for _ in range(200):
        H, g = hessian(train)(w, l, BATCHES[0]), grad(train)(w, l, BATCHES[0])
        if g.norm() < 1e-14:
            break
        values, basis = torch.linalg.eigh(H)
        w = w - basis @ ((basis.T @ g) / values.abs().clamp(min=0.05))
    return w, H


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_plain_sgd_at_a_stationary_point_is_the_neumann_series(steps: int) -> None:
    problem = tiny()
    w, H = minimum()
    nn.utils.vector_to_parameters(w.clone(), problem.model.parameters())
    assert slope(problem, BATCHES[0]).norm() < 1e-13
    inner = optim.SGD(problem.model.parameters(), lr=0.3)
    series = hypergradient(problem, BATCHES[0], VAL, Implicit(Neumann(terms=steps - 1, step_size=0.3), curvature=Exact()))
    unrolled = hypergradient(problem, BATCHES[0], VAL, Unrolled(steps), inner=inner)
    for kind in ("grads", "direct", "indirect"):
        one, other = (leaf_vector(getattr(result, kind)) for result in (unrolled, series))
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    left = unrolled.solution.residuals
    assert left.shape == (steps,)
    torch.testing.assert_close(left[:-1], series.solution.residuals, rtol=1e-9, atol=1e-12)
    v = torch.linalg.matrix_power(torch.eye(SIZE) - 0.3 * H, steps) @ g_of(problem)
    torch.testing.assert_close(flat(unrolled.solution.value), v, rtol=1e-9, atol=1e-12)
    assert left[-1].item() == pytest.approx((v.norm() / g_of(problem).norm()).item())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("several", [False, True])
def test_one_call_differentiates_the_steps_that_would_come_next(several: bool, dropout: float) -> None:
    problem = tiny(dropout=dropout)
    inner = INNERS["adamw"](list(problem.model.parameters()))
    optimizer = optimizer_of(problem, "adamw", every=None)
    optimizer.inner = inner
    for b in BATCHES[:2]:
        step(optimizer, [b])
    window = Window(optimizer)
    taken = BATCHES[3:6] if several else [BATCHES[2]] * 3
    window.steps = [([b], 0.05) for b in taken]
    truth = window.slope(leaves_of(problem))
    before, state = snapshot(problem), copy.deepcopy(inner.state_dict())
    more = {"train_batches": taken} if several else {}
    found = [
        hypergradient(problem, BATCHES[2], VAL, Unrolled(3, checkpoint=checkpointed), inner=inner, **more)
        for checkpointed in (False, True)
    ]
    assert same(snapshot(problem), before)
    assert same(inner.state_dict(), state)
    torch.testing.assert_close(leaf_vector(found[1].grads), leaf_vector(found[0].grads), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(leaf_vector(found[0].grads), truth, rtol=1e-6, atol=1e-8)


# In the optimizer


@pytest.mark.parametrize("name", INNERS)
def test_it_is_the_derivative_of_the_last_steps_as_they_were_really_taken(name: str) -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, name, every=4)
    scheduler = ExponentialLR(optimizer, 0.8)
    plan = [[BATCHES[i % 6]] for i in range(8)]
    window, l = recorded(optimizer, plan, 3, scheduler.step)  # noqa: E741
    result = optimizer.record.result
    assert (optimizer.hyper_steps, result.solution.status) == (2, Status.FINISHED)
    again, loss = window.again(l)
    torch.testing.assert_close(weights_of(again), weights_of(problem), rtol=1e-13, atol=1e-15)
    assert result.val_loss.item() == pytest.approx(loss, rel=1e-12)
    direct = torch.cat([0.3 * l[:2].cos(), 0.4 * l[2:]])
    torch.testing.assert_close(leaf_vector(result.direct), direct)
    torch.testing.assert_close(leaf_vector(result.indirect), window.slope(l) - direct, rtol=1e-5, atol=1e-9)
    assert (leaf_vector(result.indirect).abs() > 1e-5).all()
    assert result.solution.products == 3


@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_checkpoints_change_no_bit(steps: int) -> None:
    found = []
    for checkpointed in (False, True):
        optimizer = optimizer_of(tiny(dropout=0.4), "adamw", Unrolled(steps, checkpoint=checkpointed), every=9)
        torch.manual_seed(1)
        for i in range(9):
            step(optimizer, [BATCHES[i % 6]])
        found.append(optimizer.record.result)
    torch.testing.assert_close(leaf_vector(found[1].grads), leaf_vector(found[0].grads), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(found[1].solution.residuals, found[0].solution.residuals, rtol=1e-14, atol=1e-15)
    assert found[0].solution.products == steps


@pytest.mark.parametrize(("steps", "calls"), [(1, 2), (4, 10), (9, 24), (10, 26)])
def test_checkpoints_are_a_root_of_the_steps_apart_and_what_lies_between_is_walked_again(steps: int, calls: int) -> None:
    """Each step is taken once forwards and once backwards; with checkpoints, all but the last of a segment once more."""
    counted: list[int] = []

    def predict(m: Any, h: Any, b: Any) -> Tensor:
        counted.append(1)
        return m(b[0])

    for checkpointed, expected in ((False, 2 * steps), (True, calls)):
        problem = tiny(predict=predict)
        inner = INNERS["sgd"](problem.model.parameters())
        counted.clear()
        hypergradient(problem, BATCHES[0], VAL, Unrolled(steps, checkpoint=checkpointed), inner=inner)
        assert len(counted) == expected


def test_gradients_of_several_losses_are_added_up() -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    plan = [[BATCHES[0], BATCHES[1]], [BATCHES[2], BATCHES[3], BATCHES[4]]]
    window, l = recorded(optimizer, plan, 2)  # noqa: E741
    result = optimizer.record.result
    assert result.solution.status is Status.FINISHED
    torch.testing.assert_close(leaf_vector(result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_scaled_losses_count_with_their_share(name: str) -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, name, Unrolled(2), every=2)
    window, l = Window(optimizer), leaves_of(problem)  # noqa: E741
    window.shares = [0.25, 2.0, 0.5]
    for batches in (BATCHES[:3], BATCHES[3:6]):
        optimizer.zero_grad()
        (0.25 * optimizer.loss(batches[0]) + 2.0 * optimizer.loss(batches[1])).backward()
        (optimizer.loss(batches[2]) / 2).backward()
        window.steps.append((batches, optimizer.param_groups[0]["lr"]))
        optimizer.step()
    result = optimizer.record.result
    assert result.solution.status is Status.FINISHED
    torch.testing.assert_close(weights_of(window.again(l)[0]), weights_of(problem), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(leaf_vector(result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


def test_result_has_the_loss_and_the_gradient_of_the_last_step() -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    for i in (0, 2):
        optimizer.zero_grad()
        loss = optimizer.loss(BATCHES[i]) + optimizer.loss(BATCHES[i + 1])
        loss.backward()
        slope = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
        optimizer.step()
    result = optimizer.record.result
    assert result.train_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert result.gradient_norm.item() == pytest.approx(slope.norm().item(), rel=1e-10)


def test_losses_whose_gradients_were_cleared_do_not_count() -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    window = Window(optimizer)
    for i in range(2):
        optimizer.loss(BATCHES[5]).backward()  # dropped by the zero_grad of the step
        with torch.no_grad():
            optimizer.loss(BATCHES[4])  # only looked at
        if i == 0:
            window.rng = torch.get_rng_state()
            l = leaves_of(problem)  # noqa: E741
        state = torch.get_rng_state()
        step(optimizer, [BATCHES[i]])
        window.steps.append(([BATCHES[i]], 0.05))
    assert optimizer.record.status is Status.FINISHED
    torch.set_rng_state(state)

    def after(l: Tensor) -> float:  # noqa: E741
        again, inner = copy.deepcopy((window.problem, window.inner))
        again.hparams["decay"].data.copy_(l[:2])
        again.hparams["scale"].data.copy_(l[2])
        torch.set_rng_state(window.rng)
        for i, start in ((0, window.rng), (1, state)):
            torch.set_rng_state(start)
            inner.zero_grad()
            again.loss(BATCHES[i]).backward()
            inner.step()
        return again.val_loss(again.model, again.hparams, VAL).item()

    slope = [(after(l + 1e-5 * e) - after(l - 1e-5 * e)) / 2e-5 for e in torch.eye(3)]
    torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), torch.tensor(slope), rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_only_looked_at_is_no_part_of_a_step() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    window, l = Window(optimizer), leaves_of(problem)  # noqa: E741
    for b in BATCHES[:2]:
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        with torch.no_grad():
            optimizer.loss(BATCHES[4])
        optimizer.step()
        window.steps.append(([b], 0.05))
    assert optimizer.record.status is Status.FINISHED
    torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


def test_gradients_cleared_between_the_loss_and_its_backward_pass() -> None:
    """loss, zero_grad, backward, step: the order of many loops."""
    problem = tiny()
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    window, l = Window(optimizer), leaves_of(problem)  # noqa: E741
    for b in BATCHES[:2]:
        loss = optimizer.loss(b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        window.steps.append(([b], 0.05))
    result = optimizer.record.result
    assert result.solution.status is Status.FINISHED
    torch.testing.assert_close(leaf_vector(result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


def test_a_closure_is_a_step_like_any_other() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=2)
    window, l = Window(optimizer), leaves_of(problem)  # noqa: E741
    for b in BATCHES[:2]:

        def closure(b: Any = b) -> Tensor:
            optimizer.zero_grad()
            loss = optimizer.loss(b)
            loss.backward()
            return loss

        optimizer.step(closure)
        window.steps.append(([b], 0.05))
    assert optimizer.record.status is Status.FINISHED
    torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("checkpointed", "calls"), [(False, 9), (True, 15)])
def test_steps_that_were_taken_are_taken_once_more_and_those_between_copies_twice(checkpointed: bool, calls: int) -> None:
    counted: list[bool] = []

    def predict(m: Any, h: Any, b: Any) -> Tensor:
        counted.append(optimizer.inner_steps == 9)
        return m(b[0])

    problem = tiny(predict=predict)
    optimizer = optimizer_of(problem, "adam", Unrolled(9, checkpoint=checkpointed), every=9)
    recorded(optimizer, [[b] for b in (*BATCHES, *BATCHES[:3])], 9)
    assert optimizer.record.status is Status.FINISHED
    assert sum(counted) == calls


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_each_step_is_differentiated_where_it_was_taken(name: str) -> None:
    """Weights that something else moves between two steps are told, and the derivative is still that of the steps."""
    optimizer = optimizer_of(tiny(), name)
    window, l = recorded(optimizer, [[b] for b in BATCHES[:3]], 3, lambda: _shift(optimizer.problem, 0.01))  # noqa: E741
    window.shift = 0.01
    assert optimizer.record.status is Status.REPLAY_DIFFERS
    torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), window.slope(l), rtol=1e-6, atol=1e-8)


def test_one_step_of_many_that_was_another_is_told() -> None:
    optimizer = optimizer_of(tiny(), "momentum", Unrolled(9), every=9)
    for number in range(9):
        optimizer.zero_grad()
        optimizer.loss(BATCHES[number % 6]).backward()
        if number == 2:
            nn.utils.clip_grad_norm_(optimizer.problem.model.parameters(), 1e-9)
        optimizer.step()
    assert optimizer.record.status is Status.REPLAY_DIFFERS
    assert optimizer.record.moved


@pytest.mark.parametrize(("kind", "status"), [("noise", Status.REPLAY_DIFFERS), ("drift", Status.REPLAY_LOST)])
def test_what_cancels_out_over_the_steps_counts_less_than_what_adds_up(kind: str, status: Status) -> None:
    """Between the steps the weights are moved by twice as much: to and fro, or always the same way."""
    problem = tiny()
    inner, outer = optim.SGD(problem.model.parameters(), lr=1e-3), optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], hypergradient=Unrolled(9), every=9)
    optimizer.zero_grad()
    optimizer.loss(BATCHES[0]).backward()
    moves = [2e-3 * p.grad for p in problem.model.parameters() if p.grad is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(9):
            step(optimizer, [BATCHES[0]])
            for p, move in zip(problem.model.parameters(), moves, strict=True):
                p.data.add_(-move if kind == "drift" or number % 2 else move)
    assert optimizer.record.status is status


def test_steps_as_small_as_rounding_are_no_other_steps() -> None:
    """A fused step rounds once, and one that is taken tensor by tensor after each operation."""
    model = nn.Sequential(nn.Linear(50, 64), nn.Tanh(), nn.Linear(64, 5)).bfloat16()
    x, y = torch.randn(40, 50).bfloat16(), torch.arange(40) % 5

    def loss(m: Any, h: Any, _: Any) -> Tensor:
        return F.cross_entropy(m(x), y) + h["decay"] * sum(p.float().square().sum() for p in m.parameters())

    problem = Problem(model, HyperParameters({"decay": torch.tensor(0.01)}), loss, loss)
    inner = optim.SGD(model.parameters(), lr=0.01, fused=True)
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[None], hypergradient=Unrolled(6), every=6)
    for _ in range(6):
        step(optimizer, [None])
    assert optimizer.record.status is Status.FINISHED


@pytest.mark.parametrize("what", ["clipping", "weights moved by hand"])
def test_what_the_replay_cannot_see_is_a_remark(what: str) -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, "nesterov")
    for b in BATCHES[:3]:
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        if what == "clipping":
            length = nn.utils.get_total_norm([p.grad for p in problem.model.parameters()])
            nn.utils.clip_grad_norm_(problem.model.parameters(), 0.8 * length.item())
        if what == "weights moved by hand":
            problem.model[0].weight.data.mul_(0.9)
        optimizer.step()
    assert optimizer.record.status is Status.REPLAY_DIFFERS
    assert optimizer.record.moved
    assert "the distance between their ends now and before is" in optimizer.record.result.solution.detail


def test_steps_that_were_never_seen_are_not_silently_others() -> None:
    """The loss was computed past the optimizer: there is nothing to unroll, and the answer is no quiet look ahead."""
    problem = tiny()
    optimizer = optimizer_of(problem, "adamw", train_batches=BATCHES)
    for b, loss in zip(BATCHES[:2], (optimizer.loss, problem.loss), strict=True):  # the first steps are looked at
        optimizer.zero_grad()
        loss(b).backward()
        optimizer.step()
    optimizer.zero_grad()
    problem.loss(BATCHES[2]).backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            optimizer.step()
        except (ValueError, RuntimeError):
            return
    assert said or optimizer.record.status is not Status.FINISHED


def test_sensitive_training_is_a_remark() -> None:
    problem = tiny()
    inner = optim.SGD(problem.model.parameters(), lr=12.0)
    for seed in range(20):
        torch.manual_seed(seed)
        nn.utils.vector_to_parameters(0.3 * torch.randn(SIZE), problem.model.parameters())
        result = hypergradient(problem, BATCHES[0], VAL, Unrolled(1), inner=inner)
        grown = result.solution.residuals[-1].item()
        assert result.solution.status is (Status.SENSITIVE if grown > 10 else Status.FINISHED)
    inner.param_groups[0]["lr"] = 1000.0
    assert hypergradient(problem, BATCHES[0], VAL, Unrolled(1), inner=inner).solution.status is Status.SENSITIVE


# Learning rate and decay


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_learning_rate_and_decay_are_differentiated_through_all_steps(name: str) -> None:
    problem = tiny(lr=0.07, wd=0.2)
    inner = INNERS[name](list(problem.model.parameters()))
    outer, options = optim.SGD(problem.hparams.parameters(), lr=0.0), {"lr": "lr", "weight_decay": "wd"}
    method = Unrolled(4)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], hypergradient=method, every=4, options=options)
    copied, plain = copy.deepcopy((problem, INNERS[name](list(problem.model.parameters()))))
    window, l = Window(optimizer), leaves_of(problem)  # noqa: E741
    window.problem, window.inner = copied, plain
    for b in BATCHES[:4]:
        step(optimizer, [b])
        window.steps.append(([b], 0.07))
    result, h = optimizer.record.result, 1e-6
    assert result.solution.status is Status.FINISHED
    lr = (window.again(l, 0.07 + h, 0.2)[1] - window.again(l, 0.07 - h, 0.2)[1]) / (2 * h)
    wd = (window.again(l, 0.07, 0.2 + h)[1] - window.again(l, 0.07, 0.2 - h)[1]) / (2 * h)
    assert result.grads["lr"].item() == pytest.approx(lr, rel=1e-6)
    assert result.grads["wd"].item() == pytest.approx(wd, rel=1e-6)
    assert abs(wd) > 1e-4


# Checkpoints of a run


@pytest.mark.parametrize("cut", [1, 2, 4, 5])
def test_a_run_that_is_resumed_within_a_window_goes_on_to_the_same_bits(cut: int) -> None:
    def fresh() -> tuple[BilevelOptimizer, Any]:
        optimizer = optimizer_of(tiny(dropout=0.4), "adamw", Unrolled(3), every=3)
        return optimizer, ExponentialLR(optimizer, 0.9)

    def go(optimizer: Any, scheduler: Any, first: int, last: int) -> None:
        for i in range(first, last):
            step(optimizer, [BATCHES[i % 6], BATCHES[(i + 1) % 6]])
            scheduler.step()

    whole, first, second = fresh(), fresh(), fresh()
    torch.manual_seed(3)
    go(*whole, 0, 6)
    torch.manual_seed(3)
    go(*first, 0, cut)
    saved = through_disk(
        [first[0].problem.model.state_dict(), first[0].state_dict(), first[1].state_dict(), torch.get_rng_state()]
    )
    torch.manual_seed(77)
    second[0].problem.model.load_state_dict(saved[0])
    second[0].load_state_dict(saved[1])
    second[1].load_state_dict(saved[2])
    torch.set_rng_state(saved[3])
    go(*second, cut, 6)
    assert second[0].record.status is Status.FINISHED
    assert same(second[0].record.result.grads, whole[0].record.result.grads)
    assert same(second[0].state_dict(), whole[0].state_dict())
    assert torch.equal(weights_of(second[0].problem), weights_of(whole[0].problem))


def test_bound_learning_rate_survives_a_checkpoint_within_a_window() -> None:
    def fresh() -> BilevelOptimizer:
        problem = tiny(lr=0.07)
        inner = optim.AdamW(problem.model.parameters(), lr=0.07, betas=(0.8, 0.9))
        outer, options = optim.SGD(problem.hparams.parameters(), lr=1e-3), {"lr": "lr"}
        return BilevelOptimizer(
            inner, outer, problem, val_batches=[VAL], hypergradient=Unrolled(2), every=2, options=options
        )

    whole, first = fresh(), fresh()
    for optimizer, last in ((whole, 2), (first, 1)):
        for b in BATCHES[:last]:
            step(optimizer, [b])
    saved = through_disk(first._progress.recent.state_dict())
    first._progress.recent.forget_steps()
    first._progress.recent.load_state_dict(saved, first.problem, first.inner)
    step(first, [BATCHES[1]])
    assert same(first.record.result.grads, whole.record.result.grads)
    assert first.record.result.grads["lr"].abs() > 1e-3


# What is kept, and what is left alone


def kept(optimizer: BilevelOptimizer) -> int:
    state = optimizer._progress.recent.state_dict()
    return 0 if state is None else len(state["steps"])


# What is kept, and what is left alone


def test_nothing_is_kept_for_other_methods_or_outside_the_window() -> None:
    optimizer = optimizer_of(tiny(), "adamw", Implicit(Identity()), every=3)
    for b in BATCHES[:5]:
        step(optimizer, [b])
        assert optimizer._progress.recent.state_dict() is None
    optimizer = optimizer_of(tiny(), "adamw", Unrolled(2), every=4, warmup=8)
    counts = []
    for i in range(12):
        step(optimizer, [BATCHES[i % 6]])
        counts.append(kept(optimizer))
    assert counts == [0] * 6 + [1, 0, 0, 0, 1, 0]
    assert optimizer.hyper_steps == 2


def test_the_run_is_not_changed_by_being_recorded() -> None:
    plain, unrolled = (
        optimizer_of(tiny(dropout=0.4), "adamw", method, every=2) for method in (Implicit(Identity()), Unrolled(2))
    )
    for optimizer in (plain, unrolled):
        optimizer.outer.param_groups[0]["lr"] = 0.0
        torch.manual_seed(5)
        for b in BATCHES[:4]:
            step(optimizer, [b])
    assert unrolled.hyper_steps == 2
    assert torch.equal(weights_of(plain.problem), weights_of(unrolled.problem))
    assert same(plain.inner.state_dict(), unrolled.inner.state_dict())


def test_hyperstep_leaves_model_optimizer_and_random_state_alone() -> None:
    problem = tiny(dropout=0.4)
    optimizer = optimizer_of(problem, "adamw", Unrolled(2), every=3)
    optimizer.outer.param_groups[0]["lr"] = 0.0
    for b in BATCHES[:2]:
        step(optimizer, [b])
    before, state = snapshot(problem), copy.deepcopy(optimizer.inner.state_dict())
    optimizer.hyperstep()
    assert kept(optimizer) == 1  # the next hyperstep's
    assert same(snapshot(problem), before)
    assert same(optimizer.inner.state_dict(), state)


def test_more_steps_than_lie_between_hypersteps_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"Unrolled\(steps=5.*5 inner steps, but hypersteps come every 4: unroll at most 4"):
        optimizer_of(tiny(), "adamw", Unrolled(5), every=4)
    optimizer_of(tiny(), "adamw", Unrolled(4), every=4)


def test_what_it_cannot_do_is_named() -> None:
    with pytest.raises(ValueError, match=r"Unrolled needs the inner optimizer.*inner=optimizer"):
        hypergradient(tiny(), BATCHES[0], VAL, Unrolled(2))
    problem = tiny()
    with pytest.raises(TypeError, match="LBFGS"):
        hypergradient(problem, BATCHES[0], VAL, Unrolled(2), inner=optim.LBFGS(problem.model.parameters()))


def test_sparse_gradients_are_an_error_that_names_the_weight() -> None:
    model, hparams = nn.Embedding(3, 2), HyperParameters({"a": torch.tensor(1.0)})

    def train(m: Any, h: Any, b: Any) -> Tensor:
        return h["a"] * nn.functional.embedding(b, m.weight, sparse=True).square().sum()

    problem = Problem(model, hparams, train, lambda m, h, b: m(b).sum())
    inner = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"\['weight'\] have sparse gradients.*sparse=False"):
        hypergradient(problem, torch.tensor([0]), torch.tensor([0]), Unrolled(2), inner=inner)


def test_weights_that_the_optimizer_does_not_hold_stay() -> None:
    problem = tiny(val=linear_val)
    inner = optim.SGD(problem.model[0].parameters(), lr=0.2)
    result = hypergradient(problem, joined(BATCHES[:2]), VAL, Unrolled(1), inner=inner)
    B = jacrev(grad(train), argnums=1)(weights_of(problem), leaves_of(problem), joined(BATCHES[:2]))
    c = torch.cat([torch.linspace(-1, 1.5, p.numel()) for p in problem.model.parameters()])
    torch.testing.assert_close(leaf_vector(result.indirect), -0.2 * B[:9].T @ c[:9], rtol=1e-11, atol=1e-13)


# Activation checkpointing inside the model


def test_checkpointed_activations_change_no_value() -> None:
    found = []
    for checkpointed in (False, True):

        def predict(m: Any, h: Any, b: Any, on: bool = checkpointed) -> Tensor:
            return checkpoint(m, b[0], use_reentrant=False) if on else m(b[0])

        optimizer = optimizer_of(tiny(dropout=0.4, predict=predict), "adamw", Unrolled(3, checkpoint=True))
        torch.manual_seed(2)
        before = torch.get_rng_state()
        for b in BATCHES[:3]:
            step(optimizer, [b, b])
        assert not torch.equal(torch.get_rng_state(), before)
        assert optimizer.record.status is Status.FINISHED
        found.append(leaf_vector(optimizer.record.result.grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("option", ["lr", "betas"])
def test_an_option_that_is_a_hyperparameter_stays_one_after_a_load(option: str) -> None:
    """Loading groups copies them: a bound option would silently become a constant."""

    def fresh() -> BilevelOptimizer:
        torch.manual_seed(0)
        hparams = nn.ParameterDict({"lr": torch.tensor(0.05), "beta": torch.tensor(0.8)})
        model = nn.Linear(2, 1)
        inner = optim.AdamW(model.parameters(), lr=0.05, betas=(0.8, 0.9))
        options = {"lr": "lr"} if option == "lr" else {"betas": ("beta", None)}

        def train(m: Any, h: Any, b: Any) -> Tensor:
            return (m(b).square() + 0 * h["lr"] * h["beta"]).mean()

        problem = Problem(model, hparams, train, lambda m, h, b: (m(b) - 1).square().mean() + 0 * h["lr"] * h["beta"])
        outer = optim.SGD(hparams.parameters(), lr=1e-3)
        val = [torch.ones(3, 2)]
        return BilevelOptimizer(inner, outer, problem, val_batches=val, hypergradient=Unrolled(2), every=3, options=options)

    def run(optimizer: BilevelOptimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.loss(torch.linspace(-1, 2, 8).reshape(4, 2)).backward()
            optimizer.step()

    whole, first, second = fresh(), fresh(), fresh()
    run(whole, 10)
    run(first, 4)
    second.load_state_dict(through_disk(first.state_dict()))
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    run(second, 6)
    name = "lr" if option == "lr" else "beta"
    assert second.record.result.grads[name] != 0
    assert same(second.record.result.grads, whole.record.result.grads)
    assert same(dict(second.problem.hparams.items()), dict(whole.problem.hparams.items()))


def test_a_hyperstep_by_hand_within_a_window_leaves_the_window_to_the_next_one() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, "sgd", Unrolled(3), every=3)
    for number, b in enumerate(BATCHES[:3]):
        step(optimizer, [b])
        if number == 1:
            record = optimizer.hyperstep()
            assert record.status is Status.REPLAY_DIFFERS
            assert "of 3 steps 2 are known" in record.result.solution.detail
    assert len(optimizer.record.result.solution.residuals) == 3


def test_a_replay_that_ends_elsewhere_altogether_has_failed() -> None:
    problem = tiny()
    optimizer = optimizer_of(problem, "sgd", Unrolled(3), every=3)
    for b in BATCHES[:3]:
        optimizer.zero_grad()
        (8 * optimizer.loss(b)).backward()
        for p in problem.model.parameters():
            p.grad /= 8  # as a GradScaler does
        optimizer.step()
    assert optimizer.record.status is Status.REPLAY_LOST
    assert not optimizer.record.moved
