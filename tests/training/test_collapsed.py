"""A decay that takes the weights to zero is told, with the weight and its share of the norm; one that does not is not."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hoptim
from hoptim.recipes import WeightDecay
from hoptim.training.first_steps import weight_norms


def told(start: float, steps: int = 60, *, zero: bool = False) -> tuple[list[str], nn.Module]:
    """The warnings about weights in a training with this decay, and the model."""
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    y = x[:, :2].cumsum(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    if zero:
        nn.init.zeros_(model[2].weight)
    decay = WeightDecay(model, start=start)

    def val_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return (model(x[batch]) - y[batch]).square().mean()

    def train_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return val_loss(model, hparams, batch) + hparams.penalty(model)

    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    problem = hoptim.Problem(model, decay, train_loss, val_loss)
    optimizer = hoptim.BilevelOptimizer(
        inner, decay.optimizer(lr=1e-6), problem, val_batches=[torch.arange(20, 40)], every=20
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.loss(torch.arange(20)).backward()
            optimizer.step()
    return [str(one.message) for one in caught if "norm that it had" in str(one.message)], model


def test_a_decay_that_takes_the_weights_to_zero_is_told_once_with_the_share() -> None:
    messages, _ = told(10.0)
    (message,) = messages
    found = re.search(r"weight '(0|2)\.weight' is at ([\de.-]+) of the norm", message)
    assert found is not None
    torch.manual_seed(0)
    torch.randn(40, 4)
    first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))[int(found[1])].weight
    _, model = told(10.0, steps=20)  # as it was at the first hyperstep, which told
    share = (model.get_parameter(f"{found[1]}.weight").norm() / first.norm()).item()
    assert float(found[2]) == pytest.approx(share, rel=0.05)
    assert share < 0.01


@pytest.mark.parametrize("zero", [False, True])
def test_a_model_that_learns_is_not_doubted_nor_one_whose_weights_begin_at_zero(zero: bool) -> None:
    assert told(1e-3, zero=zero)[0] == []


def test_norms_are_those_of_weights_of_two_axes() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).double()
    decay = WeightDecay(model)
    problem = hoptim.Problem(model, decay, lambda m, h, b: h.penalty(m), lambda m, h, b: m(b).sum())
    weight = model.get_parameter("0.weight")
    assert weight_norms(problem) == {"0.weight": pytest.approx(float(weight.square().sum().sqrt()))}
