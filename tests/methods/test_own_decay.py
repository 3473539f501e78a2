"""The inner optimizer's own weight decay is a part of F: values by closed forms, by dense algebra and by retraining."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import BATCHES, VAL, direct_of, g_of, hess, leaf_vector, mixed, slope, tiny
from torch import Tensor, nn, optim

from hoptim import (
    CG,
    GMRES,
    MINRES,
    Averaged,
    BilevelOptimizer,
    Exact,
    FiniteDifference,
    GaussNewton,
    Identity,
    Implicit,
    Problem,
    SecondMoments,
    Unrolled,
    Update,
    audit,
    hypergradient,
)

TO_THE_END = MINRES(terms=60, tolerance=1e-13)


class Regression:
    """Σ v_i (x_i w − y_i)² / n with a weight v for each example, trained to the end by a given optimizer."""

    def __init__(
        self, make: Callable[[Any], optim.Optimizer], examples: int = 12, features: int = 4, steps: int = 1000
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x, self.x_val = (torch.randn(n, features, generator=draw) for n in (examples, 9))
        self.y, self.y_val = (
            self.x.sum(1, keepdim=True) + torch.randn(examples, 1, generator=draw),
            self.x_val.sum(1, keepdim=True),
        )
        self.make, self.steps = make, steps
        self.model, self.inner, self.problem = self.train(torch.ones(examples))

    def train(self, v: Tensor) -> tuple[nn.Module, optim.Optimizer, Problem]:
        model, hparams = nn.Linear(self.x.shape[1], 1, bias=False), nn.ParameterDict({"v": v.clone()})
        nn.init.zeros_(model.weight)
        problem = Problem(model, hparams, self.train_loss, self.val_loss)
        inner = self.make(model.parameters())
        for _ in range(self.steps):
            inner.zero_grad()
            problem.loss(None).backward()
            inner.step()
        return model, inner, problem

    def train_loss(self, model: Any, hparams: Any, batch: Any) -> Tensor:
        return (hparams["v"][:, None] * (model(self.x) - self.y).square()).mean()

    def val_loss(self, model: Any, hparams: Any, batch: Any) -> Tensor:
        return (model(self.x_val) - self.y_val).square().mean()

    def by_retraining(self, line: Tensor, step: float = 1e-4) -> float:
        """The slope of the validation loss along ``line``, by central differences of whole trainings."""
        ends = [self.val_loss(self.train(1 + sign * step * line)[0], None, None).item() for sign in (1, -1)]
        return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: optim.SGD(ps, lr=0.1, weight_decay=2.0),
        lambda ps: optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.3),
        lambda ps: optim.Adam(ps, lr=0.01, weight_decay=0.5),
    ],
    ids=["SGD", "SGD nesterov", "Adam"],
)
def test_the_default_is_what_retraining_with_the_decay_says(make: Any) -> None:
    case, line = Regression(make), torch.linspace(-1, 1, 12)
    found, truth = hypergradient(case.problem, None, None, inner=case.inner), case.by_retraining(line)
    assert (found.grads["v"] * line).sum().item() == pytest.approx(truth, rel=1e-6)
    without = hypergradient(case.problem, None, None)  # of an optimizer that is not known
    assert abs((without.grads["v"] * line).sum().item() / truth - 1) > 0.2


def test_more_weights_than_examples_have_a_solution() -> None:
    case = Regression(
        lambda ps: optim.SGD(ps, lr=0.02, momentum=0.9, weight_decay=0.01), examples=6, features=20, steps=1000
    )
    line = torch.linspace(-1, 1, 6)
    found = hypergradient(case.problem, None, None, Implicit(CG(terms=40, tolerance=1e-12)), inner=case.inner)
    assert found.solution.converged
    assert (found.grads["v"] * line).sum().item() == pytest.approx(case.by_retraining(line), rel=1e-5)
    assert found.gradient_norm < 1e-6  # stationary with the decay, which the training gradient alone is not
    assert hypergradient(case.problem, None, None).gradient_norm > 1e-3


def held(beta1: float = 0.0) -> tuple[Problem, optim.Optimizer]:
    """AdamW whose second moments hardly move, far from the same for all weights."""
    problem = tiny()
    inner = optim.AdamW(problem.model.parameters(), lr=0.1, betas=(beta1, 1 - 1e-12), weight_decay=0.3, eps=1e-3)
    for number, p in enumerate(problem.model.parameters()):
        v = torch.linspace(0.01, 1.0, p.numel()).reshape(p.shape) * (number + 1)
        inner.state[p] = {"step": torch.tensor(1e14), "exp_avg": torch.zeros_like(p), "exp_avg_sq": v}
    return problem, inner


def scale_of(inner: optim.Optimizer) -> Tensor:
    return torch.cat([(state["exp_avg_sq"].sqrt() + 1e-3).flatten() for state in inner.state.values()])


CURVATURES = [(Exact(), 1e-9), (FiniteDifference(), 1e-5), (Averaged(batches=2), 1e-9)]


@pytest.mark.parametrize(("curvature", "tolerance"), CURVATURES, ids=lambda one: str(one))
def test_a_decoupled_decay_counts_by_the_second_moments_as_update_says(curvature: Any, tolerance: float) -> None:
    problem, inner = held()
    by_hand = 0.3 * scale_of(inner)
    A = hess(problem, BATCHES[0]) + by_hand.diag()
    truth = direct_of(problem) - mixed(problem, BATCHES[0]).T @ torch.linalg.solve(A, g_of(problem))
    more = {"inner": inner, "train_batches": [BATCHES[0]]}
    found = hypergradient(problem, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=curvature), **more)
    torch.testing.assert_close(leaf_vector(found.grads), truth, rtol=tolerance, atol=tolerance)
    update = Implicit(GMRES(terms=40, tolerance=1e-12), curvature=curvature, condition=Update())
    torch.testing.assert_close(
        leaf_vector(hypergradient(problem, BATCHES[0], VAL, update, **more).grads), truth, rtol=1e-4, atol=1e-5
    )


def test_gauss_newton_has_the_decay_beside_the_penalty() -> None:
    problem, _ = held()
    found, without = (
        hypergradient(problem, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=GaussNewton(), damping=damping), inner=one)
        for damping, one in ((0.0, optim.SGD(problem.model.parameters(), weight_decay=0.7)), (0.7, None))
    )
    torch.testing.assert_close(found.grads, without.grads, rtol=1e-8, atol=1e-10)
    assert found.gradient_norm > without.gradient_norm


def test_a_preconditioner_sees_it_and_several_losses_share_it() -> None:
    problem, inner = held()
    one = hypergradient(problem, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=Exact()), inner=inner)
    more = Implicit(TO_THE_END, curvature=Exact(), preconditioner=SecondMoments())
    torch.testing.assert_close(
        one.grads, hypergradient(problem, BATCHES[0], VAL, more, inner=inner).grads, rtol=1e-8, atol=1e-10
    )

    def two(model: Any, hparams: Any, batch: Any) -> Tensor:
        loss = problem.val_loss(model, hparams, batch)
        return torch.stack([loss, 3 * loss])

    both = Problem(problem.model, problem.hparams, problem.train_loss, two)
    found = hypergradient(both, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=Exact()), inner=inner)
    for name, gradient in one.grads.items():
        torch.testing.assert_close(found.grads[name], torch.stack([gradient, 3 * gradient]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW])
def test_a_learned_decay_is_seen_too(kind: Any) -> None:
    """dL_V/dα = −xᵀ ∂(α D ⊙ w)/∂α, also where the same hyperparameter is in the loss."""
    problem, other = held()
    model, leaf = problem.model, problem.hparams["scale"]
    inner = kind(model.parameters(), lr=0.1, **({} if kind is optim.SGD else {"eps": 1e-3}))
    D = torch.ones(17)
    if kind is not optim.SGD:
        inner.state.update({p: dict(state) for p, state in other.state.items()})
    if kind is optim.AdamW:
        D = torch.cat([((s["exp_avg_sq"] / (1 - 0.999 ** s["step"])).sqrt() + 1e-3).flatten() for s in inner.state.values()])
    w = torch.cat([p.detach().flatten() for p in model.parameters()])
    x = torch.linalg.solve(hess(problem, BATCHES[0]) + (leaf.detach() * D).diag(), g_of(problem))
    B = mixed(problem, BATCHES[0])
    B[:, 2] += D * w
    truth = direct_of(problem) - B.T @ x
    method, options = Implicit(TO_THE_END, curvature=Exact()), {"weight_decay": "scale"}
    found = hypergradient(problem, BATCHES[0], VAL, method, inner=inner, options=options)
    torch.testing.assert_close(leaf_vector(found.grads), truth, rtol=1e-8, atol=1e-10)


def test_the_scale_of_a_decoupled_decay_has_the_learned_eps_as_it_is_now() -> None:
    """The optimizer holds the number of the start."""
    found = []
    for is_learned in (True, False):
        problem, other = held()
        leaf = problem.hparams["scale"]
        inner: Any = optim.AdamW(
            problem.model.parameters(), weight_decay=0.3, eps=leaf.item() if is_learned else 2 * leaf.item()
        )
        inner.state.update({p: dict(state) for p, state in other.state.items()})
        if is_learned:
            outer = optim.SGD(problem.hparams.parameters(), lr=0.1)
            inner = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], every=None, options={"eps": "scale"})
            assert inner.param_groups[0]["eps"] == leaf.item()
        with torch.no_grad():
            leaf.mul_(2)
        found.append(hypergradient(problem, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=Exact()), inner=inner).grads)
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)


def test_a_decay_by_options_needs_no_unrolling() -> None:
    problem = tiny(own=0.05)
    inner = optim.SGD(problem.model.parameters(), lr=0.05)
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    method = Implicit(TO_THE_END, curvature=Exact())
    optimizer = BilevelOptimizer(
        inner, outer, problem, val_batches=[VAL], options={"weight_decay": "own"}, hypergradient=method, every=1
    )
    optimizer.zero_grad()
    optimizer.loss(BATCHES[0]).backward()
    optimizer.step()
    w = torch.cat([p.detach().flatten() for p in problem.model.parameters()])
    x = torch.linalg.solve(hess(problem, BATCHES[0]) + 0.05 * torch.eye(17), g_of(problem))
    torch.testing.assert_close(optimizer.record.result.grads["own"], -(w @ x), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="makes lr hyperparameters, in which"):
        BilevelOptimizer(inner, outer, problem, val_batches=[VAL], options={"lr": "own"}, hypergradient=method, every=1)


# What is not known is told ----------------------------------------------------------------------------------------------


class Shrinking(optim.SGD):
    """A step of its own, under the name of torch's option."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["weight_decay"]).sub_(p.grad, alpha=group["lr"])


UNKNOWN = [Shrinking, optim.Adafactor, *([optim.Muon] if hasattr(optim, "Muon") else [])]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_decay_of_unknown_kind_is_told_once_and_left_out(kind: Any) -> None:
    def run(decay: float) -> BilevelOptimizer:
        problem = tiny()
        for p in problem.model.parameters():
            p.requires_grad_(p.ndim == 2)
        inner = kind([p for p in problem.model.parameters() if p.ndim == 2], lr=0.05, weight_decay=decay)
        outer = optim.SGD(problem.hparams.parameters(), lr=0.01)
        optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], every=1)
        for batch in BATCHES[:3]:
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()
        return optimizer

    with pytest.warns(UserWarning, match=rf"how {kind.__name__} applies its weight_decay of 0.25") as told:
        optimizer = run(0.25)
    assert len([one for one in told if "weight_decay" in str(one.message)]) == 1
    assert optimizer.hyper_steps == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(0.0)


def test_an_adamw_without_a_step_is_told_and_takes_this_gradients_moments() -> None:
    problem = tiny()
    inner = optim.AdamW(problem.model.parameters(), weight_decay=0.1, eps=1e-3)
    with pytest.warns(UserWarning, match="AdamW has taken no step with 4 of its weights"):
        found = hypergradient(problem, BATCHES[0], VAL, Implicit(TO_THE_END, curvature=Exact()), inner=inner)
    c = 0.1 * (slope(problem, BATCHES[0]).abs() + 1e-3)
    x = torch.linalg.solve(hess(problem, BATCHES[0]) + c.diag(), g_of(problem))
    torch.testing.assert_close(leaf_vector(found.grads), direct_of(problem) - mixed(problem, BATCHES[0]).T @ x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(problem, BATCHES[0], VAL, inner=optim.AdamW(problem.model.parameters(), weight_decay=0.0))
        hypergradient(problem, BATCHES[0], VAL, Unrolled(1), inner=inner)  # goes by the steps themselves
        hypergradient(
            problem, BATCHES[0], VAL, Implicit(Identity()), inner=optim.SGD(problem.model.parameters(), weight_decay=0.1)
        )


def test_an_audit_knows_the_decay() -> None:
    case = Regression(lambda ps: optim.SGD(ps, lr=0.1, weight_decay=2.0))
    found = audit(case.problem, None, None, inner=case.inner, steps=100)
    assert [one.verdict for one in found.directions] == ["agrees"] * 3
    assert found.distance < 1e-6
    assert found.spectrum.lowest > 2.0
    assert not any("train longer" in line for line in found.advice)


def test_update_with_a_moment_and_a_decoupled_decay_is_told() -> None:
    problem, inner = held(beta1=0.5)
    update = Implicit(GMRES(terms=20), curvature=Exact(), condition=Update())
    with pytest.warns(UserWarning, match="holds the first moment of AdamW fixed"):
        hypergradient(problem, BATCHES[0], VAL, update, inner=inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        problem, inner = held()
        hypergradient(problem, BATCHES[0], VAL, update, inner=inner)
