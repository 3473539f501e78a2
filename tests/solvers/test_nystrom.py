"""The Nyström solver against its formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import SIZE, with_spectrum
from systems import LEADS, SYSTEMS, System, between, dense, left, solve, spectrum
from torch import Tensor

from hoptim import Nystrom, Status


def nystrom(M: Tensor, g: Tensor, rank: int, rho: float, seed: int = 0) -> Tensor:
    """(A_k + ρI)⁻¹ g from the formula, with pinv, over the span of the same draw in the basis that it comes in."""
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(rank, SIZE, generator=generator, dtype=M.dtype).T
    image = M @ omega
    return torch.linalg.solve(
        image @ torch.linalg.pinv(omega.T @ image) @ image.T + rho * torch.eye(SIZE), g.reshape(-1, SIZE).T
    ).T.reshape(g.shape)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("rank", [1, 4, 8])
@pytest.mark.parametrize("system", ["spd", "ill-conditioned", "singular, inconsistent"])
def test_nystrom_is_the_formula(system: str, rank: int, lead: tuple[int, ...]) -> None:
    case = SYSTEMS[system]
    g = case.sides(lead)
    solution, A = solve(case, g, Nystrom(rank=rank, rho=0.3))
    expected = nystrom(case.matrix, g, rank, 0.3)
    torch.testing.assert_close(solution.value, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(solution.residuals, left(case, g, expected)[None], rtol=1e-7, atol=1e-9)
    damped = left(replace(case, matrix=case.matrix + 0.3 * torch.eye(SIZE)), g, expected).max()
    assert f"= {damped:.3g}" in solution.detail
    assert (A.given[0], len(A.given), solution.products) == ((rank,), 2, rank + 1)


@pytest.mark.parametrize("rank", [SIZE, 50])
@pytest.mark.parametrize("system", ["spd", "ill-conditioned", "singular, consistent"])
def test_nystrom_of_full_rank_is_the_damped_inverse(system: str, rank: int) -> None:
    case = SYSTEMS[system]
    g = case.sides((3,))
    solution, A = solve(case, g, Nystrom(rank=rank, rho=1e-3))
    expected = dense(case.matrix + 1e-3 * torch.eye(SIZE), g)
    assert (solution.value - expected).norm() <= 1e-10 * expected.norm()
    assert solution.products == A.products((3,)) == SIZE + 1


def test_nystrom_of_an_indefinite_operator_uses_the_positive_part() -> None:
    case = SYSTEMS["indefinite"]
    values, vectors = torch.linalg.eigh(case.matrix)
    g = case.sides(())
    solution, _ = solve(case, g, Nystrom(rank=SIZE, rho=0.1))
    positive = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T + 0.1 * torch.eye(SIZE)
    torch.testing.assert_close(solution.value, torch.linalg.solve(positive, g), rtol=1e-9, atol=1e-9)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert "met a curvature of -0.97" in solution.detail


def test_nystrom_wastes_no_direction_on_dead_units_and_leaves_the_generator_alone() -> None:
    values = torch.tensor([0.0] * (SIZE - 3) + [1.0, 2.0, 3.0])
    case, g = System(torch.diag(values)), torch.ones(SIZE)
    state = torch.get_rng_state()
    solution, _ = solve(case, g, Nystrom(rank=3, rho=0.5))
    torch.testing.assert_close(solution.value, 1 / (values + 0.5), rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


def test_nystrom_in_float32_loses_little_where_curvature_is_far_above_rho() -> None:
    values = torch.logspace(3, -5, SIZE)
    matrix = with_spectrum(values)
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    single, _ = solve(System(matrix.float()), g.float(), Nystrom(rank=SIZE, rho=0.01))
    expected = torch.linalg.solve(matrix + 0.01 * torch.eye(SIZE), g)
    assert single.value.dtype == torch.float32
    assert (single.value - expected).norm() < 0.02 * expected.norm()


def test_nystrom_in_float32_takes_no_rounding_for_curvature() -> None:
    for seed in range(30):
        matrix = spectrum(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, between(0.5, 1.0, SIZE - 6), seed=seed)
        g = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        single, _ = solve(System(matrix.float()), g.float(), Nystrom(rank=SIZE, rho=1e-4))
        expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(SIZE), g)
        assert (single.value - expected).norm() < 0.01 * expected.norm()
        assert single.status is Status.FINISHED


def test_a_rank_too_low_for_rho_is_a_remark() -> None:
    solution, _ = solve(SYSTEMS["spd"], SYSTEMS["spd"].sides(()), Nystrom(rank=1, rho=0.01))
    assert solution.status is Status.LARGE_RESIDUAL
    assert solution.status.ok
