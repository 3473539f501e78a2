from __future__ import annotations

import pytest
import torch
from cases import OPERATORS, SIZE, Counted, flat, like, unflat, with_spectrum

from hoptim.spectral import spectral_norm, start_vector


def top(matrix: torch.Tensor) -> float:
    return torch.linalg.eigvalsh(matrix).abs().max().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OPERATORS)
def test_estimate_comes_from_below_and_close(name: str, seed: int) -> None:
    A = Counted(OPERATORS[name]())
    start = unflat(torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)), A.like)
    estimate, v = spectral_norm(A, start, products=10)
    assert 0.7 * top(A.matrix) <= estimate <= top(A.matrix) * (1 + 1e-12)
    assert A.calls == 10
    assert flat(v).norm().item() == pytest.approx(1.0 if top(A.matrix) else 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_many_products_give_the_largest_magnitude_and_its_vector(sign: float) -> None:
    A = Counted(sign * with_spectrum([3.0, *torch.linspace(-1, 1, SIZE - 1).tolist()]))
    estimate, v = spectral_norm(A, unflat(torch.ones(SIZE), A.like), products=60)
    assert estimate.item() == pytest.approx(3.0, rel=1e-10)
    torch.testing.assert_close(A.matrix @ flat(v), sign * 3.0 * flat(v), rtol=1e-8, atol=1e-8)


def test_carried_vector_goes_on_where_it_stopped() -> None:
    A = Counted(OPERATORS["spd"]())
    start = unflat(torch.ones(SIZE), A.like)
    whole, _ = spectral_norm(A, start, products=12)
    _, v = spectral_norm(A, start, products=10)
    rest, _ = spectral_norm(A, v, products=2)
    assert rest.item() == pytest.approx(whole.item(), rel=1e-12)


def test_start_is_the_same_each_time_and_leans_towards_the_direction_given() -> None:
    direction = torch.eye(SIZE)[0]
    state = torch.get_rng_state()
    first, second = (flat(start_vector(like(), unflat(1e6 * direction, like()))) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first - direction).norm().item() == pytest.approx(1.0)
    assert (first[1:] != 0).all()


def test_start_without_a_direction_is_not_zero() -> None:
    assert flat(start_vector(like(), like())).norm().item() == pytest.approx(1.0)
