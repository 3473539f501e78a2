"""The figures of a record: the standard error of a weighted sum of hypergradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hoptim
from hoptim import Hypergradient, Solution, Status
from hoptim.training.record import standard_error


def result_of(**grads: Tensor) -> Hypergradient:
    """A hypergradient of R losses."""
    losses = len(next(iter(grads.values())))
    solution = Solution(value={}, status=Status.FINISHED, residuals=torch.zeros(0), products=0, state={})
    zero = torch.zeros(())
    return Hypergradient(
        grads=grads,
        direct=grads,
        indirect=grads,
        solution=solution,
        val_loss=torch.zeros(losses),
        train_loss=zero,
        gradient_norm=zero,
    )


EACH = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # of mean 3 and variance (4 + 1 + 9) / 2 = 7


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, math.sqrt(7 / 3) / 3),
        ([1 / 3] * 3, math.sqrt(7 / 3) / 3),
        ([1.0, 1.0, 1.0], math.sqrt(7 * 3) / 9),  # of the sum the same share as of the mean
        ([0.5, 0.3, 0.2], math.sqrt(7 * (0.25 + 0.09 + 0.04)) / 2.3),
        ([0.0, 1.0, 0.0], math.sqrt(7) / 2),  # of one draw: the variance is known from all
        ([1.0, -1.0, 0.0], math.sqrt(7 * 2) / 1),
    ],
)
def test_standard_error_by_hand(weights: list[float] | None, expected: float) -> None:
    assert standard_error(result_of(a=EACH), weights) == pytest.approx(expected, rel=1e-12)


def test_standard_error_goes_over_all_hyperparameters() -> None:
    """Σ ‖h_r − h̄‖² adds up over the names: 14 of a, 2 · 2 of b."""
    b = torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 4.0]])  # of mean (2, 8/3); squares 2 and 8/3
    found = standard_error(result_of(a=EACH, b=b), [0.5, 0.25, 0.25])
    total = torch.tensor([0.5 + 0.5 + 1.5, 0.5 + 0.5 + 0.75, 1.0 + 0.5 + 1.0])
    expected = math.sqrt((14 + 2 + 8 / 3) / 2 * 0.375) / total.norm().item()
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("weights", [[0.25] * 4, [0.7, 0.1, 0.1, 0.1], [2.0, 1.0, 0.0, -0.5]])
def test_standard_error_is_how_much_the_weighted_sum_scatters(weights: list[float]) -> None:
    """Over many draws of four losses, its square is on average the variance of the sum."""
    draws = 5.0 + 3.0 * torch.randn(4000, 4, 2, generator=torch.Generator().manual_seed(0))
    sums = torch.einsum("r,nrh->nh", torch.tensor(weights), draws)
    squares = [
        (standard_error(result_of(a=one), weights) * total.norm()) ** 2 for one, total in zip(draws, sums, strict=True)
    ]
    assert torch.stack(squares).mean().item() == pytest.approx(sums.var(0).sum().item(), rel=0.05)


def test_a_record_has_the_error_of_the_sum_that_moved_the_hyperparameters() -> None:
    model, hparams = nn.ParameterDict({"w": torch.tensor(1.0)}), hoptim.HyperParameters({"a": torch.tensor(0.0)})
    problem = hoptim.Problem(
        model, hparams, lambda m, h, b: 0.5 * (m["w"] - h["a"]).square(), lambda m, h, b: EACH * m["w"] + 0.0 * h["a"]
    )
    inner, outer = torch.optim.SGD(model.parameters(), lr=0.0), torch.optim.SGD(hparams.parameters(), lr=1.0)

    def record(weights: Any) -> hoptim.Record:
        return hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[0], val_weights=weights).hyperstep(0)

    weighted = record([0.5, 0.3, 0.2])  # w* = a, so that dL_r/da is the factor of the loss
    torch.testing.assert_close(weighted.result.grads["a"], EACH)
    assert weighted.hyperparameters["a"].item() == pytest.approx(-2.3)
    assert weighted.row()["standard_error"] == pytest.approx(math.sqrt(7 * 0.38) / 2.3)
    assert record(None).row()["standard_error"] == pytest.approx(math.sqrt(7 / 3) / 3)
