"""One term, a warm start and a hyperstep after each step: SOBA (Dagréou et al. 2022), against steps written by hand."""

from __future__ import annotations

import pytest
import torch
from cases import flat
from tiny import BATCHES, VAL, direct_of, g_of, hess, leaf_vector, leaves_of, mixed, slope, tiny, weights_of
from torch import Tensor, nn, optim

from hoptim import BilevelOptimizer, Exact, Implicit, Neumann
from hoptim.solvers.warm import WarmStart

RHO, GAMMA = 0.15, 0.05
SAME = {"rtol": 1e-12, "atol": 1e-14}


def optimizer_of(every: int | None) -> BilevelOptimizer:
    problem = tiny()
    return BilevelOptimizer(
        optim.SGD(problem.model.parameters(), lr=RHO),
        optim.SGD(problem.hparams.parameters(), lr=GAMMA),
        problem,
        val_batches=[VAL],
        every=every,
        hypergradient=Implicit(WarmStart(Neumann(terms=0, step_size=RHO)), curvature=Exact()),
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
    optimizer, hand = optimizer_of(1), ByHand()
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


@pytest.mark.parametrize("newest", [True, False])
def test_a_hyperstep_before_the_step_takes_all_at_the_old_point_but_for_the_newest_v(newest: bool) -> None:
    """With v from before its step, as in the paper, it is another sequence: v is one step older in λ's direction."""
    optimizer, hand = optimizer_of(None), ByHand()
    furthest = 0.0
    for k in range(10):
        b = BATCHES[k % len(BATCHES)]
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        optimizer.hyperstep()
        optimizer.step()

        down, v = hand.down(b), hand.v - RHO * hand.rest(b)
        outer = hand.outer(b, v if newest else hand.v)
        hand.v = v
        hand.put(hand.w - RHO * down, leaves_of(hand.problem) - GAMMA * outer)
        furthest = max(furthest, (leaf_of(optimizer) - leaves_of(hand.problem)).norm().item())
    moved = (leaves_of(hand.problem) - leaves_of(tiny())).norm().item()
    if newest:
        assert furthest < 1e-12
        torch.testing.assert_close(weights_of(optimizer.problem), hand.w, **SAME)
        torch.testing.assert_close(leaf_vector(optimizer.record.result.grads), outer, **SAME)
    else:
        assert 1e-4 < furthest / moved < 0.1


def leaf_of(optimizer: BilevelOptimizer) -> Tensor:
    return leaves_of(optimizer.problem)
