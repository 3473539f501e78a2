"""What is kept of the last steps: which losses made the gradient, and from where each step can be repeated."""

from __future__ import annotations

import pytest
import torch
from tiny import BATCHES, VAL, leaf_vector, tiny
from torch import nn

import hoptim
from hoptim import BilevelOptimizer, Unrolled
from hoptim.training.recent_steps import RecentSteps
from hoptim.training.training_optimizer import TrainingOptimizer


def unrolled(every: int = 2) -> BilevelOptimizer:
    problem = tiny()
    inner = torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9)
    outer = torch.optim.SGD(problem.hparams.parameters(), lr=0.0)
    return BilevelOptimizer(inner, outer, problem, val_batches=[VAL], hypergradient=Unrolled(2), every=every)


def answer(optimizer: BilevelOptimizer) -> torch.Tensor:
    assert optimizer.record is not None
    assert optimizer.record.status.name == "FINISHED"
    return leaf_vector(optimizer.record.result.grads)


def test_a_loss_that_goes_backward_twice_counts_twice() -> None:
    twice, doubled, once = unrolled(), unrolled(), unrolled()
    for batch in BATCHES[:2]:
        for optimizer in (twice, doubled, once):
            optimizer.zero_grad()
        loss = twice.loss(batch)
        loss.backward(retain_graph=True)
        loss.backward()
        (2 * doubled.loss(batch)).backward()
        once.loss(batch).backward()
        for optimizer in (twice, doubled, once):
            optimizer.step()
    torch.testing.assert_close(answer(twice), answer(doubled), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(answer(twice), answer(once), rtol=1e-2)


def test_gradients_that_were_cleared_are_no_part_of_a_step() -> None:
    ours, plain = unrolled(), unrolled()
    for batch, other in zip(BATCHES[:2], BATCHES[2:4], strict=True):
        ours.loss(other).backward()
        for optimizer in (ours, plain):
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()
    assert torch.equal(answer(ours), answer(plain))


def test_a_step_starts_before_the_first_of_its_losses_in_whatever_order_they_go_backward() -> None:
    """Two losses are computed, and then their sum goes backward: buffers are those before both."""
    x = torch.randn(4, 3)
    model, hparams = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), hoptim.HyperParameters({"a": torch.tensor(0.1)})

    def loss(m: nn.Module, h: hoptim.HyperParameters, scale: float) -> torch.Tensor:
        return m(scale * x).square().mean() + h["a"] * m[1].weight.square().sum()  # type: ignore[index]

    problem = hoptim.Problem(model, hparams, loss, loss)
    inner, recent = torch.optim.SGD(model.parameters(), lr=0.1), RecentSteps()
    before = model[0].running_var.clone()
    losses = []
    for scale in (2.0, 3.0):
        start = recent.step_start(problem, inner)
        seen = recent.before_loss(scale, generators=problem.generators(), start=start)
        losses.append(problem.loss(scale))
        recent.after_loss(seen, losses[-1])
    (0.25 * losses[1] + losses[0]).backward()
    inner.step()
    recent.stepped()
    trajectory = recent.trajectory(problem.weights())
    assert trajectory is not None
    ((number, at),) = trajectory.begins
    assert number == 0
    assert torch.equal(at.modules.tensors["model.0.running_var"], before)
    assert not torch.equal(model[0].running_var, before)
    assert [(one.batch, float(one.share)) for one in trajectory.steps[0].losses] == [(2.0, 1.0), (3.0, 0.25)]


def test_weights_of_another_shape_make_it_forget() -> None:
    optimizer = unrolled(every=3)
    optimizer.loss(BATCHES[0]).backward()
    optimizer.step()
    optimizer.loss(BATCHES[1]).backward()
    optimizer.step()
    recent, weights = optimizer._progress.recent, optimizer.problem.weights()
    assert recent.trajectory(weights) is not None
    fewer = dict(list(weights.items())[1:])
    assert recent.trajectory(fewer) is None
    with pytest.raises(ValueError, match="none of the last 2 inner steps"):
        recent.check_known(2, weights)


# An optimizer without an outer one


def test_a_training_optimizer_is_the_inner_one_with_the_loss_of_the_problem_and_goes_on_to_the_same_bits() -> None:
    def made() -> TrainingOptimizer:
        problem = tiny()
        return TrainingOptimizer(torch.optim.Adam(problem.model.parameters(), lr=0.01), problem)

    def go(optimizer: TrainingOptimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for batch in batches:
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()

    whole, first, second, plain = made(), made(), made(), tiny()
    assert isinstance(whole, torch.optim.Optimizer)
    assert not hasattr(whole, "outer")
    go(whole, BATCHES[:5])
    bare = torch.optim.Adam(plain.model.parameters(), lr=0.01)
    for batch in BATCHES[:5]:
        bare.zero_grad()
        plain.train_loss(plain.model, plain.hparams, batch).backward()
        bare.step()
    assert all(map(torch.equal, whole.problem.model.parameters(), plain.model.parameters()))
    assert all(leaf.grad is None for leaf in whole.problem.hparams.parameters())
    go(first, BATCHES[:2])
    second.problem.model.load_state_dict(first.problem.model.state_dict())
    second.load_state_dict(first.state_dict())
    go(second, BATCHES[2:5])
    assert all(map(torch.equal, whole.problem.model.parameters(), second.problem.model.parameters()))
    assert (second.inner_steps, second.hyper_steps, second.record, second.hyperstep()) == (5, 0, None, None)
    assert first.state_dict()["hoptim"].keys() == {"version", "weights", "hparams", "inner_steps"}


def test_it_takes_the_state_of_a_bilevel_optimizer() -> None:
    learned = unrolled()
    learned.outer.param_groups[0]["lr"] = 0.5
    for batch in BATCHES[:3]:
        learned.zero_grad()
        learned.loss(batch).backward()
        learned.step()
    problem = tiny()
    optimizer = TrainingOptimizer(torch.optim.SGD(problem.model.parameters(), lr=0.05, momentum=0.9), problem)
    optimizer.load_state_dict(learned.state_dict())
    assert all(map(torch.equal, problem.hparams.parameters(), learned.problem.hparams.parameters()))
    assert optimizer.inner_steps == 3
    assert len(optimizer.state) == len(learned.state) > 0
