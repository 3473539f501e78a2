"""Losses that return ``(loss, aux)``: the loop gets both, and everything computed is as without the second part."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim

X, V = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double().split(6)
Y, W = X[:, :1] - 2 * X[:, 1:2], V[:, :1]


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    prediction = model(batch[0])
    return F.mse_loss(prediction, batch[1]) + hparams["decay"] * model.weight.square().sum()


def with_aux(model: Any, hparams: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return train_loss(model, hparams, batch), {"prediction": model(batch[0]).detach()}


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def val_with_aux(model: Any, hparams: Any, batch: Any) -> tuple[Tensor, str]:
    return val_loss(model, hparams, batch), "anything"


def parts(model: Any, hparams: Any) -> dict[str, Any]:
    return {
        "predict": lambda model, hparams, batch: model(batch[0]),
        "criterion": lambda z, hparams, batch: F.mse_loss(z, batch[1]),
        "penalty": lambda model, hparams: hparams["decay"] * model.weight.square().sum(),
    }


def build(train: Any, val: Any = val_loss, **options: Any) -> hoptim.Problem:
    torch.manual_seed(1)
    model = nn.Linear(4, 1).double()
    hparams = hoptim.HyperParameters({"decay": torch.tensor(0.1, dtype=torch.float64)})
    return hoptim.Problem(model, hparams, train, val, **options)


def test_the_loop_gets_the_loss_and_what_was_returned_beside_it() -> None:
    plain, problem = build(train_loss), build(with_aux, has_aux=True)
    loss, aux = problem.loss((X, Y))
    assert torch.equal(loss, plain.loss((X, Y)))
    assert torch.equal(aux["prediction"], problem.model(X))
    assert loss.requires_grad


def test_of_a_composite_loss_it_is_what_predict_returned() -> None:
    problem = build(hoptim.CompositeLoss(**parts(None, None)), has_aux=True)
    loss, z = problem.loss((X, Y))
    assert torch.equal(z, problem.model(X))
    assert torch.equal(loss, build(train_loss).loss((X, Y)))


@pytest.mark.parametrize("val", [val_loss, val_with_aux])
def test_the_hypergradient_is_that_of_the_losses_alone(val: Any) -> None:
    expected = hoptim.hypergradient(build(train_loss), (X, Y), (V, W))
    found = hoptim.hypergradient(build(with_aux, val, has_aux=True), (X, Y), (V, W))
    assert torch.equal(found.grads["decay"], expected.grads["decay"])
    assert torch.equal(found.val_loss, expected.val_loss)


@pytest.mark.parametrize("method", [hoptim.Implicit(), hoptim.Unrolled(2)])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_run_has_the_bits_of_one_without(method: Any, micro: int) -> None:
    def run(train: Any, has_aux: bool) -> tuple[Tensor, ...]:
        problem = build(train, has_aux=has_aux)
        inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.1)
        optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[(V, W)], hypergradient=method, every=2)
        for _ in range(6):
            optimizer.zero_grad()
            for rows in torch.arange(6).split(6 // micro):
                found = optimizer.loss((X[rows], Y[rows]))
                (found[0] if has_aux else found).backward()
            optimizer.step()
        assert optimizer.record is not None
        assert optimizer.record.moved
        return *problem.model.parameters(), *problem.hparams.parameters()

    for a, b in zip(run(train_loss, False), run(with_aux, True), strict=True):
        assert torch.equal(a, b)


def test_a_hidden_state_goes_round_the_loop() -> None:
    """An RNN's state is part of the batch, and its next value comes back beside the loss."""
    torch.manual_seed(0)
    model = nn.RNN(1, 3, batch_first=True).double()
    twin, sequence = copy.deepcopy(model), torch.randn(2, 8, 1).double()

    def loss(model: Any, hparams: Any, batch: Any) -> tuple[Tensor, Tensor]:
        output, state = model(*batch)
        return output.square().mean() * hparams["scale"], state.detach()

    hparams = nn.ParameterDict({"scale": torch.tensor(1.0).double()})
    problem = hoptim.Problem(model, hparams, loss, loss, has_aux=True)
    state = by_hand = torch.zeros(1, 2, 3).double()
    for piece in sequence.split(2, dim=1):
        _, state = problem.loss((piece, state))
        by_hand = twin(piece, by_hand)[1].detach()
    assert torch.equal(state, by_hand)
    assert not state.requires_grad


def test_an_audit_goes_through() -> None:
    problem = build(with_aux, val_with_aux, has_aux=True)
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    found = hoptim.audit(problem, (X, Y), (V, W), inner=inner, steps=3)
    assert "standard error" not in str(found.advice)


@pytest.mark.parametrize(
    ("train", "options", "words"),
    [
        (with_aux, {}, ["train_loss returned a tuple", "has_aux=True"]),
        (train_loss, {"has_aux": True}, ["train_loss returned a Tensor", "(loss, aux)"]),
        (train_loss, {"has_aux": 1}, ["has_aux=1", "True"]),
    ],
)
def test_what_does_not_fit_is_told(train: Any, options: Any, words: list[str]) -> None:
    with pytest.raises(TypeError) as error:
        build(train, **options).loss((X, Y))
    assert all(word in str(error.value) for word in words)
