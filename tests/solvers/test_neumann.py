"""The Neumann series against dense powers, the step that it chooses, and how it ends; and the identity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import OPERATORS, SIZE, Counted, classes, noisy_problem, spd
from systems import LEADS, SYSTEMS, Dense, System, left
from systems import solve as solved
from torch import Tensor, nn

from hoptim import Chebyshev, Exact, Identity, Implicit, Neumann, Problem, Solution, Solver, Status
from hoptim.linalg.lanczos import spectral_norm, start_vector
from hoptim.linalg.operators import Operator, Symmetric
from hoptim.methods.preconditioners import Preconditioner


def right_hand_sides(lead: tuple[int, ...]) -> Tensor:
    return torch.randn(*lead, SIZE, generator=torch.Generator().manual_seed(4))


def iterate(H: Tensor, g: Tensor, terms: int, step: float) -> Tensor:
    """α Σ_{j=0..K} (I − αH)^j g, by dense powers."""
    powers = [torch.linalg.matrix_power(torch.eye(SIZE) - step * H, j) for j in range(terms + 1)]
    return step * g @ sum(powers)


def solve(H: Tensor, g: Tensor, solver: Neumann | Identity, state: dict[str, Tensor] | None = None) -> tuple[Solution, int]:
    """The solution, and how many products were really spent."""
    A = Counted(H)
    solution = solver.solve(A, g, state)
    return solution, A.calls


def close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a - b).norm() <= tolerance * b.norm())


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("terms", [0, 1, 5, 20])
@pytest.mark.parametrize("name", OPERATORS)
def test_neumann_is_the_dense_series(name: str, terms: int, lead: tuple[int, ...]) -> None:
    H, g, step = OPERATORS[name](), right_hand_sides(lead), 0.9
    solution, calls = solve(H, g, Neumann(terms=terms, step_size=step))
    assert close(solution.value, iterate(H, g, terms, step), 1e-10)
    assert solution.products == calls == terms
    assert solution.step_size == step
    assert solution.status.ok


@pytest.mark.parametrize("lead", [(), (3,)])
def test_residual_j_is_that_of_the_iterate_before(lead: tuple[int, ...]) -> None:
    H, g, terms, step = spd(), right_hand_sides(lead), 7, 0.9
    solution, _ = solve(H, g, Neumann(terms=terms, step_size=step))
    expected = [(g - iterate(H, g, j, step) @ H).norm(dim=-1) / g.norm(dim=-1) for j in range(terms)]
    assert solution.residuals.shape == (terms, *lead)
    torch.testing.assert_close(solution.residuals, torch.stack(expected), rtol=1e-10, atol=0)


def test_many_terms_solve_the_system() -> None:
    H, g = spd(10.0), right_hand_sides(())
    solution, _ = solve(H, g, Neumann(terms=500))
    assert close(solution.value, torch.linalg.solve(H, g), 1e-10)
    assert solution.residuals[-1] < 1e-10


@pytest.mark.parametrize("lead", [(), (3,)])
def test_identity_returns_a_copy_of_the_right_hand_side(lead: tuple[int, ...]) -> None:
    g = right_hand_sides(lead)
    solution, calls = solve(spd(), g, Identity())
    assert torch.equal(solution.value, g)
    assert calls == solution.products == len(solution.residuals) == 0
    solution.value.zero_()
    assert g.all()


@pytest.mark.parametrize("solver", [Neumann(terms=5, step_size=0.5), Neumann(terms=5), Identity()])
def test_right_hand_side_is_left_alone(solver: Neumann) -> None:
    g = right_hand_sides(())
    before = g.clone()
    solve(spd(), g, solver)
    assert torch.equal(g, before)


# The step chosen from the spectrum


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("condition", [10.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chosen_step_is_near_one_over_the_norm_and_never_diverges(condition: float, seed: int, dtype: torch.dtype) -> None:
    H = 37.0 * spd(condition, seed, dtype)
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    solution, calls = solve(H, g, Neumann(terms=100))
    assert solution.status is Status.FINISHED
    assert 0.999 <= solution.step_size * 37.0 <= 1.3
    assert solution.products == calls == 10 + 100
    assert (solution.residuals[1:] <= solution.residuals[:-1] * (1 + 1e-5)).all()


def test_chosen_step_gives_the_dense_series_of_that_step() -> None:
    H, g = spd(), right_hand_sides((2,))
    solution, _ = solve(H, g, Neumann(terms=20))
    assert close(solution.value, iterate(H, g, 20, solution.step_size), 1e-10)


def test_carried_state_makes_the_next_solve_cheaper_and_its_step_no_worse() -> None:
    H, g = spd(), right_hand_sides(())
    first, _ = solve(H, g, Neumann(terms=5))
    second, calls = solve(H, g, Neumann(terms=5), first.state)
    assert (first.products, second.products) == (10 + 5, 2 + 5)
    assert calls == second.products
    assert abs(second.step_size - 1) <= abs(first.step_size - 1)


def test_misleading_state_is_found_out_and_its_products_counted() -> None:
    H = torch.diag(torch.tensor([1000.0] + [1.0] * (SIZE - 1)))
    blind = torch.eye(SIZE)[1]
    solution, calls = solve(H, torch.ones(SIZE), Neumann(terms=30), {"direction": blind})
    assert solution.status is Status.FINISHED
    assert solution.step_size == pytest.approx(1e-3, rel=0.01)
    assert solution.products == calls > 12 + 30


def test_state_of_another_model_is_ignored() -> None:
    solution, calls = solve(spd(), right_hand_sides(()), Neumann(terms=5), {"direction": torch.ones(3)})
    assert solution.products == calls == 15


def test_state_of_another_precision_is_no_obstacle() -> None:
    state = {"direction": torch.ones(SIZE, dtype=torch.float32)}
    solution, _ = solve(spd(), right_hand_sides(()), Neumann(terms=5), state)
    assert solution.status.ok
    assert solution.value.dtype == torch.float64


def test_choice_of_step_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    solve(spd(), right_hand_sides(()), Neumann(terms=2))
    assert torch.equal(torch.get_rng_state(), before)


# How it ends


def nan_matrix() -> Tensor:
    return torch.full((SIZE, SIZE), math.nan, dtype=torch.float64)


def along(eigenvalue: float) -> tuple[Tensor, Tensor]:
    """An SPD operator but for one eigenvalue, and a right-hand side that is mostly along it."""
    H = torch.diag(torch.tensor([eigenvalue] + [0.5] * (SIZE - 1), dtype=torch.float64))
    return H, torch.tensor([1.0] + [0.01] * (SIZE - 1), dtype=torch.float64)


ONES = torch.ones(SIZE, dtype=torch.float64)
ENDS = {
    "step far too large": (spd(), ONES, Neumann(terms=1000, step_size=3.0), Status.STEP_TOO_LARGE),
    "step just too large": (*along(2.0), Neumann(terms=1000, step_size=1.05), Status.STEP_TOO_LARGE),
    "too large, few terms": (*along(2.0), Neumann(terms=9, step_size=2.0), Status.STEP_TOO_LARGE),
    "strongly negative": (*along(-0.8), Neumann(terms=1000, step_size=1.0), Status.CURVATURE_TOO_NEGATIVE),
    "strongly negative, chosen": (*along(-0.8), Neumann(terms=1000), Status.CURVATURE_TOO_NEGATIVE),
    "mildly negative": (*along(-0.05), Neumann(terms=20, step_size=1.0), Status.NEGATIVE_CURVATURE),
    "mildly negative, chosen": (*along(-0.05), Neumann(terms=10), Status.NEGATIVE_CURVATURE),
    "negative, grown to 8.9": (*along(-0.2), Neumann(terms=12, step_size=1.0), Status.NEGATIVE_CURVATURE),
    "negative, grown to 10.7": (*along(-0.2), Neumann(terms=13, step_size=1.0), Status.CURVATURE_TOO_NEGATIVE),
    "growing, yet bounded": (*along(2.1), Neumann(terms=10, step_size=1.0), Status.GROWING),
    "no curvature": (0 * spd(), ONES, Neumann(), Status.NO_CURVATURE),
    "nothing to solve": (0 * spd(), 0 * ONES, Neumann(), Status.FINISHED),
    "zero right-hand side": (spd(), 0 * ONES, Neumann(step_size=0.5), Status.FINISHED),
    "gradient NaN": (spd(), math.nan * ONES, Neumann(step_size=0.5), Status.NON_FINITE_GRADIENT),
    "gradient NaN, chosen": (spd(), math.nan * ONES, Neumann(), Status.NON_FINITE_GRADIENT),
    "gradient inf, no terms": (spd(), math.inf * ONES, Neumann(terms=0, step_size=0.5), Status.NON_FINITE_GRADIENT),
    "gradient NaN, identity": (spd(), math.nan * ONES, Identity(), Status.NON_FINITE_GRADIENT),
    "product NaN": (nan_matrix(), ONES, Neumann(step_size=0.5), Status.NON_FINITE_PRODUCT),
    "product NaN, chosen": (nan_matrix(), ONES, Neumann(), Status.NON_FINITE_PRODUCT),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_solve_ends(name: str) -> None:
    H, g, solver, expected = ENDS[name]
    solution, calls = solve(H, g, solver)
    assert solution.status is expected, solution.detail
    assert solution.products == calls


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 3])
def test_a_product_that_is_bad_once_only_is_named_and_not_taken_for_growth(at: int, bad: float) -> None:
    H, calls = spd(), []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        found = v @ H
        return found * bad if len(calls) == at else found

    A = Symmetric(product, like=ONES)
    solution = Neumann(terms=5, step_size=0.5).solve(A, ONES)
    assert solution.status is Status.NON_FINITE_PRODUCT
    assert solution.detail == f"at term {at}"
    assert solution.products == len(calls)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [Neumann(terms=5), Chebyshev(terms=5)], ids=str)
def test_a_product_that_is_not_finite_spoils_no_direction(solver: Solver, bad: float) -> None:
    """Ten products are for the step, and the next is bad: the direction goes on to the next solve."""
    H, calls = spd(), []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return v @ H * (bad if len(calls) == 12 else 1.0)

    solution = solver.solve(Symmetric(product, like=ONES), ONES)
    assert solution.status is Status.NON_FINITE_PRODUCT
    assert solution.products == len(calls) == 12
    assert solution.state["direction"].isfinite().all()


@pytest.mark.parametrize("name", ["step far too large", "strongly negative", "product NaN"])
def test_products_stop_where_the_series_has_failed(name: str) -> None:
    H, g, solver, _ = ENDS[name]
    solution, calls = solve(H, g, solver)
    assert solution.products == calls <= 64


@pytest.mark.parametrize(("bad", "status"), [(-0.8, Status.CURVATURE_TOO_NEGATIVE), (2.5, Status.STEP_TOO_LARGE)])
def test_one_bad_right_hand_side_among_several_fails_the_solve(bad: float, status: Status) -> None:
    H = torch.diag(torch.tensor([bad] + [0.5] * (SIZE - 1)))
    g = torch.eye(SIZE)[[3, 0, 5]]
    solution, calls = solve(H, g, Neumann(terms=100, step_size=1.0))
    assert solution.status is status
    assert f"curvature of {bad}" in solution.detail
    assert solution.products == calls == solve(H, g[1], Neumann(terms=100, step_size=1.0))[1]
    assert solve(H, g[[0, 2]], Neumann(terms=100, step_size=1.0))[0].status is Status.FINISHED


DETAILS = {
    "step just too large": ["step size 1.05", "curvature of 2,", "less than 1"],
    "strongly negative": ["grew to 10.5 times", "along a curvature of -0.8"],
    "mildly negative": ["curvature along the last term is -0.0"],
    "growing, yet bounded": ["step size 1,", "2.1"],
}


@pytest.mark.parametrize("name", DETAILS)
def test_detail_gives_the_figures_behind_the_status(name: str) -> None:
    H, g, solver, _ = ENDS[name]
    detail = solve(H, g, solver)[0].detail
    assert [words for words in DETAILS[name] if words not in detail] == [], detail


def test_each_status_says_what_to_do() -> None:
    assert {status.kind for status in Status} == {"ok", "remark", "failed"}
    assert {"CONVERGED", "FINISHED", "NEGATIVE_CURVATURE", "GROWING", "LARGE_RESIDUAL"} <= {s.name for s in Status if s.ok}
    assert len({status.message for status in Status}) == len(Status)
    assert all(len(status.message) > 20 for status in Status)


# Unsymmetric curvatures, and a tolerance


@pytest.mark.parametrize("system", ["unsymmetric", "complex", "complex, far from real"])
def test_neumann_sums_powers_of_the_transpose_and_takes_its_step_from_them(system: str) -> None:
    case, terms = SYSTEMS[system], 4
    g = case.sides((3,))
    solution, _ = solved(case, g, Neumann(terms=terms))
    step = solution.step_size or math.nan
    powers = sum(torch.linalg.matrix_power(torch.eye(SIZE) - step * case.matrix, j) for j in range(terms + 1))
    torch.testing.assert_close(solution.value, step * g @ powers, rtol=1e-10, atol=1e-12)
    norm, radius = torch.linalg.matrix_norm(case.matrix, 2), torch.linalg.eigvals(case.matrix).abs().max()
    assert 0.8 * radius <= 1 / step <= norm * (1 + 1e-9)
    A = Dense(case.matrix.T, symmetric=False)
    bound, _ = spectral_norm(A, start_vector(A, g.sum(0)), 10)
    assert 1 / step == pytest.approx(bound.item(), rel=1e-12)
    bound, _ = spectral_norm(Dense(case.matrix.T, symmetric=False), solution.state["direction"], 300)
    assert radius * (1 - 1e-3) <= bound <= norm * (1 + 1e-9)


def test_a_complex_spectrum_is_told_the_step_that_it_allows() -> None:
    block = torch.tensor([[0.3, 1.2], [-1.2, 0.3]])
    matrix = torch.block_diag(block, *[torch.eye(1) * 0.5] * (SIZE - 2))
    case, g = System(matrix, symmetric=False), torch.eye(SIZE)[0]
    solution, A = solved(case, g, Neumann(terms=100, step_size=0.9))
    assert solution.status is Status.STEP_TOO_LARGE
    assert "curvature of 0.3, which allows less than 0.392" in solution.detail  # 2 Re μ / |μ|²
    assert solution.products == A.products(())
    assert solved(case, g, Neumann(terms=100, step_size=0.38))[0].status is Status.FINISHED
    stuck, A = solved(case, g, Neumann(terms=100))  # 1/‖A‖ is too long as well: tried once, not three times
    assert stuck.status is Status.STEP_TOO_LARGE
    assert stuck.products == A.products(()) < 60


@pytest.mark.parametrize("lead", LEADS)
def test_tolerance_stops_the_series_where_its_residual_says(lead: tuple[int, ...]) -> None:
    case = SYSTEMS["spd"]
    g = case.sides(lead)
    whole, _ = solved(case, g, Neumann(terms=60, step_size=0.9))
    below = (whole.residuals.reshape(60, -1) <= 0.1).int().argmax(0) + 1
    stopped, A = solved(case, g, Neumann(terms=60, step_size=0.9, tolerance=0.1))
    assert stopped.status is Status.CONVERGED
    assert stopped.products == A.products(lead) == below.max() + 1
    torch.testing.assert_close(stopped.residuals[-1], left(case, g, stopped.value))
    for row, k, x in zip(g.reshape(-1, SIZE), below.tolist(), stopped.value.reshape(-1, SIZE), strict=True):
        expected = solved(case, row, Neumann(terms=k, step_size=0.9))[0]
        torch.testing.assert_close(x, expected.value, rtol=1e-10, atol=1e-12)


def test_a_series_that_grew_for_a_while_and_then_converged_has_converged() -> None:
    matrix = torch.eye(SIZE)
    matrix[1, 0] = 8.0  # far from normal: Aᵀ has one eigenvalue, and stretches some vectors by 8
    case, g = System(matrix, symmetric=False), torch.eye(SIZE)[1]
    solution, _ = solved(case, g, Neumann(terms=60, step_size=0.5, tolerance=1e-3))
    assert solution.residuals[0] > 1
    assert solution.status is Status.CONVERGED
    assert left(case, g, solution.value) <= 1e-3
    assert solved(case, g, Neumann(terms=60, step_size=0.5))[0].status is Status.GROWING
    oblique, _ = solved(case, torch.eye(SIZE)[0] - torch.eye(SIZE)[1], Neumann(terms=60, step_size=0.5))
    assert oblique.status is Status.GROWING  # though ⟨g, Ag⟩ < 0, which says nothing where A is not symmetric
    assert not oblique.negative_curvature


# In a hypergradient


class Halves(Preconditioner):
    """D = I/2."""

    def __call__(self, A: Operator, *_: Any) -> Tensor:
        return torch.full((A.size,), 0.5)


@pytest.mark.parametrize("solver", [Neumann(terms=30), Chebyshev(terms=30)], ids=str)
@pytest.mark.parametrize("preconditioner", [None, Halves()], ids=["plain", "preconditioned"])
def test_a_second_attempt_is_in_the_hypergradient_too(solver: Solver, preconditioner: Preconditioner | None) -> None:
    h, g = torch.tensor([100.0, 1.0, 2.0]), torch.ones(3)
    model, hparams = nn.ParameterDict({"w": torch.ones(3)}), nn.ParameterDict({"shift": torch.zeros(3)})

    def train_loss(model: Any, hparams: Any, _: Any) -> Tensor:  # F = h w + shift, so that B = I
        return (0.5 * h * model["w"] ** 2 + hparams["shift"] * model["w"]).sum()

    problem = Problem(model, hparams, train_loss, lambda model, _, __: (g * model["w"]).sum())
    poor = {"direction": torch.tensor([0.0, 1.0, 0.0])}  # of a curvature far from the largest
    result = Implicit(solver, preconditioner=preconditioner)(problem, None, None, poor)
    assert result.solution.status.ok
    assert result.solution.products > 30 + 2 + 10  # of both attempts, and of both power iterations
    x = result.solution.value["w"]
    torch.testing.assert_close(x[:1], (g / h)[:1], rtol=0.05, atol=0)
    torch.testing.assert_close(result.grads["shift"], -x, rtol=1e-12, atol=0)


def test_batched_solve_is_a_loop_of_solves_on_a_real_model() -> None:
    problem = noisy_problem()
    solver = Neumann(terms=6, step_size=0.01)
    with problem.at() as at, Exact().linearize(at, classes(8, 0)) as F:
        g = torch.randn(4, F.A.size)
        together = solver.solve(F.A, g)
        for i in range(4):
            alone = solver.solve(F.A, g[i])
            torch.testing.assert_close(together.residuals[:, i], alone.residuals, rtol=1e-10, atol=0)
            torch.testing.assert_close(together.value[i], alone.value, rtol=1e-10, atol=1e-13)
