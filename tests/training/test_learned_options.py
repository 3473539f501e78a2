"""Learned options of the inner optimizer at the edge of their constraint: a run goes on at 0, and leaves it again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn, optim
from torch.distributions import constraints

from hoptim import BilevelOptimizer, HyperParameters, Identity, Implicit, Neumann, Problem, Status, Unrolled, Update

# The first outer steps here take options to zero on purpose, of which users are told.
pytestmark = pytest.mark.filterwarnings("error", "ignore:the first outer step took")

LOW, HIGH = -10.0, 10.0  # where the validation loss wants the weight: to go faster is worse, or better


def learning(kind: Any, key: str, options: dict[str, Any], method: Any, targets: list[float], outer: float = 1.0) -> Any:
    """One weight on its way from 0 to 4 down L_T = (w − 4)²/2, with L_V = (w − target)²/2 and one learned option."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor(0.0))})
    hparams = HyperParameters({"option": torch.tensor(0.1)}, {"option": constraints.nonnegative})
    problem = Problem(
        model, hparams, lambda m, h, b: 0.5 * (m["w"] - 4).square(), lambda m, h, target: 0.5 * (m["w"] - target).square()
    )
    inner = kind(model.parameters(), **options, **{key: 0.1})
    rate = optim.SGD(hparams.parameters(), lr=outer)
    return BilevelOptimizer(
        inner, rate, problem, val_batches=targets, every=3, hypergradient=method, options={key: "option"}
    )


def take(optimizer: BilevelOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        optimizer.loss(0).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "key", "options"),
    [
        (optim.SGD, "momentum", {"lr": 0.01}),
        (optim.SGD, "momentum", {"lr": 0.01, "dampening": 0.5}),
        (optim.RMSprop, "momentum", {"lr": 0.01}),
        (optim.SGD, "lr", {"momentum": 0.5}),
        (optim.Adam, "lr", {}),
        (optim.AdamW, "lr", {"weight_decay": 0.0}),
    ],
)
@pytest.mark.parametrize(
    "method",
    [Unrolled(3), Implicit(Identity(), condition=Update()), Implicit(Neumann(terms=3, step_size=0.5), condition=Update())],
    ids=["unrolled", "update, identity", "update, neumann"],
)
def test_an_option_that_is_projected_to_zero_stays_there_for_a_while_and_is_pulled_up_again(
    kind: Any, key: str, options: dict[str, Any], method: Any
) -> None:
    optimizer = learning(kind, key, options, method, [LOW, LOW, HIGH], outer=100.0)
    values, slopes = [], []
    for _ in range(3):
        take(optimizer, 3)
        assert optimizer.record.moved
        values.append(optimizer.record.hyperparameters["option"].item())
        slopes.append(optimizer.record.result.grads["option"].item())
    assert values[:2] == [0.0, 0.0]
    assert values[2] > 0
    assert slopes[0] > 0
    assert slopes[1] > 0
    assert slopes[2] < 0
    take(optimizer, 1)  # with the new value


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_hypergradient_of_a_momentum_at_zero_in_closed_form(checkpoint: bool) -> None:
    """Of three steps w⁺ = w − 0.1·b⁺, b⁺ = μ·b + w − 4: at μ = 0, ∂w₃/∂μ = −0.1·(0.9²·b₀ + 0.9·g₀ + g₁)."""
    optimizer = learning(optim.SGD, "momentum", {"lr": 0.1}, Unrolled(3, checkpoint=checkpoint), [LOW, HIGH], outer=100.0)
    take(optimizer, 3)
    w = optimizer.problem.model["w"]
    assert optimizer.problem.hparams["option"] == 0
    start, buffer = w.item(), optimizer.state[w]["momentum_buffer"].item()
    take(optimizer, 3)
    weights = [4 - (4 - start) * 0.9**steps for steps in range(4)]
    slope = -0.1 * (0.9**2 * buffer + 0.9 * (weights[0] - 4) + (weights[1] - 4))
    assert w.item() == pytest.approx(weights[3], rel=1e-12)
    assert optimizer.record.result.grads["option"].item() == pytest.approx((weights[3] - HIGH) * slope, rel=1e-12)
    assert optimizer.record.status is Status.FINISHED


def test_the_hypergradient_of_adams_rate_at_zero_in_closed_form() -> None:
    """With betas of 0 each step is the rate times the gradient's sign, and at a rate of 0 the weight stands still."""
    optimizer = learning(optim.Adam, "lr", {"betas": (0.0, 0.0), "eps": 0.0}, Unrolled(3), [LOW, HIGH], outer=100.0)
    take(optimizer, 3)
    w = optimizer.problem.model["w"]
    start = w.item()
    take(optimizer, 3)
    assert w.item() == start
    assert optimizer.record.result.grads["option"].item() == pytest.approx((start - HIGH) * 3.0, rel=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_update_at_a_rate_of_zero_has_no_curvature_unless_damped_and_the_run_goes_on(damping: float) -> None:
    """A = lr·H is 0 there: the system has no solution, as the status says with the remedy, which works."""
    method = Implicit(condition=Update(), damping=damping)
    optimizer = learning(optim.SGD, "lr", {}, method, [LOW, HIGH], outer=1.0)
    take(optimizer, 3)
    assert optimizer.problem.hparams["option"] == 0
    if damping:
        take(optimizer, 3)
        assert optimizer.problem.hparams["option"] > 0
    else:
        with pytest.warns(UserWarning, match="NO_CURVATURE.*Add damping"):
            take(optimizer, 3)
        assert not optimizer.record.moved
        take(optimizer, 3)
