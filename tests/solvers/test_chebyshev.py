"""Chebyshev semi-iteration: the interval that it chooses, and what happens outside."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SIZE, with_spectrum
from systems import SYSTEMS, System, between, chosen_interval, solve, spectrum

from hoptim import Chebyshev, Status

FINISHED, GROWING, TOO_LARGE = Status.FINISHED, Status.GROWING, Status.STEP_TOO_LARGE


@pytest.mark.parametrize("terms", [1, 2, 5, 20, 50])
def test_the_default_ratio_is_the_longest_interval_that_keeps_its_promise(terms: int) -> None:
    """Over [b/ratio, b] the residual is at most 1/cosh 4 = 3.7 %, and reaches it at both ends."""
    case = System(torch.diag(torch.linspace(0.01, 1.0, SIZE)))
    solution, _ = solve(case, torch.ones(SIZE), Chebyshev(terms=terms))
    a, b = chosen_interval(case.matrix, terms, torch.ones(SIZE))
    ends = System(torch.diag(torch.linspace(a, b, SIZE)))
    residual = solve(ends, torch.eye(SIZE), Chebyshev(terms=terms, interval=(a, b)))[0].residuals[-1]
    assert residual.max().item() == pytest.approx(1 / math.cosh(4), rel=1e-9)
    assert residual[[0, -1]].tolist() == pytest.approx([1 / math.cosh(4)] * 2, rel=1e-9)
    assert f"[{a:.3g}, {b:.3g}]" in solution.detail
    assert terms < 5 or b / a == pytest.approx((terms / 2) ** 2, rel=0.15)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spectrum", ["logarithmic", "linear", "semicircle"])
def test_a_chosen_interval_never_grows_on_a_nonnegative_spectrum(spectrum: str, dtype: torch.dtype, seed: int) -> None:
    values = {
        "logarithmic": torch.logspace(0, -6, SIZE),
        "linear": torch.linspace(0, 1, SIZE),
        "semicircle": (1 + torch.linspace(0, math.pi, SIZE).cos()) / 2,
    }[spectrum]
    case = System(37.0 * with_spectrum(values, seed).to(dtype))
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    solution, _ = solve(case, g, Chebyshev(terms=20))
    assert solution.status is FINISHED, solution.detail
    assert solution.residuals.max() <= 1 + 1e-5


def test_an_interval_too_short_is_named_and_a_chosen_one_is_chosen_again() -> None:
    case = System(torch.diag(torch.tensor([1000.0] + [1.0] * (SIZE - 1))))
    g = torch.ones(SIZE)
    short, _ = solve(case, g, Chebyshev(interval=(0.1, 2.0)))
    assert short.status is TOO_LARGE
    assert "on the interval [0.1, 2]" in short.detail
    for sides in (g, torch.stack([torch.eye(SIZE)[3], g])):
        blind = {"direction": torch.eye(SIZE)[1]}
        again, A = solve(case, sides, Chebyshev(), blind)
        assert again.status is FINISHED
        assert again.products == A.products(tuple(sides.shape[:-1])) > 30
        assert "1.2e+03]" in again.detail


def test_slightly_too_short_an_interval_is_a_remark() -> None:
    case = System(with_spectrum(torch.linspace(0.1, 1.0, SIZE)))
    solution, _ = solve(case, case.sides(()), Chebyshev(terms=20, interval=(0.01, 0.97)))
    assert solution.status is GROWING
    assert 1 < solution.residuals[-1] < 10


def test_chebyshev_carries_its_direction_as_neumann_does() -> None:
    case = SYSTEMS["spd"]
    first, _ = solve(case, case.sides(()), Chebyshev(terms=5))
    second, A = solve(case, case.sides(()), Chebyshev(terms=5), first.state)
    assert (first.products, second.products, A.products(())) == (15, 7, 7)
    assert list(first.state) == ["direction"]


def test_rounding_along_a_flat_direction_is_not_called_negative() -> None:
    """What is small beside the interval is rounding, though all that was met is as small."""
    signs = set()
    for seed in range(10):
        matrix = spectrum(0.0, 0.0, 0.0, between(0.5, 1.0, SIZE - 3), seed=seed)
        g = torch.linalg.eigh(matrix).eigenvectors[:, :3].sum(1).float()
        solution, A = solve(matrix.float(), g, Chebyshev(terms=3, interval=(0.05, 1.2)))
        signs.add(float(g @ (A @ g)) < 0)
        assert solution.status is FINISHED
        assert not solution.negative_curvature
    assert signs == {True, False}
