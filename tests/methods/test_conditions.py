"""The update of real optimizers as the condition, against central differences of real steps."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import flat, same, snapshot
from tiny import (
    BATCHES,
    LIKE,
    SIZE,
    VAL,
    g_of,
    hess,
    leaf_vector,
    leaves_of,
    linear_val,
    linearized,
    matrix,
    matrix_at_once,
    mixed,
    mixed_at_once,
    mixed_matrix,
    series,
    tiny,
    weights_of,
)
from torch import Tensor, nn, optim

from hoptim import (
    BilevelOptimizer,
    Exact,
    FiniteDifference,
    GaussNewton,
    Gradient,
    HyperParameters,
    Identity,
    Implicit,
    Neumann,
    Problem,
    Update,
    hypergradient,
)
from hoptim.linalg.operators import Operator
from hoptim.methods.method import TrainingContext
from hoptim.solvers.gmres import GMRES

INNERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd with decay": lambda p: optim.SGD(p, lr=0.2, weight_decay=0.3),
    "momentum": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "nesterov": lambda p: optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.3),
}


def started(name: str, steps: int = 3, **options: Any) -> tuple[Problem, optim.Optimizer]:
    """The net and its optimizer after some real steps."""
    problem = tiny(**options)
    inner = INNERS[name](list(problem.model.parameters()))
    for b in BATCHES[1 : 1 + steps]:
        inner.zero_grad()
        problem.loss(b).backward()
        inner.step()
    return problem, inner


def real_step(
    problem: Problem,
    inner: optim.Optimizer,
    w: Tensor | None = None,
    l: Tensor | None = None,  # noqa: E741
    push: float = 0.0,
    **options: float,
) -> Tensor:
    """u(w, λ) by one step of a copy of the real optimizer; ``push`` is added to each gradient."""
    problem, inner = copy.deepcopy((problem, inner))
    if w is not None:
        nn.utils.vector_to_parameters(w.clone(), problem.model.parameters())
    if l is not None:
        problem.hparams["decay"].data.copy_(l[:2])
        problem.hparams["scale"].data.copy_(l[2])
    inner.param_groups[0].update(options)
    before = weights_of(problem)
    inner.zero_grad()
    problem.loss(BATCHES[0]).backward()
    for p in problem.model.parameters():
        p.grad += push
    inner.step()
    return before - weights_of(problem)


def central(f: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-5) -> Tensor:
    """The Jacobian of f, a column for each entry of ``at``."""
    return torch.stack([(f(at + h * e) - f(at - h * e)) / (2 * h) for e in torch.eye(len(at))], dim=-1)


@pytest.mark.parametrize("name", INNERS)
def test_update_and_its_derivatives_are_those_of_a_real_step(name: str) -> None:
    problem, inner = started(name)
    A = central(lambda w: real_step(problem, inner, w), weights_of(problem))
    B = central(lambda l: real_step(problem, inner, l=l), leaves_of(problem))  # noqa: E741

    def found(one: Any) -> dict[str, Tensor]:
        return {
            "u": one.value,
            "A": matrix(one.A),
            "A at once": matrix_at_once(one.A),
            "A.T": matrix(one.A.T).T,
            "A.T at once": matrix_at_once(one.A.T).T,
            "A.T.T": matrix(one.A.T.T),
            "B": mixed_matrix(one),
            "B at once": mixed_at_once(one),
        }

    got = linearized(problem, Exact(), found, condition=Update(), inner=inner)
    torch.testing.assert_close(got.pop("u"), real_step(problem, inner), rtol=1e-12, atol=1e-14)
    for key, value in got.items():
        truth = A if key.startswith("A") else B
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")
    assert (A - A.T).norm() > 1e-2 or name in ("sgd with decay", "momentum", "nesterov")


@pytest.mark.parametrize("curvature", [Exact(), GaussNewton(), FiniteDifference()])
@pytest.mark.parametrize("terms", [0, 1, 2, 6])
def test_update_of_plain_sgd_is_the_gradient_with_the_learning_rate_as_step(terms: int, curvature: Any) -> None:
    problem = tiny()
    inner = optim.SGD(problem.model.parameters(), lr=0.37)
    update = Implicit(Neumann(terms=terms, step_size=1.0), condition=Update(), curvature=curvature)
    gradient = Implicit(Neumann(terms=terms, step_size=0.37), condition=Gradient(), curvature=curvature)
    one = hypergradient(problem, BATCHES[0], VAL, update, inner=inner)
    other = hypergradient(problem, BATCHES[0], VAL, gradient, inner=inner)
    near = {"rtol": 1e-12, "atol": 1e-14} if isinstance(curvature, Exact | GaussNewton) else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(leaf_vector(one.grads), leaf_vector(other.grads), **near)
    torch.testing.assert_close(one.gradient_norm, 0.37 * other.gradient_norm)
    assert one.solution.products == terms


@pytest.mark.parametrize("solver", [Identity(), Neumann(terms=0, step_size=1.0)])
@pytest.mark.parametrize("name", INNERS)
def test_without_terms_it_is_the_derivative_of_one_real_step(name: str, solver: Any) -> None:
    problem, inner = started(name, val=linear_val)
    c = torch.cat([torch.linspace(-1, 1.5, value.numel()) for value in LIKE.values()])

    def after(l: Tensor) -> Tensor:  # noqa: E741
        return c @ (weights_of(problem) - real_step(problem, inner, l=l)) + 0.3 * l[:2].sin().sum() + 0.2 * l[2] ** 2

    result = hypergradient(problem, BATCHES[0], VAL, Implicit(solver, condition=Update()), inner=inner)
    truth = central(after, leaves_of(problem))
    torch.testing.assert_close(leaf_vector(result.grads), truth, rtol=1e-7, atol=1e-8)
    assert (leaf_vector(result.indirect).abs() > 1e-4).all()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", INNERS)
def test_learning_rate_and_weight_decay_among_the_hyperparameters(name: str, steps: int) -> None:
    problem, inner = started(name, steps, val=linear_val, lr=0.13, wd=0.2)
    options = {"lr": "lr", "weight_decay": "wd"}
    result = hypergradient(problem, BATCHES[0], VAL, Implicit(Identity(), condition=Update()), inner=inner, options=options)
    c = torch.cat([torch.linspace(-1, 1.5, value.numel()) for value in LIKE.values()])

    def after(at: Tensor) -> Tensor:
        return -c @ real_step(problem, inner, lr=float(at[0]), weight_decay=float(at[1]))

    truth = central(after, torch.tensor([0.13, 0.2]))
    found = torch.stack([result.grads["lr"], result.grads["wd"]])
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-8)
    assert (truth.abs() > 1e-4).all() or (name, steps) == ("adam", 0)  # whose first step is the gradient's sign
    assert result.untouched == ()


def test_learning_rate_that_only_the_update_knows_is_untouched_for_the_gradient() -> None:
    problem, inner = started("adamw", lr=0.13)
    with pytest.raises(ValueError, match=r"'lr' is the inner optimizer's lr.*Take hoptim\.Unrolled\(20\), or.*Update\(\)"):
        hypergradient(problem, BATCHES[0], VAL, Implicit(Identity()), inner=inner, options={"lr": "lr"})
    with pytest.raises(ValueError, match=r"\['lr'\] are touched by neither.*Unrolled\(20\).*Update\(\).*inner=optimizer"):
        hypergradient(problem, BATCHES[0], VAL, Implicit(Identity()))


@pytest.mark.parametrize("name", ["sgd with decay", "adamw"])
def test_bound_learning_rate_is_learned_by_the_optimizer_and_used_by_the_next_step(name: str) -> None:
    reference, step = started(name, 0)
    problem = tiny(val=linear_val)
    hparams = HyperParameters({"lr": torch.tensor(0.1)})
    problem = Problem(problem.model, hparams, lambda m, h, b: reference.train_loss(m, reference.hparams, b), linear_val_of)
    kind = type(step)
    inner = kind(problem.model.parameters(), lr=0.1, weight_decay=0.3)
    optimizer = BilevelOptimizer(
        inner,
        optim.SGD(hparams.parameters(), lr=1e-2),
        problem,
        val_batches=[VAL],
        every=2,
        options={"lr": "lr"},
        hypergradient=Implicit(Identity(), condition=Update()),
    )
    step.param_groups[0]["lr"] = 0.1
    for number, b in enumerate(BATCHES[:4], 1):
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        step.zero_grad()
        reference.loss(b).backward()
        step.step()
        optimizer.step()
        torch.testing.assert_close(weights_of(problem), weights_of(reference), rtol=1e-13, atol=1e-15)
        if number % 2 == 0:
            h, last, before = 1e-6, weights_of(reference), step.param_groups[0]["lr"]

            def after(lr: float, step: Any = step, b: Any = b) -> Tensor:
                again, other = copy.deepcopy((reference, step))
                other.param_groups[0]["lr"] = lr
                other.zero_grad()
                again.loss(b).backward()
                other.step()
                return linear_val_of(again.model, None, None)

            slope = (after(before + h) - after(before - h)) / (2 * h)
            assert optimizer.record.result.grads["lr"].item() == pytest.approx(slope.item(), rel=1e-6)
            step.param_groups[0]["lr"] = before - 1e-2 * slope.item()
            assert hparams["lr"].item() == pytest.approx(step.param_groups[0]["lr"], rel=1e-9)
            step.param_groups[0]["lr"] = hparams["lr"].item()
            assert torch.equal(weights_of(reference), last)


def linear_val_of(m: Any, h: Any, b: Any) -> Tensor:
    return sum((torch.linspace(-1, 1.5, p.numel()).reshape(p.shape) * p).sum() for p in m.parameters())


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adamw"])
def test_series_and_solution_are_those_of_the_dense_transpose(name: str) -> None:
    problem, inner = started(name)
    A, B = linearized(problem, Exact(), lambda one: (matrix(one.A), mixed_matrix(one)), condition=Update(), inner=inner)
    g = g_of(problem)
    few = Implicit(Neumann(terms=3, step_size=0.5), condition=Update(), curvature=Exact())
    result = hypergradient(problem, BATCHES[0], VAL, few, inner=inner)
    x = series([A] * 3, g, 0.5)
    torch.testing.assert_close(flat(result.solution.value), x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(leaf_vector(result.indirect), -B.T @ x, rtol=1e-10, atol=1e-12)
    full = Implicit(GMRES(terms=SIZE, tolerance=1e-13), condition=Update(), curvature=Exact(), damping=0.3)
    result = hypergradient(problem, BATCHES[0], VAL, full, inner=inner)
    x = torch.linalg.solve(A.T + 0.3 * torch.eye(SIZE), g)
    torch.testing.assert_close(flat(result.solution.value), x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_gauss_newton_takes_the_place_of_the_hessian_alone(name: str) -> None:
    problem, inner = started(name)
    P = (real_step(problem, inner, push=1e-5) - real_step(problem, inner, push=-1e-5)) / 2e-5
    H, G = (linearized(problem, curvature, lambda one: matrix(one.A)) for curvature in (Exact(), GaussNewton()))
    A, A_gn = (
        linearized(problem, curvature, lambda one: matrix(one.A), condition=Update(), inner=inner)
        for curvature in (Exact(), GaussNewton())
    )
    torch.testing.assert_close(A_gn - A, P[:, None] * (G - H), rtol=1e-6, atol=1e-9)
    assert (G - H).norm() > 1e-2


@pytest.mark.parametrize("names", [("0.weight", "0.bias"), ("0.weight", "3.weight"), ("3.weight",)])
def test_weights_that_the_optimizer_does_not_hold_are_fixed_and_named(names: tuple[str, ...]) -> None:
    problem = tiny()
    inner = optim.SGD([problem.weights()[name] for name in reversed(names)], lr=0.2)
    held = flat({name: torch.full(value.shape, name in names) for name, value in LIKE.items()})
    method = Implicit(Neumann(terms=3, step_size=1.0), condition=Update(), curvature=Exact())
    others = [name for name in LIKE if name not in names]
    with pytest.warns(UserWarning, match=re.escape(str(others))):
        result = hypergradient(problem, BATCHES[0], VAL, method, inner=inner)
    A = 0.2 * hess(problem, BATCHES[0])[held][:, held]
    x = series([A] * 3, g_of(problem)[held], 1.0)
    assert list(result.solution.value) == list(names)
    torch.testing.assert_close(flat(result.solution.value), x, rtol=1e-11, atol=1e-13)
    indirect = -0.2 * mixed(problem, BATCHES[0])[held].T @ x
    torch.testing.assert_close(leaf_vector(result.indirect), indirect, rtol=1e-11, atol=1e-13)

    def products(one: Any) -> tuple[Tensor, ...]:
        return matrix(one.A), matrix(one.A.T), matrix_at_once(one.A), matrix_at_once(one.A.T)

    for found in linearized(problem, Exact(), products, condition=Update(), inner=inner):
        torch.testing.assert_close(found, A, rtol=1e-11, atol=1e-13)


def test_curvature_that_is_not_symmetric_is_transposed_inside() -> None:
    M = torch.randn(SIZE, SIZE)

    class Dense(Operator):
        def __init__(self, M: Tensor) -> None:
            super().__init__(torch.zeros(SIZE))
            self.M = M

        def __matmul__(self, v: Tensor) -> Tensor:
            return v @ self.M.T

        @property
        def T(self) -> Operator:  # noqa: N802
            return Dense(self.M.T)

    problem, inner = started("adamw")
    P = (real_step(problem, inner, push=1e-5) - real_step(problem, inner, push=-1e-5)) / 2e-5
    with problem.leave_no_trace(), problem.at() as at, Exact().linearize(at, BATCHES[0]) as one:
        found = Update()(dataclasses.replace(one, A=Dense(M)), at, TrainingContext(inner=inner)).A
        A, AT = matrix(found), matrix(found.T)
    truth = P[:, None] * M + 0.1 * 0.3 * torch.eye(SIZE)
    torch.testing.assert_close(A, truth, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(AT, truth.T, rtol=1e-6, atol=1e-8)


def test_warning_of_weights_that_the_optimizer_does_not_hold_does_not_blame_the_loss() -> None:
    problem = tiny()
    inner = optim.SGD(problem.model[0].parameters(), lr=0.2)
    with pytest.warns(UserWarning, match=r"optimizer.*\['3.weight', '3.bias'\]"):
        hypergradient(problem, BATCHES[0], VAL, Implicit(Identity(), condition=Update()), inner=inner)


@pytest.mark.parametrize("name", INNERS)
def test_live_optimizer_is_untouched_to_the_last_bit(name: str) -> None:
    problem, inner = started(name)
    before, state = snapshot(problem), copy.deepcopy(inner.state_dict())
    keys = set(inner.state)
    result = hypergradient(problem, BATCHES[0], VAL, Implicit(Neumann(terms=2), condition=Update()), inner=inner)
    assert result.solution.status.ok
    assert same(snapshot(problem), before)
    assert same(inner.state_dict(), state)
    assert set(inner.state) == keys


def test_optimizer_hands_its_inner_one_over() -> None:
    problem, inner = started("adamw")
    optimizer = BilevelOptimizer(
        inner,
        optim.SGD(problem.hparams.parameters(), lr=0.1),
        problem,
        val_batches=[VAL],
        hypergradient=Implicit(Neumann(terms=2, step_size=1.0), condition=Update()),
    )
    expected = hypergradient(problem, BATCHES[0], VAL, optimizer.hypergradient, inner=inner)
    record = optimizer.hyperstep(BATCHES[0])
    assert same(record.result.grads, expected.grads)


def test_what_update_cannot_serve_is_named() -> None:
    problem = tiny()
    update = Implicit(Identity(), condition=Update())
    with pytest.raises(ValueError, match=r"Update needs the inner optimizer.*inner=optimizer"):
        hypergradient(problem, BATCHES[0], VAL, update)
    with pytest.raises(TypeError, match="LBFGS"):
        hypergradient(problem, BATCHES[0], VAL, update, inner=optim.LBFGS(problem.model.parameters()))
    elsewhere = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="inner holds no weight of the problem's model"):
        hypergradient(problem, BATCHES[0], VAL, update, inner=elsewhere)


def test_decoupled_decay_adds_its_share_to_the_diagonal() -> None:
    problem, inner = started("adamw")
    v = torch.zeros(SIZE)
    v[-1] = 1.0
    A = linearized(problem, Exact(), lambda one: one.A @ v, condition=Update(), inner=inner)
    H = linearized(problem, Exact(), lambda one: one.A @ v)
    P = (real_step(problem, inner, push=1e-5) - real_step(problem, inner, push=-1e-5)) / 2e-5
    torch.testing.assert_close(A, P * H + 0.1 * 0.3 * v, rtol=1e-6, atol=1e-9)
