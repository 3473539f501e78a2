"""One true vocabulary: how many terms, why a solve stopped, how good its answer is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from cases import SIZE, with_spectrum
from systems import F64, LEADS, SYSTEMS, Dense, System, left, solve
from torch import Tensor

from hoptim import CG, GMRES, MINRES, SOBA, Chebyshev, Identity, Neumann, Nystrom, Solver, Status, WarmStart
from hoptim.solvers.monitor import Monitor

FINISHED, LARGE, STOPPED = Status.FINISHED, Status.LARGE_RESIDUAL, Status.FLAT_DIRECTIONS


def log(low: float, high: float, count: int) -> Tensor:
    """10^low, …, 10^high."""
    return torch.logspace(low, high, count, dtype=F64)


def side(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


# MINRES in float32 -----------------------------------------------------------------------------------------------------

WIDE = {  # and how many terms float32 can still be taken at its word
    "from 1 to 1e-7": (log(0, -7, 200), 100),
    "of both signs": (log(0, -7, 200) * torch.tensor([1.0, -1.0]).repeat(100), 400),
    "as of a PINN": (torch.cat([log(4, 1, 20), log(1, -3, 100), -log(0, -3, 40)]), 150),
    "some large ones": (torch.cat([log(3, 0, 5), log(-1, -3, 195)]), 12),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WIDE)
def test_minres_in_float32_goes_on_while_products_help(name: str, seed: int) -> None:
    values, terms = WIDE[name]
    matrix, g = with_spectrum(values), side(len(values), seed)
    single, _ = solve(matrix.float(), g.float(), MINRES(terms=terms))
    double, _ = solve(matrix, g, MINRES(terms=terms))
    theirs = scipy.sparse.linalg.minres(matrix.float().numpy(), g.float().numpy(), rtol=0.0, maxiter=terms)[0]
    true = left(matrix, g, single.value.double()).item()
    assert len(single.residuals) == len(double.residuals) == terms
    assert single.status in (FINISHED, Status.NEGATIVE_CURVATURE)
    assert single.residuals[-1].item() == pytest.approx(true, rel=0.1)
    assert true < 1.6 * left(matrix, g, double.value).item()
    assert true < 1.1 * np.linalg.norm(g.numpy() - matrix.numpy() @ theirs.astype(float)) / g.norm().item()


SINGULAR = {
    "well-conditioned": torch.cat([torch.zeros(20), torch.linspace(0.1, 1, 180, dtype=F64)]),
    "ill-conditioned": torch.cat([torch.zeros(100), log(0, -3, 100)]),
    "five eigenvalues": torch.cat([torch.zeros(100), torch.tensor([1.0, 0.5, 0.25, 0.1, 0.3], dtype=F64).repeat(20)]),
    "one": torch.cat([torch.zeros(1), log(0, -2, 40)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SINGULAR)
def test_minres_stops_at_the_least_residual_of_a_system_without_a_solution(name: str, seed: int, dtype: torch.dtype) -> None:
    """Where g is not in the range, rounding would take x to 1e6 times its length in 400 terms of float32."""
    matrix, g = with_spectrum(SINGULAR[name].to(F64)), side(len(SINGULAR[name]), seed)
    inverse = torch.linalg.pinv(matrix, hermitian=True, atol=1e-9)
    range_of = matrix @ inverse
    solution, A = solve(matrix.to(dtype), g.to(dtype), MINRES(terms=400))
    x = solution.value.double()
    least = (g - range_of @ g).norm() / g.norm()
    assert solution.status is STOPPED, solution.detail
    assert len(solution.residuals) < 200
    assert solution.products == A.products()
    assert left(matrix, g, x).item() == pytest.approx(least.item(), rel=1e-3)
    assert (range_of @ x - inverse @ g).norm() < 0.05 * (inverse @ g).norm()
    assert x.norm() < 30 * (inverse @ g).norm()


@pytest.mark.parametrize("seed", range(3))
def test_minres_says_by_how_much_rounding_has_taken_its_residual_from_the_true_one(seed: int) -> None:
    """In float32 and over many terms the tracked residual falls to 4e-5 while the true one stays at 2e-3."""
    matrix, g = with_spectrum(log(0, -4, 200)), side(200, seed)
    solution, A = solve(matrix.float(), g.float(), MINRES(terms=400))
    true = left(matrix, g, solution.value.double()).item()
    assert solution.status is Status.INEXACT
    assert solution.products == A.products() == 401
    assert true > 1e-3
    assert solution.residuals[-1].item() == pytest.approx(true, rel=0.05)
    assert solution.detail.startswith(f"400 of 400 terms, a residual of {solution.residuals[-1].item():.3g}, recorded as ")
    assert float(solution.detail.split()[-1]) < 0.1 * true


@pytest.mark.parametrize(("true", "status"), [(0.8, FINISHED), (1.2, LARGE), (2.5, Status.INEXACT)])
def test_a_residual_that_rounding_may_have_moved_is_checked_by_a_product(true: float, status: Status) -> None:
    """Of A = I, where x = (1 + r) g leaves r times g."""
    A, g = Dense(torch.eye(SIZE, dtype=F64)), torch.ones(SIZE, dtype=F64)
    monitor = Monitor(A, g, terms=1, tolerance=1e-5)
    monitor.record_residual(0.9 * monitor.g_norm)
    monitor.drift = torch.ones((), dtype=F64)
    solution = monitor.finish((1 + true) * g)
    assert (solution.status, solution.products, solution.converged) == (status, 2, False)
    assert solution.residuals.tolist() == pytest.approx([true])


# One vocabulary --------------------------------------------------------------------------------------------------------

EVERY: dict[str, tuple[Solver, int]] = {  # and its terms
    **{f"{kind.__name__} {n}": (kind(terms=n), n) for kind in (CG, MINRES, GMRES) for n in (1, 3, 30)},
    **{
        f"{kind.__name__} {n}, no tolerance": (kind(terms=n, tolerance=0.0), n)
        for kind in (CG, MINRES, GMRES)
        for n in (3, 30)
    },
    "Chebyshev": (Chebyshev(terms=8), 8),
    "Neumann": (Neumann(terms=8), 8),
    "Neumann, tolerance": (Neumann(terms=300, tolerance=1e-2), 300),
    "Nystrom": (Nystrom(rank=3), 1),
    "WarmStart": (WarmStart(CG(terms=2)), 3),
    "WarmStart, MINRES": (WarmStart(MINRES(terms=30)), 31),
    "SOBA": (SOBA(step_size=0.3), 1),
}
GRAVER = ("INEXACT", "NEGATIVE_CURVATURE", "GROWING")


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("system", [name for name, case in SYSTEMS.items() if case.symmetric])
def test_each_status_says_what_is_so(system: str, name: str, lead: tuple[int, ...]) -> None:
    case, (solver, terms) = SYSTEMS[system], EVERY[name]
    g, state = case.sides(lead), None
    for _ in range(3):  # the later ones are of use to WarmStart and SOBA
        solution, _ = solve(case, g, solver, state)
        state = solution.state
        if not solution.status.ok or not len(solution.residuals):
            continue
        true = left(case, g, solution.value).max().item()
        last = solution.residuals[-1].max().item()
        if solution.status is FINISHED:
            assert len(solution.residuals) == terms or name.startswith("WarmStart"), solution.detail
        if solution.status is STOPPED:
            assert len(solution.residuals) < terms
            assert true > (1e-5 if "no tolerance" not in name else 1e-15)
        if solution.status.name not in GRAVER:
            assert (solution.status is LARGE) == (last > 1), (solution.status, last)
        if solution.converged:
            assert true <= 2.1 * (getattr(solver, "tolerance", 0.0) or 1e-5)
        if not name.startswith(("WarmStart", "SOBA")):
            assert f"residual {last:.3g}" in solution.detail or f"residual of {last:.3g}" in solution.detail, solution.detail
        if not name.startswith("Neumann") and "dropped" not in solution.detail:
            assert last == pytest.approx(true, rel=1e-5, abs=1e-7)


def test_a_start_from_zero_of_the_first_solve_is_counted() -> None:
    solution, _ = solve(SYSTEMS["spd"], SYSTEMS["spd"].sides(), MINRES(terms=3))
    residual = solution.residuals[-1].item()
    assert (solution.status, solution.detail) == (FINISHED, f"3 of 3 terms, residual {residual:.3g}")
    assert "wrong" not in FINISHED.message
    assert "sane" not in FINISHED.message


def plane(ratio: float) -> tuple[Tensor, Tensor]:
    """A and g for which the residual of CG's first term is √((ratio + 1/ratio − 2) / 4): 1 at 3 + 2√2 = 5.83."""
    return torch.diag(torch.tensor([1.0, ratio], dtype=F64)), torch.tensor([1.0, ratio**-0.5], dtype=F64)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("ratio", "status"), [(5.82, FINISHED), (5.84, LARGE), (50.0, LARGE), (2.0, FINISHED)])
def test_a_residual_above_one_is_large_and_one_below_is_not(ratio: float, status: Status, lead: tuple[int, ...]) -> None:
    matrix, g = plane(ratio)
    solution, _ = solve(System(matrix), g.expand(*lead, 2).clone(), CG(terms=1))
    expected = math.sqrt((ratio + 1 / ratio - 2) / 4)
    torch.testing.assert_close(solution.residuals[-1], torch.full(lead, expected, dtype=F64))
    assert solution.status is status
    assert (expected > 1) == (status is LARGE)
    assert f"1 of 1 terms, residual {expected:.3g}" in solution.detail


@pytest.mark.parametrize("solver", [SOBA(step_size=0.1), WarmStart(Neumann(terms=0, step_size=0.1))])
@pytest.mark.parametrize(("residual", "status"), [(0.99, FINISHED), (1.01, LARGE), (2.5, LARGE)])
def test_a_start_whose_residual_is_above_one_is_large(solver: Solver, residual: float, status: Status) -> None:
    g = torch.ones(SIZE, dtype=F64)
    start = (1 + residual) * g  # of A = I, the residual is g − x
    assert solve(torch.eye(SIZE, dtype=F64), g, solver, {"solution": start})[0].status is status


@pytest.mark.parametrize(("size", "status"), [(0.3, FINISHED), (1.2, LARGE)])
def test_a_warm_step_that_leaves_more_than_the_start_is_large_if_it_leaves_more_than_zero_does(
    size: float, status: Status
) -> None:
    """The step of CG leaves 1.73 times the rest of the start, which is a part of g, or twice as long."""
    matrix, rest = plane(14.0)
    g = 1 / size * rest.norm() * torch.tensor([1.0, 0.0], dtype=F64)
    start = torch.linalg.solve(matrix, g - rest)
    solution, _ = solve(System(matrix), g, WarmStart(CG(terms=1)), {"solution": start})
    true = left(System(matrix), g, solution.value).item()
    assert solution.residuals.tolist() == pytest.approx([size, true])
    assert true == pytest.approx(size * math.sqrt((14 + 1 / 14 - 2) / 4))
    assert solution.status is status
    assert f"the start has a residual of {size:.3g}; of the rest: 1 of 1 terms, residual 1.74" in solution.detail


def test_nystrom_has_a_large_residual_where_zero_is_better_and_only_there() -> None:
    found = set()
    for rho in torch.linspace(0.3, 0.7, 81, dtype=F64).tolist():
        solution, _ = solve(torch.eye(SIZE, dtype=F64), torch.ones(SIZE, dtype=F64), Nystrom(rank=4, rho=rho))
        residual = solution.residuals[-1].item()
        assert solution.status is (LARGE if residual > 1 else FINISHED)
        assert solution.detail.startswith(f"rank 4, residual {residual:.3g}")
        found |= {solution.status} if abs(residual - 1) < 0.05 else set()
    assert found == {LARGE, FINISHED}


def test_neumann_fails_at_ten_times_and_no_sooner() -> None:
    """Of A = I the vectors grow by |1 − α| = 3 a term: 9 after two, 27 after three."""
    eye, g = torch.eye(SIZE, dtype=F64), torch.ones(SIZE, dtype=F64)
    two, three = (solve(eye, g, Neumann(terms=terms, step_size=4.0))[0] for terms in (2, 3))
    assert (two.status, three.status) == (Status.GROWING, Status.STEP_TOO_LARGE)
    assert two.residuals[-1].item() == pytest.approx(9.0)
    assert "2 of 2 terms, before the last of which, residual 9" in two.detail


def test_what_takes_no_product_claims_no_residual() -> None:
    for solver in (Identity(), Neumann(terms=0, step_size=0.1)):
        solution: Any = solve(SYSTEMS["spd"], SYSTEMS["spd"].sides(), solver)[0]
        assert (solution.status, len(solution.residuals), solution.products) == (FINISHED, 0, 0)
        assert "residual" not in solution.detail
