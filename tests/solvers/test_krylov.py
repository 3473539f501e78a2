"""What CG and MINRES do where the curvature is negative, flat, or has few eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import with_spectrum
from systems import F64, solve
from torch import Tensor

from hoptim import CG, MINRES, Status

G = torch.linspace(-1, 2, 6, dtype=F64)
ONES = torch.ones(6, dtype=F64)
ONE_NEGATIVE = torch.tensor([-1.0, 2.0, 3.0, 5.0, 8.0, 13.0], dtype=F64)


def symmetric(*eigenvalues: float, seed: int = 0) -> Tensor:
    return with_spectrum(torch.tensor(eigenvalues, dtype=F64), seed)


def test_minres_solves_a_consistent_singular_system_with_the_least_x() -> None:
    H = symmetric(0.0, 1.0, 2.0, 4.0, -3.0, 6.0, seed=2)
    g = H @ ONES
    solution, _ = solve(H, g, MINRES(terms=5, tolerance=1e-12))
    torch.testing.assert_close(solution.value, torch.linalg.pinv(H, atol=1e-9) @ g, rtol=1e-8, atol=1e-9)


def test_minres_names_negative_curvature_by_its_sign_alone() -> None:
    for seed in range(5):
        rest = (1.0, 2.0, 3.0, 4.0, 9.0)
        assert solve(symmetric(0.1, *rest, seed=seed), G, MINRES(terms=6))[0].status.kind == "ok"
        assert solve(symmetric(-0.1, *rest, seed=seed), G, MINRES(terms=6))[0].status is Status.NEGATIVE_CURVATURE


@pytest.mark.parametrize("kind", [CG, MINRES])
def test_it_stops_at_the_tolerance(kind: Any) -> None:
    H = symmetric(1.0, 1.0, 1.0, 2.0, 2.0, 2.0)
    solution, _ = solve(H, G, kind(terms=100))
    assert (solution.products, solution.status, solution.converged) == (3, Status.CONVERGED, True)


def test_an_ill_conditioned_system_converges() -> None:
    H = symmetric(*(10.0**k for k in range(-3, 3)))
    solution, _ = solve(H, ONES, CG(terms=200, tolerance=1e-10))
    assert solution.status is Status.CONVERGED
    assert (H @ solution.value - ONES).norm() / ONES.norm() < 1e-8


def test_negative_curvature_gives_the_iterate_before_that_direction() -> None:
    H = with_spectrum(ONE_NEGATIVE, 3)
    g = H @ ONES
    solution, _ = solve(H, g, CG(terms=50, tolerance=0.0))
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert not solution.converged
    stop = int((solution.residuals[1:] == solution.residuals[:-1]).nonzero()[0]) + 1
    before, _ = solve(H, g, CG(terms=stop, tolerance=0.0))
    assert before.status is Status.FINISHED
    assert torch.equal(solution.value, before.value)
    assert "curvature -" in solution.detail


@pytest.mark.parametrize("sides", [G, torch.stack([G, G.flip(0)])])
def test_a_first_direction_that_curves_downward_is_scaled_by_its_curvature(sides: Tensor) -> None:
    solution, _ = solve(symmetric(*[-4.0] * 6), sides, CG())
    torch.testing.assert_close(solution.value, sides / 4)
    assert (solution.status, solution.status.ok) == (Status.NEGATIVE_CURVATURE, True)


@pytest.mark.parametrize("kind", [CG, MINRES])
def test_each_of_several_stops_for_itself_though_one_meets_negative_curvature(kind: Any) -> None:
    H = with_spectrum(ONE_NEGATIVE, 3)
    values, vectors = torch.linalg.eigh(H)
    sides = torch.stack([vectors[:, 0], vectors[:, 1] + vectors[:, 2], H @ ONES, 0 * ONES])
    together, _ = solve(H, sides, kind(terms=12, tolerance=1e-10))
    alone = [solve(H, g, kind(terms=12, tolerance=1e-10))[0].value for g in sides]
    torch.testing.assert_close(together.value, torch.stack(alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[1], vectors[:, 1] / values[1] + vectors[:, 2] / values[2], rtol=1e-8, atol=1e-10)


def test_a_first_direction_without_a_sign_is_not_flat() -> None:
    """gᵀAg = 0 though Ag is not: CG has nothing to go by, MINRES has."""
    H, g = torch.diag(torch.tensor([1.0, -1.0, 2.0, 2.0, 2.0, 2.0], dtype=F64)), torch.eye(6, dtype=F64)[:2].sum(0)
    assert solve(H, g, CG())[0].status is Status.NO_CURVATURE
    for terms in (1, 6):
        assert solve(H, g, MINRES(terms=terms))[0].status.ok
