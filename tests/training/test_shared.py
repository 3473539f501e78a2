"""A frozen backbone that models share: the same bits as copies of it, as long as nothing writes into it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.optim import SGD

import hoptim
from hoptim import CrossValidated, HyperParameters, Problem

N, STEPS = 18, 12
DRAW = torch.Generator().manual_seed(0)
X = torch.randn(N, 3, generator=DRAW, dtype=torch.float64)
Y = torch.randn(N, 1, generator=DRAW, dtype=torch.float64)


def backbone() -> nn.Module:
    torch.manual_seed(7)
    made = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh())
    made(X)  # as trained elsewhere
    return made.requires_grad_(False).eval()


class Net(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model(X[batch]) - Y[batch]).square().mean() + hparams["decay"] * model.head.weight.square().sum()


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return (model.eval()(X[batch]) - Y[batch]).square().mean()


def train(model: Any, optimizer: Any, examples: Any) -> None:
    for step in range(STEPS):
        model.train()
        model.body.eval()
        optimizer.zero_grad()
        optimizer.loss(examples.roll(step)[:6]).backward()
        optimizer.step()


def training_mode(model: Any, optimizer: Any, examples: Any) -> None:
    """As ``train``, but the backbone's batch norm writes its statistics."""
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        optimizer.loss(examples.roll(step)[:6]).backward()
        optimizer.step()


def inner(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.5)


def hyperparameters() -> HyperParameters:
    return HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.positive})


def fit(make: Any, loop: Any = train, **changed: Any) -> Any:
    torch.manual_seed(1)
    settings = {"inner": inner, "examples": N, "steps": STEPS, "hypersteps": 3, **changed}
    return CrossValidated(make, hyperparameters(), loss, val_loss, **settings).fit(loop)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


def learned(model: nn.Module, loop: Any = train) -> Problem:
    problem = Problem(model, hyperparameters(), loss, val_loss)
    outer = problem.hparams.optimizer()
    loop(
        model,
        hoptim.BilevelOptimizer(inner(model), outer, problem, val_batches=[torch.arange(9, N)], every=4),
        torch.arange(9),
    )
    return problem


def test_folds_that_share_a_frozen_backbone_have_the_bits_of_folds_with_copies() -> None:
    body = backbone()
    shared, copied = fit(lambda: Net(body)), fit(lambda: Net(copy.deepcopy(body)))
    assert shared.models[0].body is shared.models[1].body is shared.model.body
    for one, other in zip([shared.model, *shared.models], [copied.model, *copied.models], strict=True):
        assert equal(one, other)
    assert torch.equal(shared.hyperparameters["decay"], copied.hyperparameters["decay"])
    assert shared.hyperparameters["decay"] != 0.1
    assert equal(body, backbone())


def test_a_retraining_that_shares_it_too() -> None:
    body, ends = backbone(), []
    problem = learned(Net(body))
    for make in (lambda: Net(body), lambda: Net(copy.deepcopy(body))):
        torch.manual_seed(2)
        ends.append(hoptim.retrain(problem, make, train, torch.arange(N), inner=inner))
    assert ends[0].body is body
    assert equal(*ends)
    assert equal(body, backbone())


def test_a_fit_that_shares_it_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    class KilledError(Exception):
        pass

    def loop(kill: int) -> Any:
        steps = [0]

        def train(model: Any, optimizer: Any, examples: Any) -> None:
            for step in optimizer.resumable(range(STEPS)):
                if steps[0] == kill:
                    raise KilledError
                steps[0] += 1
                model.train()
                model.body.eval()
                optimizer.zero_grad()
                optimizer.loss(examples.roll(step)[:6]).backward()
                optimizer.step()

        return train

    def run(kill: int, **more: Any) -> Any:
        torch.manual_seed(1)
        body = backbone()
        settings = {"inner": inner, "examples": N, "steps": STEPS, "hypersteps": 3}
        return CrossValidated(lambda: Net(body), hyperparameters(), loss, val_loss, **settings).fit(loop(kill), **more)

    whole = run(-1)
    for kill in (20, 40):
        path = tmp_path / f"{kill}.pt"
        with pytest.raises(KilledError):
            run(kill, checkpoint=path, every_seconds=0)
        assert equal(run(-1, checkpoint=path).model, whole.model)


def test_a_sparse_buffer_and_one_with_nan_may_be_shared_as_any_other() -> None:
    body, more = backbone(), backbone()
    more.register_buffer("graph", torch.eye(3).to_sparse())
    more.register_buffer("unknown", torch.tensor([torch.nan]))
    plain, found = fit(lambda: Net(body)), fit(lambda: Net(more))
    assert torch.equal(found.model.head.weight, plain.model.head.weight)

    def writing(model: Any, optimizer: Any, examples: Any) -> None:
        model.body.graph = 2 * model.body.graph
        train(model, optimizer, examples)

    with pytest.raises(ValueError, match=r"wrote into the buffer 'body\.graph', which several models share"):
        fit(lambda: Net(more), writing)


BUFFER = r"'body\.1\.(running_mean|running_var|num_batches_tracked)'"
WROTE = rf"the training wrote into the buffer {BUFFER}, which several models share"


def test_a_fold_that_writes_into_a_shared_buffer_is_refused_in_its_first_step() -> None:
    body, seen = backbone(), []

    def counted(model: Any, optimizer: Any, examples: Any) -> None:
        optimizer.inner.register_step_post_hook(lambda *_: seen.append(0))
        training_mode(model, optimizer, examples)

    with pytest.raises(ValueError, match=WROTE + r".*call eval\(\)"):
        fit(lambda: Net(body), counted)
    assert len(seen) == 1
    fit(lambda: Net(copy.deepcopy(body)), training_mode)  # of its own it may write


@pytest.mark.parametrize("fold", [0, 1, 2, 3])
def test_one_that_writes_later_or_in_place_of_the_buffer_is_refused_too(fold: int) -> None:
    """Fold 3 is the training on everything."""
    calls, body = [0], backbone()

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        number, calls[0] = calls[0], calls[0] + 1
        train(model, optimizer, examples)
        if number == fold:
            model.body[1].running_mean = model.body[1].running_mean + 0.1  # another tensor, which the others see as well

    with pytest.raises(ValueError, match=WROTE):
        fit(lambda: Net(body), loop)


def test_a_retraining_that_writes_into_it_is_refused() -> None:
    body, seen = backbone(), []
    problem = learned(Net(body))

    def counted(model: Any, optimizer: Any, examples: Any) -> None:
        optimizer.inner.register_step_post_hook(lambda *_: seen.append(0))
        training_mode(model, optimizer, examples)

    with pytest.raises(ValueError, match=WROTE):
        hoptim.retrain(problem, lambda: Net(body), counted, torch.arange(N), inner=inner)
    assert len(seen) == 1


def test_a_backbone_that_is_unfrozen_in_the_loop_is_refused() -> None:
    body = backbone()

    def loop(model: Any, optimizer: Any, examples: Any) -> None:
        train(model, optimizer, examples)
        model.body.requires_grad_(True)

    with pytest.raises(
        ValueError, match=r"'body\.0\.weight' was frozen, is shared by several models, and requires a gradient now"
    ):
        fit(lambda: Net(body), loop)
    problem = learned(Net(body := backbone()))
    with pytest.raises(ValueError, match=r"'body\.0\.weight' was frozen, is shared"):
        hoptim.retrain(problem, lambda: Net(body), loop, torch.arange(N), inner=inner)


def test_what_is_trained_may_not_be_shared() -> None:
    body = backbone()
    body[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"share the tensor 'body\.1\.weight'"):
        fit(lambda: Net(body))
    own = [backbone(), backbone()]
    own[1][1].running_mean = own[0][1].running_mean
    for body in own:
        body[1].weight.requires_grad_(True)  # trained, but each its own
    with pytest.raises(
        ValueError, match=r"'body\.1\.running_mean' of the model that make returned is 'body\.1\.running_mean'"
    ):
        hoptim.retrain(learned(Net(own[0])), lambda: Net(own[1]), train, torch.arange(N), inner=inner)
