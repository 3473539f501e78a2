"""Warm starts, and the solves that are one step from the last one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import SIZE, spd
from systems import LEADS, SYSTEMS, Dense, System, dense, left, solve
from tiny import BATCHES, VAL, tiny
from torch import Tensor

from hoptim import (
    CG,
    GMRES,
    MINRES,
    SOBA,
    Chebyshev,
    GaussNewton,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Solver,
    Status,
    WarmStart,
)
from hoptim.linalg.operators import Operator, Symmetric
from hoptim.methods.preconditioners import Preconditioner
from hoptim.solvers.base import solve_scaled


def test_warm_start_with_no_terms_takes_the_steps_of_soba() -> None:
    rho, v, state = 0.3, torch.zeros(SIZE), None
    for step in range(10):
        matrix = spd(10.0, seed=step) @ torch.diag(torch.linspace(0.5, 1.0, SIZE))  # A and g change, as along a run
        g = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        v = v - rho * (matrix.T @ v - g)
        solution, A = solve(System(matrix, symmetric=False), g, WarmStart(Neumann(terms=0, step_size=rho)), state)
        torch.testing.assert_close(solution.value, v, rtol=1e-12, atol=1e-12)
        assert solution.products == A.products(()) == (1 if step else 0)
        is_large = (
            bool(step) and left(matrix.T, g, state["solution"]) > 1
        )  # of the start, whose residual is the one that is known
        assert solution.status is (Status.LARGE_RESIDUAL if is_large else Status.FINISHED), solution.detail
        state = solution.state


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    "inner",
    [
        CG(terms=3),
        MINRES(terms=3),
        GMRES(terms=3),
        Neumann(terms=3),
        Chebyshev(terms=3),
        Identity(),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_a_warm_start_solves_for_what_the_last_solution_left(inner: Solver, lead: tuple[int, ...]) -> None:
    case = SYSTEMS["spd"]
    g = case.sides(lead)
    cold, A = solve(case, g, WarmStart(inner))
    bare, _ = solve(case, g, inner)
    assert torch.equal(cold.value, bare.value)
    assert cold.products == bare.products == A.products(lead)
    torch.testing.assert_close(cold.state, {"solution": cold.value, **bare.state})

    h = g + 0.1 * g.flip(-1)
    warm, A = solve(case, h, WarmStart(inner), cold.state)
    start = cold.value
    rest, _ = solve(case, h - start @ case.matrix, inner, bare.state)
    torch.testing.assert_close(warm.value, start + rest.value, rtol=1e-10, atol=1e-12)
    assert warm.products == 1 + rest.products == A.products(lead)
    assert warm.step_size == rest.step_size
    ratio = left(case, h, start)
    torch.testing.assert_close(warm.residuals, torch.cat([ratio[None], ratio * rest.residuals]), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(warm.state, {"solution": warm.value, **rest.state})


def test_repeated_warm_starts_converge_where_the_inner_solver_alone_is_far_off() -> None:
    case = SYSTEMS["spd"]
    g, state = case.sides((3,)), None
    for _ in range(12):
        solution, _ = solve(case, g, WarmStart(Chebyshev(terms=4)), state)
        state = solution.state
    expected = dense(case.matrix, g)
    torch.testing.assert_close(solution.value, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inner", [CG(tolerance=1e-3), GMRES(tolerance=1e-3), Neumann(terms=200, tolerance=1e-3)])
def test_the_inner_tolerance_is_relative_to_the_right_hand_side(inner: Solver) -> None:
    case = SYSTEMS["spd"]
    g = case.sides((3,))
    exact = dense(case.matrix, g)
    near = {"solution": exact + 1e-2 * torch.randn(exact.shape)}
    warm, _ = solve(case, g, WarmStart(inner), near)
    assert warm.status is Status.CONVERGED
    assert left(case, g, warm.value).max() <= 1e-3
    assert warm.products <= 1 + solve(case, g, inner)[0].products // 2
    there, A = solve(case, g, WarmStart(inner), {"solution": exact})
    assert (there.status, there.products, A.products((3,))) == (Status.CONVERGED, 1, 1)
    torch.testing.assert_close(there.value, exact)


def test_a_state_of_another_shape_or_another_solver_is_ignored() -> None:
    case = SYSTEMS["spd"]
    three, _ = solve(case, case.sides((3,)), WarmStart(Neumann(terms=2)))
    one, A = solve(case, case.sides(()), WarmStart(Neumann(terms=2)), three.state)
    assert (one.products, A.products(())) == (4, 4)  # no start; two for the step, whose direction still fits
    for state in ({"solution": torch.ones(3)}, {"solution": torch.ones(SIZE).float()}, {"weight": torch.ones(3)}, {}):
        assert solve(case, case.sides(()), WarmStart(CG(terms=2)), state)[0].products == 2


def test_after_a_failure_nothing_is_carried() -> None:
    case = SYSTEMS["spd"]
    g = case.sides(())
    first, _ = solve(case, g, WarmStart(CG(terms=2)))
    failed, _ = solve(case, math.nan * g, WarmStart(CG(terms=2)), first.state)
    assert (failed.status, failed.state) == (Status.NON_FINITE_GRADIENT, {})
    for solver in (WarmStart(CG(terms=2)), WarmStart(Neumann(terms=0, step_size=0.1))):
        failed, _ = solve(System(torch.full((SIZE, SIZE), math.nan)), g, solver, first.state)
        assert (failed.status, failed.state) == (Status.NON_FINITE_PRODUCT, {})


@pytest.mark.parametrize("state", [None, {"solution": torch.ones(SIZE, dtype=torch.float64)}])
def test_a_diverged_inner_solve_is_passed_on_and_forgotten(state: Any) -> None:
    case = SYSTEMS["negative definite"]
    solution, _ = solve(case, case.sides(()), WarmStart(Neumann(terms=60)), state)
    assert (solution.status, solution.state) == (Status.CURVATURE_TOO_NEGATIVE, {})


def test_a_right_hand_side_that_has_become_zero_has_the_answer_zero() -> None:
    case = SYSTEMS["spd"]
    first, _ = solve(case, case.sides((2,)), WarmStart(CG(terms=2)))
    g = case.sides((2,)) * torch.tensor([[0.0], [1.0]])
    second, _ = solve(case, g, WarmStart(CG(terms=2)), first.state)
    assert second.value[0].abs().max() == 0
    assert second.residuals[:, 0].abs().max() == 0
    assert second.value[1].abs().min() > 0


def test_a_start_that_is_far_off_is_dropped_for_its_right_hand_side_alone() -> None:
    case = SYSTEMS["spd"]
    g = case.sides((2,))
    first, _ = solve(case, g, WarmStart(MINRES(terms=3, tolerance=0.0)))
    h = g * torch.tensor([[1e-3], [1.0]])
    second, _ = solve(case, h, WarmStart(MINRES(terms=3, tolerance=0.0)), first.state)
    fresh, _ = solve(case, h[0], MINRES(terms=3, tolerance=0.0))
    again, _ = solve(case, h[1] - first.value[1] @ case.matrix, MINRES(terms=3, tolerance=0.0))
    expected = torch.stack([fresh.value, first.value[1] + again.value])
    torch.testing.assert_close(second.value, expected, rtol=1e-9, atol=1e-12)
    assert second.status is Status.GROWING
    assert "dropped" in second.detail
    assert second.residuals[0, 0] > 10


def test_steps_of_soba_along_negative_curvature_are_named_before_they_run_away() -> None:
    case, state, seen = System(torch.diag(torch.tensor([-1.0] + [0.5] * (SIZE - 1)))), None, []
    for _ in range(60):
        solution, _ = solve(case, torch.ones(SIZE), WarmStart(Neumann(terms=0, step_size=0.5)), state)
        state = solution.state
        seen.append(solution.status)
        assert solution.residuals.numel() == 0 or solution.residuals[0] < 20
        assert solution.value.norm() < 100
    assert Status.NEGATIVE_CURVATURE in seen


# Along a negative curvature, where to stop early is what regularises ------------------------------------------------------

DOWNWARD = torch.diag(torch.tensor([-0.02] + [0.5] * (SIZE - 1), dtype=torch.float64))
EARLY: list[Solver] = [
    Neumann(terms=20, step_size=1.0),
    Neumann(terms=5),
    Chebyshev(terms=5, interval=(0.1, 1.0)),
    Chebyshev(terms=5),
    CG(terms=5),
    MINRES(terms=2),
    GMRES(terms=2),
]


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("solver", EARLY, ids=str)
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_thirty_warm_starts_along_a_negative_curvature_stay_where_one_solve_is(
    solver: Solver, share: float, lead: tuple[int, ...]
) -> None:
    """Carried on without a look they went from 10 to 485."""
    g = torch.ones(*lead, SIZE)
    g[..., 0] *= share
    alone, _ = solve(DOWNWARD, g, solver)
    state, lengths = None, []
    for _ in range(30):
        solution, _ = solve(DOWNWARD, g, WarmStart(solver), state)
        assert solution.status.ok
        state = solution.state
        lengths.append(solution.value.norm())
    assert max(lengths) <= 5 * alone.value.norm()


@pytest.mark.parametrize("solver", [CG(terms=5), MINRES(terms=5), Neumann(terms=20), Chebyshev(terms=10)], ids=str)
def test_a_negative_curvature_hidden_among_many_small_ones_does_not_run_away(solver: Solver) -> None:
    """CG walks far along what curves hardly at all: without a bound on its answers it went from 900 to a million."""
    eigenvalues = torch.cat([torch.tensor([-0.02]), torch.logspace(0, -3, 199)])
    A = Symmetric(lambda v: eigenvalues * v, like=eigenvalues)
    g, state = torch.randn(200), None
    g[0] = 0.1
    lengths, of_the_rest = [], (g / eigenvalues)[1:].norm()
    for _ in range(60):
        solution = WarmStart(solver).solve(A, g * (1 + 0.3 * torch.randn(200)), state)
        state = solution.state
        lengths.append(solution.value.norm())
    assert max(lengths) < 2 * of_the_rest


@pytest.mark.parametrize("solver", [SOBA(step_size=0.5), WarmStart(Neumann(terms=0, step_size=0.5)), WarmStart(Identity())])
def test_single_steps_along_a_negative_curvature_begin_again(solver: Solver) -> None:
    state, seen, lengths = None, [], []
    for _ in range(400):
        solution, _ = solve(DOWNWARD, torch.ones(SIZE), solver, state)
        state = solution.state
        seen.append(solution.status)
        lengths.append(float(solution.value[0].abs()))
    assert Status.NEGATIVE_CURVATURE in seen
    assert max(lengths) < 2 * 20**0.5 / 0.02**0.5  # where x₀ᵀAx₀ = 0 with x = 2 along the others


@pytest.mark.parametrize(
    "solver", [MINRES(terms=2), CG(terms=2), GMRES(terms=2), Neumann(terms=10), Chebyshev(terms=4)], ids=str
)
def test_on_a_definite_curvature_warm_starts_go_on_to_the_solution(solver: Solver) -> None:
    matrix = spd(100.0)
    g, state = torch.randn(SIZE), None
    for _ in range(100):
        solution, _ = solve(matrix, g, WarmStart(solver), state)
        state = solution.state
        is_large = left(matrix, g, solution.value) > 1  # as after the first two terms of CG
        assert solution.status is Status.LARGE_RESIDUAL if is_large else solution.status.kind == "ok"
    assert left(matrix, g, solution.value) < 1e-3


def test_a_negative_start_is_dropped_for_its_right_hand_side_alone() -> None:
    g = torch.stack([torch.ones(SIZE), torch.ones(SIZE)])
    last = torch.stack([torch.eye(SIZE)[0], torch.eye(SIZE)[1]])
    solver = Neumann(terms=0, step_size=0.5)
    solution, _ = solve(DOWNWARD, g, WarmStart(solver), {"solution": last})
    torch.testing.assert_close(solution.value, torch.stack([0.5 * g[0], last[1] + 0.5 * (g[1] - DOWNWARD @ last[1])]))
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert solution.negative_curvature
    assert "along which the curvature is -0.02" in solution.detail


@pytest.mark.parametrize(("curvature", "size"), [(1e-3, 1.0), (1e-3, 100.0), (0.1, 0.1)])
def test_a_step_that_leaves_much_more_than_the_start_is_not_taken(curvature: float, size: float) -> None:
    """CG, of a rest that curves hardly at all: its step leaves 500 times the rest, or 5 times a rest as long as g."""
    matrix = torch.diag(torch.tensor([curvature, *[1.0] * (SIZE - 1)]))
    matrix[0, 1] = matrix[1, 0] = 0.5  # an eigenvalue below zero, that the first direction of the rest does not see
    start, rest = size * torch.ones(SIZE), torch.eye(SIZE)[0]
    g, other = matrix @ start + rest, matrix @ start + torch.eye(SIZE)[2]
    sides, state = torch.stack([g, other, rest]), {"solution": torch.stack([start, start, 100 * start])}
    solution, A = solve(matrix, sides, WarmStart(CG(terms=1)), state)
    fresh = solve(matrix, rest, CG(terms=1))[0]  # what the inner solver does from zero is taken
    torch.testing.assert_close(solution.value, torch.stack([start, start + torch.eye(SIZE)[2], fresh.value]))
    torch.testing.assert_close(solution.residuals[-1, :2], left(matrix, sides[:2], solution.value[:2]))
    assert solution.status is Status.LARGE_RESIDUAL
    assert solution.products == A.products((3,)) == 2


@pytest.mark.parametrize("solver", [Nystrom(rank=3), Nystrom(rank=3, rho=0.5)])
def test_nystrom_is_not_started_warm_since_that_would_undo_its_rho(solver: Solver) -> None:
    with pytest.raises(
        TypeError, match=r"Nystrom\(rank=3, rho=.*: repeated warm starts would solve the system without its rho"
    ):
        WarmStart(solver)


# In the scale of a preconditioner ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", LEADS)
def test_what_is_carried_is_the_solution_though_the_scale_changes(lead: tuple[int, ...]) -> None:
    """A carried y = S⁻¹x, taken for the next scale, left a solved system with a residual of 9."""
    case, solver = SYSTEMS["spd"], WarmStart(CG(terms=30, tolerance=1e-8))
    A, g = Dense(case.matrix), case.sides(lead)
    first = solve_scaled(solver, A, g, torch.linspace(0.2, 5.0, SIZE))
    torch.testing.assert_close(first.value, dense(case.matrix, g), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first.state["solution"], first.value)
    second = solve_scaled(solver, A, g, torch.linspace(4.0, 0.1, SIZE), first.state)
    assert second.converged
    assert second.residuals[0].max() < 1e-6
    torch.testing.assert_close(second.state["solution"], second.value)
    torch.testing.assert_close(second.value, dense(case.matrix, g), rtol=1e-6, atol=1e-6)


def test_the_direction_and_a_misfit_are_handed_on_as_they_are() -> None:
    case, scale = SYSTEMS["spd"], torch.linspace(0.5, 2.0, SIZE)
    solver = WarmStart(Neumann(terms=2))
    first = solve_scaled(solver, Dense(case.matrix), case.sides(), scale)
    A = Dense(case.matrix)
    second = solve_scaled(solver, A, case.sides((3,)), scale, first.state)
    assert second.products == A.products((3,)) == 4  # two for the step, whose direction fits; no start
    assert first.state["direction"].shape == second.state["direction"].shape == (SIZE,)


class Growing(Preconditioner):
    """A diagonal that is another one at each call."""

    calls = 0

    def __call__(self, A: Operator, *_: Any) -> Tensor:
        Growing.calls += 1
        return torch.linspace(0.1, 10.0**Growing.calls, A.size)


def test_a_hypergradient_goes_on_from_the_last_solution_though_its_preconditioner_has_changed() -> None:
    method = Implicit(
        WarmStart(CG(terms=100, tolerance=1e-8)), curvature=GaussNewton(), preconditioner=Growing(), damping=0.2
    )
    problem = tiny()
    first = method(problem, BATCHES[0], VAL)
    second = method(problem, BATCHES[0], VAL, first.solution.state)
    assert second.solution.residuals[0] < 1e-4
    assert second.solution.products < first.solution.products // 2
    torch.testing.assert_close(second.grads["decay"], first.grads["decay"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("solver", ["CG", CG, WarmStart(CG()), SOBA(step_size=0.1)])
def test_what_cannot_be_started_is_an_error(solver: Any) -> None:
    with pytest.raises(TypeError, match="give a solver to start"):
        WarmStart(solver)
