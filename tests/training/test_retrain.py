"""retrain: a plain training by hand with the same hyperparameters, to the bit."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F
from torch.optim import SGD, Adam

import hoptim
from hoptim.recipes import ExampleWeights

DRAW = torch.Generator().manual_seed(0)
N = 24
X = torch.randn(N, 4, generator=DRAW, dtype=torch.float64)
Y = torch.randint(3, (N,), generator=DRAW)
NOISY, CLEAN = torch.arange(16), torch.arange(16, N)


def make() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


def inner(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model.eval()(X[batch]), Y[batch])


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return hparams.mean(F.cross_entropy(model(X[batch]), Y[batch], reduction="none"), batch)


def train(model: nn.Module, optimizer: Any, examples: Tensor) -> None:
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    for _ in range(5):
        for batch in examples[torch.randperm(len(examples))].split(8):
            model.train()
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def learned(loss: Any = train_loss, **options: Any) -> hoptim.Problem:
    """A problem after a run in which the weights of the noisy examples were learned."""
    torch.manual_seed(1)
    model, hparams = make(), ExampleWeights(N, trusted=CLEAN).double()
    problem = hoptim.Problem(model, hparams, loss, val_loss, **options)
    optimizer = hoptim.BilevelOptimizer(
        inner(model), hparams.optimizer(0.5), problem, val_batches=[CLEAN], every=2, warmup=2
    )
    train(model, optimizer, NOISY)
    assert optimizer.hyper_steps == 5
    assert hparams["example_weight"][NOISY].std() > 0.05
    return problem


def by_hand(weight: Tensor, examples: Tensor) -> nn.Module:
    """The same training without hoptim, where a weight counts relative to the start, 0.5."""
    torch.manual_seed(2)
    model = make()
    optimizer = inner(model)
    optimizer.loss = lambda batch: (
        weight[batch] / 0.5 * F.cross_entropy(model(X[batch]), Y[batch], reduction="none")
    ).mean()
    train(model, optimizer, examples)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(name == other and torch.equal(x, y) for (name, x), (other, y) in pairs)


def with_aux(model: Any, hparams: Any, batch: Any) -> Any:
    return train_loss(model, hparams, batch), "aux"


@pytest.mark.parametrize("examples", [torch.arange(N), CLEAN, torch.tensor([3, 1, 20, 9])], ids=["all", "clean", "some"])
def test_it_is_a_plain_training_with_the_learned_weights_to_the_bit(examples: Tensor) -> None:
    problem = learned()
    weight = problem.hparams["example_weight"].detach().clone()
    leaves = {name: leaf.detach().clone() for name, leaf in problem.leaves().items()}
    trained = copy.deepcopy(problem.model)
    torch.manual_seed(2)
    model = hoptim.retrain(problem, make, train, examples, inner=inner)
    assert same(model, by_hand(weight, examples))
    assert not same(model, by_hand(torch.ones(N) / 2, examples))
    assert same(problem.model, trained)
    for name, leaf in problem.leaves().items():
        assert torch.equal(leaf, leaves[name])
        assert leaf.grad is None
        assert leaf.requires_grad


def test_a_composite_loss_and_one_with_an_aux_serve_as_in_the_run() -> None:
    def composite(model: Any, hparams: Any, batch: Any) -> Tensor:
        return hparams.mean(F.cross_entropy(model, Y[batch], reduction="none"), batch)

    parts = hoptim.CompositeLoss(lambda model, hparams, batch: model(X[batch]), composite)
    problem = learned(parts)
    torch.manual_seed(2)
    model = hoptim.retrain(problem, make, train, torch.arange(N), inner=inner)
    assert same(model, by_hand(problem.hparams["example_weight"].detach(), torch.arange(N)))

    pairs = hoptim.Problem(make(), problem.hparams, with_aux, val_loss, has_aux=True)

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        loss, aux = optimizer.loss(examples)
        assert aux == "aux"
        loss.backward()
        optimizer.step()

    hoptim.retrain(pairs, make, loop, torch.arange(N), inner=inner)


def test_it_is_the_last_training_of_cross_validated() -> None:
    def fresh() -> nn.Module:
        torch.manual_seed(4)
        return nn.Linear(4, 3)

    def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return val_loss(model, hparams, batch) + hparams["decay"] * model.weight.square().sum()

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in optimizer.resumable(range(40)):  # the marks of a loop that can be resumed do no harm
            optimizer.zero_grad()
            optimizer.loss(examples).backward()
            optimizer.step()

    hparams = hoptim.HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.positive})
    settings = {"inner": inner, "examples": N, "steps": 40, "hypersteps": 5}
    found = hoptim.CrossValidated(fresh, hparams, loss, val_loss, **settings).fit(loop)
    problem = hoptim.Problem(nn.Linear(4, 3), hparams, loss, val_loss)
    assert same(hoptim.retrain(problem, fresh, loop, torch.arange(N), inner=inner), found.model)


def test_a_learned_rate_is_in_effect() -> None:
    def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(X[batch]), Y[batch])

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        optimizer.loss(examples).backward()
        optimizer.step()

    hparams = hoptim.HyperParameters({"lr": torch.tensor(0.3)}, {"lr": constraints.positive})
    problem = hoptim.Problem(nn.Linear(4, 3), hparams, loss, val_loss)
    start = nn.Linear(4, 3)
    slope = torch.autograd.grad(loss(start, hparams, CLEAN), start.weight)[0]
    named = {"inner": lambda model: SGD(model.parameters(), lr=9.0), "options": {"lr": "lr"}}
    ended = hoptim.retrain(problem, lambda: copy.deepcopy(start), loop, CLEAN, **named)
    torch.testing.assert_close(ended.weight, start.weight - 0.3 * slope, rtol=1e-7, atol=1e-9)


def test_the_models_that_are_no_new_ones_are_named() -> None:
    problem = learned()
    model = problem.model

    def sharing() -> nn.Module:
        new = make()
        new[0].weight = model[0].weight
        return new

    def sharing_buffer() -> nn.Module:
        new = make()
        new[1].running_mean = model[1].running_mean
        return new

    for given, error, words in (
        (lambda: model, ValueError, "'0.weight' of the model that make returned is '0.weight' of the trained one"),
        (sharing, ValueError, "'0.weight' of the model that make returned is '0.weight' of the trained one"),
        (sharing_buffer, ValueError, "'1.running_mean' of the model"),
        (lambda: copy.deepcopy(model), ValueError, "a copy of the trained model"),
        (lambda: None, TypeError, "model is a NoneType: give an nn.Module"),
    ):
        with pytest.raises(error, match=words):
            hoptim.retrain(problem, given, train, CLEAN, inner=inner)


def test_a_copy_of_a_model_that_was_not_trained_is_new() -> None:
    problem = hoptim.Problem(make(), ExampleWeights(N).double(), train_loss, val_loss)
    start = copy.deepcopy(problem.model)
    ended = hoptim.retrain(problem, lambda: copy.deepcopy(problem.model), train, CLEAN, inner=inner)
    assert same(problem.model, start)
    assert not same(ended, start)


def test_other_mistakes_are_named() -> None:
    problem, hparams = learned(), None
    hparams = problem.hparams

    def idle(model: Any, optimizer: Any, examples: Any) -> None:
        optimizer.loss(examples).backward()

    def moving(model: Any, optimizer: Any, examples: Any) -> None:
        train(model, optimizer, examples)
        hparams["example_weight"] = torch.full((N,), 0.5)

    for given, error, words in (
        ({"train": idle}, RuntimeError, "train took no step"),
        ({"train": moving}, RuntimeError, "train moved hyperparameter 'example_weight'"),
        ({"train": lambda model, optimizer: None}, TypeError, "train takes"),
        ({"inner": lambda model: SGD(hparams.parameters(), lr=0.1)}, ValueError, "inner optimizer holds 'example_weight'"),
        ({"inner": lambda model: model}, TypeError, "inner is a Sequential"),
        ({"problem": hparams}, TypeError, "problem is an ExampleWeights"),
    ):
        settings = {"problem": problem, "make": make, "train": train, "examples": CLEAN, "inner": inner, **given}
        before = hparams["example_weight"].detach()
        with pytest.raises(error, match=words):
            hoptim.retrain(**settings)
        hparams["example_weight"] = before


def test_hypersteps_by_hand_move_nothing() -> None:
    problem = learned()
    before = problem.hparams["example_weight"].detach().clone()

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        train(model, optimizer, examples)
        optimizer.hyperstep(NOISY, CLEAN)

    hoptim.retrain(problem, make, loop, torch.arange(N), inner=lambda model: Adam(model.parameters(), lr=0.01))
    assert torch.equal(problem.hparams["example_weight"], before)


def test_under_no_grad_it_is_the_same_training_and_under_inference_mode_it_is_refused() -> None:
    problem, ends = learned(), []
    for around in (torch.enable_grad(), torch.no_grad()):
        torch.manual_seed(2)
        with around:
            ends.append(hoptim.retrain(problem, make, train, torch.arange(N), inner=inner))
    assert same(*ends)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"retrain was called under torch.inference_mode\(\)"):
        hoptim.retrain(problem, make, train, torch.arange(N), inner=inner)


# A retraining that knows nothing of what was learned is told


def told(problem: hoptim.Problem, loop: Any = train, **more: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hoptim.retrain(problem, make, loop, torch.arange(N), **{"inner": inner, **more})
    assert all(one.filename == __file__ for one in caught)
    return [str(one.message) for one in caught]


def test_a_loop_that_never_asks_for_the_loss_is_told() -> None:
    problem = learned()

    def own(model: Any, optimizer: Any, examples: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(X[examples]), Y[examples]).backward()
            optimizer.step()
            with torch.no_grad():
                optimizer.loss(examples)  # only for a log

    (words,) = told(problem, own)
    assert "no loss of optimizer.loss(batch) went backward in train" in words
    assert "such as 'example_weight': compute the loss with it in place of the criterion" in words
    assert told(problem) == []


def test_a_loop_with_its_own_loss_beside_a_learned_rate_is_not_told_if_nothing_is_in_the_loss() -> None:
    def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(X[batch]), Y[batch])

    def own(model: Any, optimizer: Any, examples: Any) -> None:
        loss(model, None, examples).backward()
        optimizer.step()

    hparams = hoptim.HyperParameters({"lr": torch.tensor(0.3)}, {"lr": constraints.positive})
    problem = hoptim.Problem(make(), hparams, loss, loss)
    assert told(problem, own, options={"lr": "lr"}) == []
    assert len(told(problem, own)) == 1  # then the rate is in the loss, as far as is known


def unmoved(**settings: Any) -> hoptim.Problem:
    torch.manual_seed(1)
    model, hparams = make(), ExampleWeights(N, trusted=CLEAN).double()
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    train(model, hoptim.BilevelOptimizer(inner(model), hparams.optimizer(), problem, val_batches=[CLEAN], **settings), NOISY)
    return problem


@pytest.mark.parametrize("settings", [{"every": 100}, {"every": 2, "warmup": 2000}, {"every": None}])
def test_the_retraining_of_a_run_without_a_hyperstep_has_the_starts(settings: Any) -> None:
    problem = unmoved(**settings)
    torch.manual_seed(2)
    model = hoptim.retrain(problem, make, train, torch.arange(N), inner=inner)
    assert same(model, by_hand(ExampleWeights(N, trusted=CLEAN).double()["example_weight"].detach(), torch.arange(N)))
