"""What shows in the first second: the dry run at the first loss, and what is easily done wrong in a loop."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import hoptim
from hoptim import BilevelOptimizer, HyperParameters, Problem

X = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3
BATCH = (X, Y)


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + hparams["decay"] * model[0].weight.square().sum()


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.eval()(batch[0]), batch[1])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))


def build(
    train: Any = train_loss,
    val: Any = val_loss,
    values: Any = None,
    val_batches: Any = None,
    kinds: Any = None,
    rate: float = 0.01,
    **options: Any,
) -> BilevelOptimizer:
    torch.manual_seed(0)
    model = network()
    hparams = HyperParameters(values or {"decay": torch.tensor(0.1)}, kinds)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = torch.optim.Adam(hparams.parameters(), lr=rate)
    options = {"every": 50, "warmup": 100, **options}
    problem = Problem(model, hparams, train, val)
    return BilevelOptimizer(inner, outer, problem, val_batches=[BATCH] if val_batches is None else val_batches, **options)


def no_grad_val(model: Any, hparams: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return val_loss(model, hparams, batch)


def smoothed(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=hparams["decay"])


def unused(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Once(torch.autograd.Function):
    """x², whose derivative has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


def once_only(model: Any, hparams: Any, batch: Any) -> Tensor:
    return train_loss(model, hparams, batch) + Once.apply(model[0].weight).sum()


FAULTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "val_loss under no_grad": ({"val": no_grad_val}, ValueError, "val_loss returned a loss without a gradient"),
    "a hyperparameter that is not used": ({"train": unused}, ValueError, r"\['decay'\] are touched by neither loss"),
    "a tensor where torch wants a number": ({"train": smoothed}, (TypeError, RuntimeError), "label_smoothing|grad"),
    "another dtype": ({"val_batches": [(X.float(), Y)]}, RuntimeError, "dtype"),
    "another device": ({"val_batches": [(X.to("meta"), Y)]}, (RuntimeError, NotImplementedError), "meta|device"),
    "another shape": ({"val_batches": [(X[:, :2], Y)]}, RuntimeError, "shape"),
    "weights of validation losses": (
        {"val": lambda m, h, b: torch.stack([val_loss(m, h, b)] * 2), "val_weights": [1.0]},
        ValueError,
        "1 val_weights for 2",
    ),
    "no second derivative": ({"train": once_only}, TypeError, "FiniteDifference"),
}


def test_check_by_hand_looks_at_the_batches_it_is_given() -> None:
    optimizer = build(every=None)
    optimizer.check(BATCH)
    with pytest.raises(RuntimeError, match="shape"):
        optimizer.check(BATCH, (X[:, :2], Y))
    assert optimizer.hyper_steps == 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_at_the_first_loss_and_not_after_the_warm_up(name: str) -> None:
    options, error, words = FAULTS[name]
    with pytest.raises(error, match=words) as caught:
        build(**options).loss(BATCH)
    assert "in the dry run" in "".join(getattr(caught.value, "__notes__", []))


class Augmented(Dataset[Any]):
    """Examples with noise from two random generators."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index] + torch.rand(3) + random.random(), Y[index]


@pytest.mark.parametrize("method", [hoptim.Implicit(), hoptim.Implicit(hoptim.Nystrom(rank=3)), hoptim.Unrolled(5)])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_dry_run_leaves_no_trace(method: Any, drawn: bool) -> None:
    """Bits, buffers, gradients, modes and random streams of a run without any hyperstep."""
    loader = DataLoader(Augmented(), 4, shuffle=True)

    def run(**options: Any) -> list[Tensor]:
        random.seed(0)
        train_batches = loader if drawn else None
        optimizer = build(hypergradient=method, val_batches=loader, train_batches=train_batches, **options)
        model, losses = optimizer.problem.model, []
        for _ in range(3):
            optimizer.zero_grad()
            loss = optimizer.loss(BATCH)
            assert all(p.grad is None for p in (*model.parameters(), *optimizer.problem.hparams.parameters()))
            assert model.training
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        numbers = [torch.rand(1), torch.tensor(random.random())]
        return [*losses, *(t.detach() for t in (*model.parameters(), *model.buffers())), *numbers]

    for a, b in zip(run(), run(every=None), strict=True):
        assert torch.equal(a, b)


def test_what_the_dry_run_draws_is_drawn_again() -> None:
    """The first hyperstep gets the first validation batch, though the dry run has had it too."""
    seen: list[float] = []

    def val(model: Any, hparams: Any, batch: Any) -> Tensor:
        seen.append(float(batch[2]))
        return val_loss(model, hparams, batch)

    optimizer = build(val=val, val_batches=[(X, Y, number) for number in range(3)], every=1, warmup=0)
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.loss(BATCH).backward()
        optimizer.step()
    assert seen == [0, 0, 1, 2, 0]


def test_a_nan_is_told_and_the_training_goes_on() -> None:
    def train(model: Any, hparams: Any, batch: Any) -> Tensor:
        return train_loss(model, hparams, batch) + hparams["decay"] * model[3].bias.mul(0).norm()

    optimizer = build(train)
    with pytest.warns(UserWarning, match="in the dry run: NON_FINITE_GRADIENT|NON_FINITE_PRODUCT"):
        optimizer.loss(BATCH)


def steps(optimizer: BilevelOptimizer, count: int, extra: Any = lambda model: 0.0, after: Any = lambda model: None) -> None:
    model = optimizer.problem.model
    for _ in range(count):
        optimizer.zero_grad()
        (optimizer.loss(BATCH) + extra(model)).backward()
        after(model)
        optimizer.step()


def told(run: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught]


def test_a_term_that_is_added_to_the_loss_is_told_once_with_figures() -> None:
    [message] = told(lambda: steps(build(), 4, extra=lambda model: 3 * model[0].weight.square().sum()))
    assert "the gradient of the first step is not that of train_loss: their cosine is 0." in message
    assert "put it into train_loss" in message


@pytest.mark.parametrize(
    "after",
    [
        lambda model: None,
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-2),
    ],
    ids=["bare", "clipped by norm", "clipped by value"],
)
def test_the_gradient_of_an_ordinary_step_is_not_told(after: Any) -> None:
    assert told(lambda: steps(build(), 3, after=after)) == []


def test_a_scaled_loss_and_accumulation_are_not_told() -> None:
    def run() -> None:
        optimizer = build()
        for _ in range(3):
            optimizer.zero_grad()
            for rows in (slice(0, 4), slice(4, 8)):
                (optimizer.loss((X[rows], Y[rows])) / 2).backward()
            optimizer.step()
        single = build()
        single.zero_grad()
        (single.loss(BATCH) * 0.25).backward()
        single.step()

    assert told(run) == []


def test_stepping_the_inner_optimizer_in_its_place_is_told() -> None:
    def run() -> None:
        optimizer = build()
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.loss(BATCH).backward()
            optimizer.inner.step()

    [message] = told(run)
    assert "the weights have moved between losses 1 and 2 without a step of the BilevelOptimizer" in message


def test_a_loop_that_never_asks_for_a_loss_is_told_at_its_second_step() -> None:
    optimizer = build()
    model, hparams = optimizer.problem.model, optimizer.problem.hparams
    train_loss(model, hparams, BATCH).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"no loss has come from optimizer\.loss\(batch\)"):
        optimizer.step()


def test_with_batches_of_their_own_hypersteps_need_no_loss() -> None:
    optimizer = build(train_batches=[BATCH], every=2, warmup=0)
    model, hparams = optimizer.problem.model, optimizer.problem.hparams
    for _ in range(4):
        optimizer.zero_grad()
        train_loss(model, {"decay": hparams["decay"].detach()}, BATCH).backward()
        optimizer.step()
    assert optimizer.hyper_steps == 2


def test_a_closure_is_an_ordinary_step() -> None:
    def run() -> None:
        optimizer = build()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = optimizer.loss(BATCH)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)

    assert told(run) == []


def test_an_outer_step_that_empties_a_hyperparameter_is_told_with_figures() -> None:
    def val(model: Any, hparams: Any, batch: Any) -> Tensor:
        return val_loss(model, hparams, batch) + 10 * hparams["decay"]

    optimizer = build(val=val, kinds={"decay": constraints.nonnegative}, rate=0.1, every=1, warmup=0)
    messages = told(lambda: steps(optimizer, 3, after=lambda model: None))
    assert optimizer.record is not None
    assert [m for m in messages if "100% of hyperparameter 'decay' to zero, from 0.1" in m] == messages[:1]
    assert len(messages) == 1


def test_a_gradient_for_hardly_any_entry_is_told_with_figures() -> None:
    def train(model: Any, hparams: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (hparams["weight"][batch[2]] * losses).mean()

    values = {"weight": torch.full((2000,), 0.5)}
    optimizer = build(train, values=values, kinds={"weight": constraints.unit_interval}, every=10, warmup=0)

    def run() -> None:
        for number in range(20):
            optimizer.zero_grad()
            optimizer.loss((X, Y, torch.arange(8) + 8 * number)).backward()
            optimizer.step()

    [message] = told(run)
    assert "a gradient for 8 of the 2,000 entries of hyperparameter 'weight'" in message
    assert "every 250 hypersteps, that is every 2,500 training steps" in message


# A loop of one's own ------------------------------------------------------------------------------------------------


def test_outer_step_does_what_a_hyperstep_does() -> None:
    def val(model: Any, hparams: Any, batch: Any) -> Tensor:
        return val_loss(model, hparams, batch) + 10 * hparams["decay"]

    options = {"val": val, "kinds": {"decay": constraints.nonnegative}, "rate": 0.06, "every": None}
    ours, by_hand = build(**options), build(**options)  # the second step ends below zero
    for _ in range(2):
        ours.hyperstep(BATCH, BATCH)
        result = hoptim.hypergradient(by_hand.problem, BATCH, BATCH)
        hoptim.outer_step(by_hand.problem, by_hand.outer, result.grads)
        leaf, other = ours.problem.hparams["decay"], by_hand.problem.hparams["decay"]
        assert torch.equal(leaf, other)
        assert leaf.grad is None
        assert other.grad is None
    assert float(leaf.detach()) == 0


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ({}, "decay"),
        ({"decay": torch.tensor(float("nan"))}, "'decay' is not finite, so that nothing was moved"),
        ({"decay": torch.ones(2)}, r"shape \(2,\).*combined"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_and_move_nothing(grads: Any, words: str) -> None:
    optimizer = build()
    with pytest.raises((KeyError, ValueError), match=words):
        hoptim.outer_step(optimizer.problem, optimizer.outer, grads)
    assert float(optimizer.problem.hparams["decay"].detach()) == pytest.approx(0.1)


# SAM: the weights are moved to w + e for a second gradient, and the step is taken from w ------------------------------


class SAM(torch.optim.SGD):
    """As in the public repositories: either two moves, or a step with a closure that computes the second gradient."""

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        length = torch.stack([p.grad.norm() for p in params]).norm()
        self.moved = [(p, p.grad * 0.05 / length) for p in params]
        for p, e in self.moved:
            p.add_(e)

    @torch.no_grad()
    def second_step(self) -> None:
        for p, e in self.moved:
            p.sub_(e)
        super().step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss


def sam(every: int = 2) -> BilevelOptimizer:
    optimizer = build(every=every, warmup=0)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    problem = optimizer.problem
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.0)
    return BilevelOptimizer(SAM(params, lr=0.1), outer, problem, val_batches=[BATCH], every=every)


def by_closure(optimizer: BilevelOptimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = optimizer.loss(BATCH)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)


def test_sam_by_two_moves_is_told_what_is_right_for_it() -> None:
    optimizer = sam()

    def run() -> None:
        optimizer.zero_grad()
        optimizer.loss(BATCH).backward()
        optimizer.inner.first_step()  # type: ignore[attr-defined]
        optimizer.zero_grad()
        optimizer.loss(BATCH).backward()

    [message] = told(run)
    assert "the weights have moved between losses 1 and 2" in message
    assert "as that of SAM does, give both losses to it as a closure, optimizer.step(closure)" in message


def test_sam_by_a_closure_is_not_told_and_its_hypergradients_are_those_of_the_loss_at_the_weights() -> None:
    optimizer = sam()
    before = [p.detach().clone() for p in optimizer.problem.model.parameters()]
    messages = told(lambda: [by_closure(optimizer) for _ in range(4)])
    assert messages == []
    assert (optimizer.inner_steps, optimizer.hyper_steps) == (4, 2)
    assert not all(map(torch.equal, before, optimizer.problem.model.parameters()))
    assert optimizer.record is not None
    expected = hoptim.hypergradient(optimizer.problem, BATCH, BATCH)
    for name, found in optimizer.record.result.grads.items():
        assert torch.equal(found, expected.grads[name])
        assert found.abs().max() > 0
