"""Replay against plain differentiation through every step, and against central differences of real trainings."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import same, snapshot
from tiny import BATCHES, VAL, tiny
from torch import Tensor, nn, optim
from torch.distributions import constraints
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from hoptim import BilevelOptimizer, HyperParameters, Problem, Replay, Status, Unrolled, hypergradient
from hoptim.methods.trajectory import Snapshot

X, Y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(40).double()[:, None] % 3
TRAIN = [torch.arange(40)[start::5] for start in range(4)]
HELD_OUT = torch.arange(4, 40, 5)


def vector(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads.values()])


def regression() -> Problem:
    """A linear model with a decay, and a learned rate for each of some equal parts of the training."""
    torch.manual_seed(0)
    values = {"decay": torch.tensor(0.1), "rate": torch.tensor([0.05, 0.02, 0.08, 0.03])}
    hparams = HyperParameters(values, dict.fromkeys(values, constraints.positive)).double()

    def train_loss(model: Any, h: Any, batch: Any) -> Tensor:
        return F.mse_loss(torch.tanh(model(X[batch])), Y[batch]) + h["decay"] * model.weight.square().sum()

    def val_loss(model: Any, h: Any, batch: Any) -> Tensor:
        return F.mse_loss(torch.tanh(model(X[batch])), Y[batch])

    return Problem(nn.Linear(3, 1, bias=False).double(), hparams, train_loss, val_loss)


def rates(steps: int) -> Callable[[Any, int], dict[str, Any]]:
    return lambda hparams, t: {"lr": hparams["rate"][4 * t // steps], "momentum": 0.5}


def plainly(problem: Problem, steps: int) -> Tensor:
    """d val_loss(w_T) / d leaves of momentum SGD written out, by one graph through all steps."""
    w, v = problem.model.weight.detach().clone(), torch.zeros(1, 3).double()
    w.requires_grad_()
    h = problem.hparams
    for t in range(steps):
        batch = TRAIN[t % 4]
        loss = F.mse_loss(torch.tanh(X[batch] @ w.T), Y[batch]) + h["decay"] * w.square().sum()
        (g,) = torch.autograd.grad(loss, w, create_graph=True)
        v = 0.5 * v + g
        w = w - h["rate"][4 * t // steps] * v
    loss = F.mse_loss(torch.tanh(X[HELD_OUT] @ w.T), Y[HELD_OUT])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(h.parameters()))])


@pytest.mark.parametrize(
    ("steps", "segments"),
    [pytest.param(1000, 8, marks=pytest.mark.slow), (240, 6), (60, 2), (30, 30), (37, 3), (1, 2)],
)
def test_it_is_the_derivative_through_all_steps(steps: int, segments: int) -> None:
    problem = regression()
    inner = optim.SGD(problem.model.parameters(), lr=1.0)
    batches = [TRAIN[t % 4] for t in range(steps)]
    found = hypergradient(problem, None, HELD_OUT, Replay(batches, segments=segments, options=rates(steps)), inner=inner)
    expected = plainly(problem, steps)
    assert found.solution.status is Status.FINISHED
    assert found.solution.products == steps
    torch.testing.assert_close(vector(found.grads), expected, rtol=1e-9, atol=1e-14)
    assert expected.abs().max() > 1e-4


def test_it_is_unrolled_over_the_same_steps() -> None:
    problem, batches = tiny(dropout=0.4), [BATCHES[t % 6] for t in range(11)]
    inner = optim.AdamW(problem.model.parameters(), lr=0.05, weight_decay=0.3)
    drawn = iter(batches)
    found = hypergradient(problem, None, VAL, Replay(batches, segments=2), inner=inner)
    expected = hypergradient(problem, BATCHES[0], VAL, Unrolled(11), inner=inner, train_batches=lambda: next(drawn))
    torch.testing.assert_close(vector(found.grads), vector(expected.grads), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.solution.residuals, expected.solution.residuals, rtol=1e-12, atol=1e-15)


def trained(problem: Problem, make: Any, start: dict[str, Tensor], steps: int, leaf: Tensor) -> float:
    """The validation loss after a real training, with a scheduler of torch, and ``leaf`` as the leaves' values."""
    model, hparams = problem.model, problem.hparams
    model.load_state_dict(start)
    with torch.no_grad():
        nn.utils.vector_to_parameters(leaf, hparams.parameters())
    inner = make(model.parameters(), lr=1.0)
    scheduler = LambdaLR(inner, lambda t: hparams["rate"][min(4 * t // steps, 3)].item())
    for t in range(steps):
        inner.zero_grad()
        problem.loss(TRAIN[t % 4]).backward()
        inner.step()
        scheduler.step()
    with torch.no_grad():
        return float(problem.val_loss(model, hparams, HELD_OUT))


@pytest.mark.parametrize("make", [optim.Adam, lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9, nesterov=True)])
def test_a_learned_schedule_has_the_derivative_of_real_trainings(make: Any) -> None:
    steps, problem = 60, regression()
    start = {name: value.clone() for name, value in problem.model.state_dict().items()}
    inner = make(problem.model.parameters(), lr=1.0)
    method = Replay([TRAIN[t % 4] for t in range(steps)], options=lambda h, t: {"lr": h["rate"][4 * t // steps]})
    found = vector(hypergradient(problem, None, HELD_OUT, method, inner=inner).grads)
    at = nn.utils.parameters_to_vector(problem.hparams.parameters()).detach()
    for number in range(len(at)):
        high, low = (trained(problem, make, start, steps, at + e * torch.eye(5)[number]) for e in (1e-5, -1e-5))
        assert found[number].item() == pytest.approx((high - low) / 2e-5, rel=1e-5)
        assert abs(found[number]) > 1e-6


@pytest.mark.parametrize(("steps", "segments"), [(243, 3), (64, 8), (128, 2)])
def test_it_takes_each_step_once_more_a_level_and_holds_few_snapshots(
    monkeypatch: pytest.MonkeyPatch, steps: int, segments: int
) -> None:
    levels = round(math.log(steps, segments))
    made: list[Any] = []
    taken: list[int] = []
    held: list[int] = []
    init = Snapshot.__init__

    def counted(self: Snapshot, **parts: Any) -> None:
        init(self, **parts)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Snapshot, "__init__", counted)

    class Counted(list[int]):
        def __getitem__(self, t: Any) -> Any:
            taken.append(t)
            held.append(sum(one() is not None for one in made))
            return TRAIN[t % 4]

    problem, method = regression(), Replay(Counted(range(steps)), segments=segments, options=rates(steps))
    hypergradient(problem, None, HELD_OUT, method, inner=optim.SGD(problem.model.parameters(), lr=1.0))
    assert len(made) > steps
    assert steps * (1 + levels * (1 - 1 / segments)) < len(taken) <= steps * (1 + levels)
    assert max(held) <= segments * levels + 3


class Noisy(Sequence[Any]):
    """Batches with noise on the targets, from torch's random numbers or from Python's."""

    def __init__(self, steps: int, draw: Callable[[], float]) -> None:
        self._steps, self._draw = steps, draw

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, t: Any) -> Any:
        x, y = BATCHES[t % 6]
        return x + self._draw(), y


def test_random_numbers_of_torch_are_the_same_each_time_a_step_is_taken() -> None:
    problem = tiny(dropout=0.4)
    inner = optim.SGD(problem.model.parameters(), lr=0.1, momentum=0.9)
    before = torch.get_rng_state()
    found = [
        hypergradient(problem, None, VAL, Replay(Noisy(20, lambda: torch.randn(()).item()), segments=k), inner=inner)
        for k in (2, 20)
    ]
    assert all(one.solution.status is Status.FINISHED for one in found)
    torch.testing.assert_close(vector(found[0].grads), vector(found[1].grads), rtol=1e-13, atol=1e-16)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("size", "status"), [(0.02, Status.REPLAY_DIFFERS), (10.0, Status.REPLAY_LOST)])
def test_a_batch_that_is_another_one_each_time_is_told(size: float, status: Status) -> None:
    problem = tiny()
    inner = optim.SGD(problem.model.parameters(), lr=0.1)
    source = random.Random(0)
    batches = Noisy(20, lambda: source.uniform(-size, size))
    found = hypergradient(problem, None, VAL, Replay(batches), inner=inner)
    assert found.solution.status is status
    assert "the distance between their ends now and before is" in found.solution.detail


def test_it_leaves_no_trace_and_moves_the_hyperparameters_from_one_start() -> None:
    """With each hyperstep the training that would come next is better, while the model stays where it is."""
    steps, problem = 40, regression()
    inner = optim.SGD(problem.model.parameters(), lr=1.0)
    outer = optim.Adam(problem.hparams.parameters(), lr=0.1)
    method = Replay([TRAIN[t % 4] for t in range(steps)], options=rates(steps))
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[HELD_OUT], hypergradient=method, every=None)
    before = snapshot(problem)
    losses = [optimizer.hyperstep().result.val_loss.item() for _ in range(10)]
    after = snapshot(problem)
    assert not same(after["tensors"].pop("hparams"), before["tensors"].pop("hparams"))
    assert same(after, before)
    assert not inner.state
    assert all(after < before for before, after in pairwise(losses))


FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "several numbers": (lambda: replayed(lambda h, t: {"lr": h["decay"]}), ValueError, "an lr of shape (2,): give a number"),
    "no batch": (lambda: Replay([]), ValueError, "batches is empty"),
    "one segment": (lambda: Replay(BATCHES, segments=1), ValueError, "segments=1: give a whole number, 2 or more"),
    "no inner optimizer": (
        lambda: hypergradient(tiny(), None, VAL, Replay(BATCHES)), ValueError, "Replay needs the inner optimizer"
    ),
    "an option that is not there": (
        lambda: replayed(lambda h, t: {"rate": 0.1}), ValueError, "SGD has no option 'rate': its options are lr, momentum"
    ),
    "an option without a derivative": (
        lambda: replayed(lambda h, t: {"dampening": h["scale"]}), TypeError, "the dampening is the dampening of SGD"
    ),
}  # fmt: skip


def replayed(options: Any) -> Any:
    problem = tiny()
    inner = optim.SGD(problem.model.parameters(), lr=0.1)
    return hypergradient(problem, None, VAL, Replay(BATCHES, options=options), inner=inner)


@pytest.mark.parametrize("name", FAULTS)
def test_what_it_cannot_do_is_named(name: str) -> None:
    call, error, words = FAULTS[name]
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


def test_its_batches_are_no_part_of_what_it_is_compared_by() -> None:
    assert Replay([torch.ones(2)], segments=3) == Replay([torch.zeros(2)] * 2, segments=3)
    assert repr(Replay(BATCHES)) == "Replay(segments=8, options=None)"
