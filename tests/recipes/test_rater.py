"""Rater: its mean by the formula, what it keeps and writes, runs and retrainings with it, and what it refuses."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hoptim
from hoptim.recipes import Rater, WeightDecay

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(40, 3, generator=DRAW, dtype=torch.float64)
Y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(40, generator=DRAW, dtype=torch.float64)
LEARNED = torch.tensor([[0.7, -0.3, 0.2]], dtype=torch.float64)


def learned() -> Rater:
    """r(x) = 0.7 x₁ − 0.3 x₂ + 0.2 x₃ + 0.1."""
    rater = Rater(nn.Linear(3, 1))
    with torch.no_grad():
        rater.net.weight.copy_(LEARNED)
        rater.net.bias.fill_(0.1)
    return rater


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1), nn.Flatten(0)
    )  # fmt: skip


RATINGS = X @ LEARNED[0] + 0.1


class Parts(nn.Module):
    """Rates a dict of inputs and the loss so far, by a layer that is made last but called in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.last(self.first(torch.cat([features["x"], features["loss"][:, None]], 1)).relu())[:, 0]


def test_the_mean_and_its_slope_are_those_of_the_formula() -> None:
    rater, losses = learned(), torch.rand(40) + 0.5
    weights = 2 / (1 + (-RATINGS).exp())
    found = rater.mean(losses, X)
    assert found.item() == pytest.approx(float((weights * losses).sum() / 40), rel=1e-12)
    slopes = weights * (1 - weights / 2) * losses / 40  # in each rating
    weight, bias = torch.autograd.grad(found, [rater.net.weight, rater.net.bias])
    torch.testing.assert_close(weight[0], slopes @ X, rtol=1e-10, atol=0)
    assert bias.item() == pytest.approx(slopes.sum().item(), rel=1e-10)
    assert rater.degrees_of_freedom == 4


@pytest.mark.parametrize(
    ("make", "features"),
    [
        (lambda: nn.Linear(3, 1), X),
        (deep, X),
        (lambda: nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), X),
        (lambda: Parts(), {"x": X, "loss": Y.square()}),
    ],
)
def test_at_the_start_the_mean_is_the_plain_one_to_the_bit(make: Any, features: Any) -> None:
    net = make()
    before = copy.deepcopy(net)
    rater, losses = Rater(net), torch.rand(40)
    assert torch.equal(rater.mean(losses, features), losses.mean())
    first = next(iter(before.parameters()))
    assert isinstance(net, nn.Linear) or torch.equal(next(iter(net.parameters())), first), "only the last layer is set"


def test_frozen_parts_stay_as_they_are_and_are_not_learned() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1), nn.LayerNorm(1))
    net[2].requires_grad_(False)
    rater = Rater(net)
    assert net[2].weight.item() == 1.0
    assert not net[1].weight.any()
    assert rater.degrees_of_freedom == 26
    assert sum(p.numel() for p in rater.optimizer().param_groups[0]["params"]) == 26
    assert rater.optimizer().param_groups[0]["lr"] == 0.003


def test_a_mean_of_float32_losses_stays_float32() -> None:
    assert learned().mean(torch.rand(40).float(), X).dtype is torch.float32


def test_the_loss_so_far_is_a_feature_without_a_gradient() -> None:
    """Otherwise a model would raise the loss of an example to have a lower weight."""
    rater, w = Rater(Parts()), torch.zeros(3, requires_grad=True)
    nn.init.normal_(rater.net.last.weight)
    losses = (X @ w - Y).square()
    ratings = rater({"x": X, "loss": losses.detach()})
    weights = (2 * ratings.sigmoid()).detach()
    (found,) = torch.autograd.grad(rater.mean(losses, {"x": X, "loss": losses}), w)
    torch.testing.assert_close(found, -2 / 40 * (weights * Y) @ X, rtol=1e-10, atol=0)


def losses_of(model: Any, batch: Tensor) -> Tensor:
    return (model(X[batch])[:, 0] - Y[batch]).square()


def train_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    rater = hparams["rater"] if isinstance(hparams, nn.ModuleDict) else hparams
    penalty = hparams["decay"].penalty(model) if isinstance(hparams, nn.ModuleDict) else 0.0
    return rater.mean(losses_of(model, batch), X[batch]) + penalty


def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
    return losses_of(model, batch).mean()


def test_its_hypergradient_is_that_of_dense_algebra() -> None:
    """Of weighted least squares: dL/dr_i = −xᵀ ∂∇L_T/∂r_i with Hessian · x = ∇L_V."""
    rater, model = learned(), nn.Linear(3, 1, bias=False)
    train, val = torch.arange(25), torch.arange(25, 40)
    weights = 2 * RATINGS[train].sigmoid()
    hessian = 2 / 25 * X[train].T @ (weights[:, None] * X[train])
    w = torch.linalg.solve(hessian, 2 / 25 * X[train].T @ (weights * Y[train]))
    model.weight.data.copy_(w[None])
    solved = torch.linalg.solve(hessian, 2 / 15 * X[val].T @ (X[val] @ w - Y[val]))
    slope = weights * (1 - weights / 2) * 2 / 25 * (X[train] @ w - Y[train]) * (X[train] @ solved)
    method = hoptim.Implicit(hoptim.CG(terms=50, tolerance=1e-12), curvature=hoptim.Exact())
    problem = hoptim.Problem(model, rater, train_loss, val_loss)
    found = hoptim.hypergradient(problem, train, val, method).grads
    torch.testing.assert_close(found["net.weight"][0], -slope @ X[train], rtol=1e-8, atol=1e-12)
    assert found["net.bias"].item() == pytest.approx(-slope.sum().item(), rel=1e-8)


def test_a_hypergradient_leaves_no_trace_in_batch_norm_and_dropout() -> None:
    rater = Rater(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1)))
    nn.init.normal_(rater.net[3].weight)
    model = nn.Linear(3, 1)
    problem = hoptim.Problem(model, rater, train_loss, val_loss)
    problem.loss(torch.arange(25)).backward()
    assert rater.net[1].num_batches_tracked == 1, "a step of the training does move its statistics"
    before, generator = copy.deepcopy(rater.state_dict()), torch.get_rng_state()
    found = hoptim.hypergradient(problem, torch.arange(25), torch.arange(25, 40))
    assert sum(float(grad.norm()) for grad in found.grads.values()) > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in rater.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in rater.parameters())
    assert all(part.training for part in rater.modules())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


@pytest.mark.parametrize(
    "batches", [X.split(7), list(X.split(40)), DataLoader(Stream(), batch_size=7), (one for one in X.split(7))]
)
def test_ratings_come_in_order_from_any_stream(batches: Any) -> None:
    pieces = list(learned().rate(batches))
    torch.testing.assert_close(torch.cat(pieces), RATINGS, rtol=1e-10, atol=1e-12)
    assert not pieces[0].requires_grad


def test_a_stream_is_rated_as_it_is_read_in_eval_mode_and_without_marks_on_the_caller() -> None:
    rater = Rater(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 1)))
    rater.net[1].eval()
    nn.init.normal_(rater.net[2].weight)
    read: list[int] = []
    ratings = rater.rate(read.append(number) or X[:5] for number in range(1000))  # type: ignore[func-returns-value]
    assert read == []
    for count in (1, 2):
        found = next(ratings)
        torch.testing.assert_close(found, rater.net[2](X[:5] / (1 + 1e-5) ** 0.5)[:, 0].detach(), rtol=1e-10, atol=1e-12)
        assert len(read) == count
        assert [part.training for part in rater.net] == [True, False, True]
        assert torch.is_grad_enabled()
    assert rater.net[1].num_batches_tracked == 0


@pytest.mark.parametrize(("share", "count"), [(0.5, 20), (0.3, 12), (1.0, 40), (1, 40), (0.26, 10), (0.001, 1)])
def test_the_share_that_is_kept_is_exact_and_has_the_highest_ratings(share: float, count: int) -> None:
    for ratings in (RATINGS, RATINGS.split(7), iter(RATINGS.split(7))):
        mask = Rater.keep(ratings, share)
        assert (mask.dtype, int(mask.sum())) == (torch.bool, count)
        assert count == 40 or RATINGS[mask].min() > RATINGS[~mask].max()


def test_of_equal_ratings_the_first_are_kept() -> None:
    assert Rater.keep(torch.tensor([0.0, 1.0, 0.0, 0.0]), 0.5).tolist() == [True, True, False, False]
    assert Rater.keep(torch.zeros(5), 0.4).tolist() == [True, True, False, False, False]


def test_a_threshold_of_a_sample_keeps_about_the_share_of_a_stream_with_all_that_is_in_it() -> None:
    torch.manual_seed(1)
    rater, x = learned(), torch.randn(20_000, 3)
    threshold = rater.threshold(rater.rate(x[:2000].split(500)), 0.3)
    own = rater(x[:2000]).detach()
    assert int((own >= threshold).sum()) == 600
    assert threshold == own[own >= threshold].min().item()
    assert sum(int(mask.sum()) for _, mask in rater.filter(x[:2000].split(500), threshold)) == 600
    stream = DataLoader(TensorDataset(x[2000:], torch.arange(18_000)), batch_size=300)
    kept = [(batch[0][mask], batch[1][mask]) for batch, mask in rater.filter(stream, threshold, features=lambda one: one[0])]
    index = torch.cat([number for _, number in kept])
    assert torch.equal(torch.cat([inputs for inputs, _ in kept]), x[2000:][index])
    assert torch.equal(index, (rater(x[2000:]) >= threshold).nonzero()[:, 0])
    assert len(index) / 18_000 == pytest.approx(0.3, abs=0.03)  # three standard errors of the sample's
    (whole,) = (mask for _, mask in rater.filter([x], rater.threshold(own, 1.0)))
    assert whole.all()


VALUE_ERRORS: dict[str, Any] = {
    "net has no parameter that requires a gradient: give": lambda _: Rater(nn.ReLU()),
    "net has no parameter that requires a gradient": lambda _: Rater(nn.Linear(3, 1).requires_grad_(False)),
    "returned shape (40, 2) for features of shape (40, 3): return one": lambda _: Rater(nn.Linear(3, 2))(X),
    "losses have shape (39,) and ratings (40,): give one loss": lambda _: learned().mean(torch.ones(39), X),
    "losses have shape () and ratings (40,)": lambda _: learned().mean(torch.ones(()), X),
    "batches is empty: it gave no batch to rate": lambda _: list(learned().rate(iter([]))),
    "threshold is nan: give a number": lambda _: learned().filter([X], float("nan")),
    "share is 0.0: give the share of examples to keep, above 0": lambda _: Rater.keep(RATINGS, 0.0),
    "share is 1.5": lambda _: Rater.threshold(RATINGS, 1.5),
    "share is 50": lambda _: Rater.keep(RATINGS, 50),
    "ratings is empty: there is no example": lambda _: Rater.keep([], 0.5),
    "rating of example 3 is NaN": lambda _: Rater.keep([torch.ones(2), torch.tensor([0.0, torch.nan])], 0.5),
}
TYPE_ERRORS: dict[str, Any] = {
    "net is a builtin_function_or_method: give an nn.Module": lambda _: Rater(torch.sigmoid),  # type: ignore[arg-type]
    "net returned a tuple: return a floating-point tensor": lambda _: Rater(nn.LSTM(3, 1))(X),
    "batches is a Tensor: give several, such as a list [batch]": lambda _: learned().rate(X),
    "ratings has a piece that is a float: give a tensor of shape": lambda _: Rater.keep([0.5], 0.5),  # type: ignore[list-item]
    "ratings has a piece that is of shape (3, 1)": lambda _: Rater.keep(torch.ones(3, 1), 0.5),
}


@pytest.mark.parametrize("words", [*VALUE_ERRORS, *TYPE_ERRORS])
def test_what_it_cannot_do_is_named(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError if words in VALUE_ERRORS else TypeError, match=re.escape(words)):
        {**VALUE_ERRORS, **TYPE_ERRORS}[words](tmp_path)


def test_features_of_another_shape_are_named_with_what_the_net_takes() -> None:
    with pytest.raises(RuntimeError, match=re.escape("(40x2 and 3x1)")) as caught:
        list(learned().rate([X[:, :2]]))
    assert caught.value.__notes__ == ["hoptim: the rater's net was given features of shape (40, 2)"]
    with pytest.raises(KeyError) as caught_other:
        Rater(Parts())({"x": X, "losses": [Y, "a"]})
    assert "{'x': (40, 3), 'losses': [(40,), 'a str']}" in caught_other.value.__notes__[0]


def beside_decay(model: nn.Module) -> nn.ModuleDict:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    return nn.ModuleDict({"rater": Rater(net), "decay": WeightDecay(model, start=0.01)})


def run(steps: int, saved: dict[str, Any] | None = None) -> tuple[dict[str, Any], hoptim.Problem]:
    torch.manual_seed(5)
    model = nn.Linear(3, 1)
    hparams = beside_decay(model)
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.05), hoptim.outer_adam(hparams)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[torch.arange(30, 40)], every=4, warmup=4)
    if saved is not None:
        model.load_state_dict(saved["model"])
        hparams.load_state_dict(saved["hparams"])
        optimizer.load_state_dict(saved["optimizer"])
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.loss(torch.arange(30)).backward()
        optimizer.step()
    states = {"model": model.state_dict(), "hparams": hparams.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(states), problem


def test_a_run_beside_another_recipe_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, problem = run(40)
    torch.save(run(18)[0], tmp_path / "state.pt")
    again, _ = run(22, torch.load(tmp_path / "state.pt"))
    for part in ("model", "hparams"):
        for name, value in whole[part].items():
            torch.testing.assert_close(again[part][name], value, rtol=1e-12, atol=0)
    assert problem.hparams["rater"].net[3].weight.detach().abs().min() > 0.005
    assert problem.hparams["rater"].net[1].num_batches_tracked == 40


def test_retrain_weights_other_examples_by_what_was_learned() -> None:
    """To the end it is weighted least squares on examples that the rater has never seen."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 3), torch.randn(60)
    everything = {"x": X, "y": Y}

    def loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        x, y = everything["x"][batch], everything["y"][batch]
        return hparams.mean((model(x)[:, 0] - y).square(), x)

    rater, model = learned(), nn.Linear(3, 1, bias=False)
    problem = hoptim.Problem(model, rater, loss, val_loss)
    everything.update(x=x, y=y)

    def train(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
        for _ in range(500):
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    def make() -> nn.Module:
        return nn.Linear(3, 1, bias=False)

    new = hoptim.retrain(problem, make, train, torch.arange(60), inner=lambda m: torch.optim.SGD(m.parameters(), lr=0.2))
    weights = 2 * (x @ LEARNED[0] + 0.1).sigmoid()
    expected = torch.linalg.solve(x.T @ (weights[:, None] * x), x.T @ (weights * y))
    torch.testing.assert_close(new.weight[0].detach(), expected, rtol=1e-8, atol=1e-10)


def test_it_finds_the_feature_that_tells_wrong_labels_and_keeps_right_ones_of_another_set() -> None:
    torch.manual_seed(0)
    x, source = torch.randn(900, 4), torch.rand(900)
    y = (x[:, 0] > 0).long()
    wrong = source > 0.6
    wrong[600:700] = False
    label = torch.where(wrong, 1 - y, y)
    features = torch.cat([x, source[:, None]], 1)

    def each(model: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(x[batch]), label[batch], reduction="none")

    model, rater = nn.Linear(4, 2), Rater(nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)))
    problem = hoptim.Problem(
        model, rater, lambda m, h, b: h.mean(each(m, b), features[b]), lambda m, h, b: each(m, b).mean()
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    val = [torch.arange(600, 700)]
    optimizer = hoptim.BilevelOptimizer(inner, rater.optimizer(0.02), problem, val_batches=val, every=4, warmup=40)
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.loss(torch.randint(600, (100,))).backward()
        optimizer.step()
    kept = rater.keep(rater.rate(features[700:].split(64)), 0.5)
    assert wrong[700:].double().mean() > 0.35
    assert wrong[700:][kept].double().mean() < 0.1
