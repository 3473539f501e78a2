"""Diagonals near A, and the scaled operator that solvers see in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SIZE, Counted, flat, spd, with_spectrum
from tiny import BATCHES, VAL, direct_of, g_of, leaf_vector, linearized, matrix, mixed, tiny
from tiny import SIZE as WEIGHTS
from torch import Tensor, nn, optim

from hoptim import (
    CG,
    MINRES,
    BilevelOptimizer,
    GaussNewton,
    HyperParameters,
    Identity,
    Implicit,
    Jacobi,
    Neumann,
    Problem,
    SecondMoments,
    Update,
    hypergradient,
)
from hoptim.linalg.operators import Operator, Scaled
from hoptim.solvers.gmres import GMRES

# The scaled operator


class Dense(Operator):
    """A matrix that need not be symmetric."""

    def __init__(self, M: Tensor) -> None:
        super().__init__(M[0])
        self.M = M

    def __matmul__(self, v: Tensor) -> Tensor:
        return v @ self.M.T

    @property
    def T(self) -> Operator:  # noqa: N802
        return Dense(self.M.T)


def test_scaled_is_s_a_s_and_so_is_its_transpose() -> None:
    A, s, v = Dense(torch.randn(SIZE, SIZE)), torch.rand(SIZE) + 0.5, torch.randn(SIZE)
    S = torch.diag(s)
    scaled = Scaled(A, s)
    for operator, dense in (
        (scaled, S @ A.M @ S),
        (scaled.T, S @ A.M.T @ S),
        (scaled.T.T + 0.7, S @ A.M @ S + 0.7 * torch.eye(SIZE)),
    ):
        torch.testing.assert_close(operator @ v, dense @ v)
        several = torch.stack([v, v.flip(0), 2 * v])
        torch.testing.assert_close(operator @ several, several @ dense.T)
    assert not scaled.is_symmetric
    assert Scaled(Counted(spd()), s).is_symmetric


# Jacobi


def diagonal(A: Any, **options: Any) -> Tensor:
    return Jacobi(**options)(A, {}, None)


def test_jacobi_is_exact_for_a_diagonal_operator_and_takes_its_size() -> None:
    d = torch.linspace(-3, 4, SIZE)
    d[3] = 0.25
    torch.testing.assert_close(diagonal(Counted(torch.diag(d)), probes=1), d.abs())
    torch.testing.assert_close(diagonal(Counted(torch.diag(d)), probes=5), d.abs())


def test_jacobi_is_the_diagonal_in_the_mean_over_probes() -> None:
    M = with_spectrum(torch.logspace(0, -1, SIZE), 3)
    exact, few, many = M.diagonal(), *(diagonal(Counted(M), probes=n) for n in (4, 20000))
    assert ((few - exact).norm() / exact.norm()).item() > 0.02
    torch.testing.assert_close(many, exact, rtol=0.03, atol=0)


def test_jacobi_spends_its_probes_on_one_batched_product() -> None:
    A = Counted(spd())
    Jacobi(probes=4)(A, {}, None)
    assert A.calls == 1


def test_jacobi_has_a_floor_and_leaves_a_flat_operator_alone() -> None:
    d = torch.tensor([8.0, 1e-9, 0.0, *[1.0] * (SIZE - 3)])
    found = diagonal(Counted(torch.diag(d)), floor=0.25)
    assert found.tolist() == [8.0, *[2.0] * (SIZE - 1)]
    assert diagonal(Counted(torch.zeros(SIZE, SIZE))).tolist() == [1.0] * SIZE


# In a hypergradient


class Fixed(Jacobi):
    """Any diagonal: the answer may not depend on it."""

    def __call__(self, A: Operator, weights: Any, inner: Any) -> Tensor:
        return torch.rand(A.size, generator=torch.Generator().manual_seed(2)) * 5 + 0.1


@pytest.mark.parametrize(
    "solver", [CG(terms=60, tolerance=1e-13), MINRES(terms=60, tolerance=1e-13), GMRES(terms=17, tolerance=0)]
)
@pytest.mark.parametrize("preconditioner", [None, Jacobi(), Fixed(), SecondMoments()])
def test_an_exact_solve_is_not_changed_by_it(preconditioner: Any, solver: Any) -> None:
    problem = tiny()
    inner = optim.Adam(problem.model.parameters(), lr=0.01)
    problem.loss(BATCHES[1]).backward()
    inner.step()
    method = Implicit(solver, curvature=GaussNewton(), preconditioner=preconditioner, damping=0.2)
    result = hypergradient(problem, BATCHES[0], VAL, method, inner=inner)
    A = linearized(problem, GaussNewton(), lambda one: matrix(one.A)) + 0.2 * torch.eye(WEIGHTS)
    x = torch.linalg.solve(A, g_of(problem))
    torch.testing.assert_close(flat(result.solution.value), x, rtol=1e-8, atol=1e-9)
    expected = direct_of(problem) - mixed(problem, BATCHES[0]).T @ x
    torch.testing.assert_close(leaf_vector(result.grads), expected, rtol=1e-8, atol=1e-9)


def test_diagonal_is_that_of_the_damped_curvature() -> None:
    d = torch.tensor([0.5, 2.0, -1.0])
    problem = Problem(
        nn.ParameterDict({"w": torch.zeros(3)}),
        HyperParameters({"a": torch.ones(3)}),
        lambda m, h, b: 0.5 * (d * m["w"].square()).sum() - h["a"] @ m["w"],
        lambda m, h, b: m["w"] @ torch.tensor([1.0, 2.0, 3.0]),
    )
    result = hypergradient(problem, None, None, Implicit(Identity(), preconditioner=Jacobi(probes=1), damping=0.25))
    torch.testing.assert_close(result.grads["a"], torch.tensor([1.0, 2.0, 3.0]) / torch.tensor([0.75, 2.25, 0.75]))


def test_a_few_terms_with_it_are_those_of_the_scaled_system() -> None:
    problem = tiny()
    A = linearized(problem, GaussNewton(), lambda one: matrix(one.A)) + 0.2 * torch.eye(WEIGHTS)
    s = Fixed()(Dense(A), {}, None).rsqrt()
    v = y = s * g_of(problem)
    for _ in range(3):
        v = v - 0.1 * s * (A @ (s * v))
        y = y + v
    method = Implicit(Neumann(terms=3, step_size=0.1), curvature=GaussNewton(), preconditioner=Fixed(), damping=0.2)
    result = hypergradient(problem, BATCHES[0], VAL, method)
    torch.testing.assert_close(flat(result.solution.value), 0.1 * s * y, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_unsymmetric_update_is_solved_in_its_scale_too(name: str) -> None:
    problem = tiny()
    inner = {"adam": optim.Adam, "adamw": optim.AdamW}[name](problem.model.parameters(), lr=0.05, weight_decay=0.2)
    problem.loss(BATCHES[1]).backward()
    inner.step()
    A = linearized(problem, GaussNewton(), lambda one: matrix(one.A), condition=Update(), inner=inner)
    x = torch.linalg.solve(A.T + 0.3 * torch.eye(WEIGHTS), g_of(problem))
    method = Implicit(
        GMRES(terms=17, tolerance=0), condition=Update(), curvature=GaussNewton(), preconditioner=Fixed(), damping=0.3
    )
    result = hypergradient(problem, BATCHES[0], VAL, method, inner=inner)
    torch.testing.assert_close(flat(result.solution.value), x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_conjugate_gradients_need_fewer_products_where_the_scales_differ(spread: float) -> None:
    n = 40
    scale = torch.logspace(0, torch.tensor(spread).log10().item() / 2, n)
    M = scale[:, None] * (torch.eye(n) + 0.1 * with_spectrum(torch.linspace(-1, 1, n), 1)) * scale
    model = nn.ParameterDict({"w": torch.zeros(n)})
    problem = Problem(
        model,
        HyperParameters({"a": torch.ones(n)}),
        lambda m, h, b: 0.5 * m["w"] @ M @ m["w"] - h["a"] @ m["w"],
        lambda m, h, b: m["w"].sum(),
    )
    plain, scaled = (
        hypergradient(problem, None, None, Implicit(CG(terms=400, tolerance=1e-8), preconditioner=preconditioner))
        for preconditioner in (None, Jacobi(floor=1e-9))
    )
    expected = torch.linalg.solve(M, torch.ones(n))
    assert (scaled.grads["a"] - expected).norm() < 1e-5 * expected.norm()
    assert 3 * scaled.solution.products < plain.solution.products


def test_several_right_hand_sides_have_one_scale() -> None:
    def two(m: Any, h: Any, b: Any) -> Tensor:
        size = [p.square().sum() for p in m.parameters()]
        return torch.stack([sum(size), size[0] - size[1]])

    method = Implicit(CG(terms=60, tolerance=1e-12), curvature=GaussNewton(), preconditioner=Jacobi())
    problem = tiny(val=two)
    together = hypergradient(problem, BATCHES[0], VAL, method)
    for r in range(2):
        alone = hypergradient(tiny(val=lambda m, h, b, r=r: two(m, h, b)[r]), BATCHES[0], VAL, method)
        torch.testing.assert_close(together.grads["decay"][r], alone.grads["decay"], rtol=1e-8, atol=1e-10)


# SecondMoments


INNERS = {
    "adam": (optim.Adam, {"lr": 0.01}, 0.999, 1e-8),
    "adam of other betas": (optim.Adam, {"lr": 0.01, "betas": (0.5, 0.7), "eps": 1e-3}, 0.7, 1e-3),
    "adamw": (optim.AdamW, {"lr": 0.01, "weight_decay": 0.3, "eps": 1e-4}, 0.999, 1e-4),
}


@pytest.mark.parametrize("name", INNERS)
def test_identity_with_second_moments_is_gradient_over_their_root(name: str) -> None:
    kind, options, beta, eps = INNERS[name]
    problem = tiny()
    params = list(problem.model.parameters())
    inner = kind([{"params": params[2:]}, {"params": params[:2]}], **options)  # in another order than the model's
    moment = torch.zeros(WEIGHTS)
    for b in BATCHES[1:4]:
        inner.zero_grad()
        problem.loss(b).backward()
        moment = beta * moment + (1 - beta) * torch.cat([p.grad.flatten() for p in params]) ** 2
        inner.step()
    expected = g_of(problem) / ((moment / (1 - beta**3)).sqrt() + eps)
    method = Implicit(Identity(), preconditioner=SecondMoments())
    result = hypergradient(problem, BATCHES[0], VAL, method, inner=inner)
    torch.testing.assert_close(flat(result.solution.value), expected, rtol=1e-11, atol=1e-13)
    indirect = -mixed(problem, BATCHES[0]).T @ expected
    torch.testing.assert_close(leaf_vector(result.indirect), indirect, rtol=1e-11, atol=1e-13)
    assert result.solution.products == 0


def test_second_moments_without_betas_are_not_corrected() -> None:
    class Rooted(optim.Optimizer):
        """Keeps Adam's second moments, with no betas among its options."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1, "eps": 0.01})

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p] = {"exp_avg_sq": p.grad**2, "step": torch.tensor(1.0)}

    problem = tiny()
    inner = Rooted(problem.model.parameters())
    problem.loss(BATCHES[1]).backward()
    inner.step()
    moment = torch.cat([p.grad.flatten() for p in problem.model.parameters()]) ** 2
    result = hypergradient(problem, BATCHES[0], VAL, Implicit(Identity(), preconditioner=SecondMoments()), inner=inner)
    torch.testing.assert_close(flat(result.solution.value), g_of(problem) / (moment.sqrt() + 0.01), rtol=1e-11, atol=1e-13)


def test_second_moments_that_are_not_there_are_named() -> None:
    problem = tiny()
    method = Implicit(Identity(), preconditioner=SecondMoments())
    with pytest.raises(ValueError, match=r"SecondMoments needs the inner optimizer.*inner=optimizer"):
        hypergradient(problem, BATCHES[0], VAL, method)
    names = r"\['0.weight', '0.bias', '3.weight', '3.bias'\]"
    for inner in (optim.SGD(problem.model.parameters(), momentum=0.9), optim.AdamW(problem.model.parameters())):
        with pytest.raises(
            ValueError, match=rf"{type(inner).__name__} holds no second moments of the weights {names}.*Jacobi"
        ):
            hypergradient(problem, BATCHES[0], VAL, method, inner=inner)
    half = optim.Adam(problem.model[0].parameters())
    problem.loss(BATCHES[0]).backward()
    half.step()
    with pytest.raises(ValueError, match=r"\['3.weight', '3.bias'\]"):
        hypergradient(problem, BATCHES[0], VAL, method, inner=half)


def test_optimizer_hands_its_second_moments_over_as_they_are_after_the_step() -> None:
    problem = tiny()
    inner = optim.Adam(problem.model.parameters(), lr=0.01)
    method = Implicit(Identity(), preconditioner=SecondMoments())
    outer = optim.SGD(problem.hparams.parameters(), lr=0.0)
    optimizer = BilevelOptimizer(inner, outer, problem, val_batches=[VAL], hypergradient=method, every=2)
    for b in BATCHES[:2]:
        optimizer.zero_grad()
        optimizer.loss(b).backward()
        optimizer.step()
    expected = hypergradient(problem, BATCHES[1], VAL, method, inner=inner)
    torch.testing.assert_close(optimizer.record.result.grads["decay"], expected.grads["decay"], rtol=1e-13, atol=0)
