"""SOBA (Dagréou et al. 2022), one product a hyperstep: against steps written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import flat
from tiny import BATCHES, VAL, direct_of, g_of, hess, leaf_vector, leaves_of, mixed, slope, tiny, weights_of
from torch import Tensor, nn, optim

from hoptim import SOBA, BilevelOptimizer, Exact, Implicit, Neumann, Solver, Status, WarmStart
from hoptim.linalg.operators import Symmetric

RHO, GAMMA = 0.15, 0.05
SAME = {"rtol": 1e-12, "atol": 1e-14}


def optimizer_of(every: int | None, solver: Solver) -> BilevelOptimizer:
    problem = tiny()
    return BilevelOptimizer(
        optim.SGD(problem.model.parameters(), lr=RHO),
        optim.SGD(problem.hparams.parameters(), lr=GAMMA),
        problem,
        val_batches=[VAL],
        every=every,
        hypergradient=Implicit(solver, curvature=Exact()),
    )


class ByHand:
    """(w, v, λ), and the three directions of SOBA at any of them."""

    def __init__(self) -> None:
        self.problem = tiny()
        self.v = torch.zeros(17)

    @property
    def w(self) -> Tensor:
        return weights_of(self.problem)

    def put(self, w: Tensor, l: Tensor) -> None:  # noqa: E741
        nn.utils.vector_to_parameters(w, self.problem.model.parameters())
        self.problem.hparams["decay"].data.copy_(l[:2])
        self.problem.hparams["scale"].data.copy_(l[2])

    def down(self, b: object) -> Tensor:
        return slope(self.problem, b)

    def rest(self, b: object) -> Tensor:
        return hess(self.problem, b) @ self.v - g_of(self.problem)

    def outer(self, b: object, v: Tensor) -> Tensor:
        return direct_of(self.problem) - mixed(self.problem, b).T @ v


def test_ten_steps_are_sobas_each_at_the_newest_of_the_others() -> None:
    optimizer, hand = optimizer_of(1, WarmStart(Neumann(terms=0, step_size=RHO))), ByHand()
    for k in range(10):
        b = BATCHES[k % len(BATCHES)]
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        optimizer.step()

        hand.put(hand.w - RHO * hand.down(b), leaves_of(hand.problem))
        hand.v = hand.v - RHO * hand.rest(b)  # from v = 0, the cold start: ρg
        hand.put(hand.w, leaves_of(hand.problem) - GAMMA * hand.outer(b, hand.v))

        torch.testing.assert_close(weights_of(optimizer.problem), hand.w, **SAME)
        torch.testing.assert_close(flat(optimizer.record.result.solution.value), hand.v, **SAME)
        torch.testing.assert_close(leaves_of(optimizer.problem), leaves_of(hand.problem), **SAME)
        assert optimizer.record.result.solution.products == (k > 0)
    assert hand.v.norm() > 0.1


@pytest.mark.parametrize(
    ("solver", "newest"),
    [(SOBA(step_size=RHO), False), (WarmStart(Neumann(terms=0, step_size=RHO)), True)],
    ids=["SOBA", "the newest v"],
)
def test_ten_steps_from_one_point_each_are_the_papers(solver: Solver, newest: bool) -> None:
    """With a hyperstep before the step, weights, v and λ move from where all three were; a warm start has v's new value."""
    optimizer, hand = optimizer_of(None, solver), ByHand()
    for k in range(10):
        b = BATCHES[k % len(BATCHES)]
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        optimizer.hyperstep()
        optimizer.step()

        w, v = hand.w - RHO * hand.down(b), hand.v - RHO * hand.rest(b)
        outer, left = hand.outer(b, v if newest else hand.v), hand.rest(b).norm() / g_of(hand.problem).norm()
        hand.v = v
        hand.put(w, leaves_of(hand.problem) - GAMMA * outer)

        torch.testing.assert_close(weights_of(optimizer.problem), hand.w, **SAME)
        torch.testing.assert_close(leaves_of(optimizer.problem), leaves_of(hand.problem), **SAME)
        solution = optimizer.record.result.solution
        torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), outer, **SAME)
        torch.testing.assert_close(solution.state["solution"], v, **SAME)
        assert solution.products == (k > 0)
        if k:
            torch.testing.assert_close(solution.residuals[0], left, **SAME)
    assert hand.v.norm() > 0.1


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_carried_v_that_has_run_away_is_dropped(lead: tuple[int, ...]) -> None:
    A, far = Symmetric(lambda v: 2 * v, like=torch.ones(2)), {"solution": torch.full((*lead, 2), 1e3)}
    solution = SOBA(step_size=0.25).solve(A, torch.ones(*lead, 2), far)
    assert solution.status is Status.GROWING
    torch.testing.assert_close(solution.value, torch.zeros(*lead, 2))
    torch.testing.assert_close(solution.state["solution"], torch.full((*lead, 2), 0.25))
    at_rest = SOBA(step_size=0.25).solve(A, torch.zeros(*lead, 2), far)
    torch.testing.assert_close(at_rest.value, torch.zeros(*lead, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad: float) -> None:
    like, begun = torch.ones(2), {"solution": torch.ones(2)}
    broken = SOBA(step_size=0.25).solve(Symmetric(lambda v: bad * v, like=like), like, begun)
    assert broken.status is Status.NON_FINITE_PRODUCT
    gradient = SOBA(step_size=0.25).solve(Symmetric(lambda v: v, like=like), torch.tensor([1.0, bad]), begun)
    assert gradient.status is Status.NON_FINITE_GRADIENT
    assert broken.state == gradient.state == {}


@pytest.mark.parametrize("step_size", [0, -0.1, float("nan"), None, True])
def test_a_step_of_soba_is_positive(step_size: Any) -> None:
    with pytest.raises(ValueError, match="give a positive number"):
        SOBA(step_size=step_size)
