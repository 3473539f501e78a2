"""Power iteration and Lanczos against dense spectra."""

from __future__ import annotations

import pytest
import torch
from cases import OPERATORS, SIZE, Counted, with_spectrum
from systems import Dense

from hoptim.linalg.lanczos import lanczos, orthogonalise_, spectral_norm, start_vector
from hoptim.linalg.operators import Symmetric


def top(matrix: torch.Tensor) -> float:
    return torch.linalg.eigvalsh(matrix).abs().max().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OPERATORS)
def test_estimate_comes_from_below_and_close(name: str, seed: int) -> None:
    A = Counted(OPERATORS[name]())
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
    estimate, v = spectral_norm(A, start, products=10)
    assert 0.7 * top(A.matrix) <= estimate <= top(A.matrix) * (1 + 1e-12)
    assert A.calls == 10
    assert v.norm().item() == pytest.approx(1.0 if top(A.matrix) else 0.0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_many_products_give_the_largest_magnitude_and_its_vector(sign: float) -> None:
    A = Counted(sign * with_spectrum([3.0, *torch.linspace(-1, 1, SIZE - 1).tolist()]))
    estimate, v = spectral_norm(A, torch.ones(SIZE), products=60)
    assert estimate.item() == pytest.approx(3.0, rel=1e-10)
    torch.testing.assert_close(A.matrix @ v, sign * 3.0 * v, rtol=1e-8, atol=1e-8)


def test_carried_vector_goes_on_where_it_stopped() -> None:
    A = Counted(OPERATORS["spd"]())
    start = torch.ones(SIZE)
    whole, _ = spectral_norm(A, start, products=12)
    _, v = spectral_norm(A, start, products=10)
    rest, _ = spectral_norm(A, v, products=2)
    assert rest.item() == pytest.approx(whole.item(), rel=1e-12)


def test_start_is_the_same_each_time_and_leans_towards_the_direction_given() -> None:
    A, direction = Counted(torch.eye(SIZE)), torch.eye(SIZE)[0]
    state = torch.get_rng_state()
    first, second = (start_vector(A, 1e6 * direction) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert (first - direction).norm().item() == pytest.approx(1.0)
    assert (first[1:] != 0).all()


def test_start_without_a_direction_is_not_zero() -> None:
    assert start_vector(Counted(torch.eye(SIZE)), torch.zeros(SIZE)).norm().item() == pytest.approx(1.0)


# Lanczos


def dense_ritz(matrix: torch.Tensor, start: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues of A projected on the Krylov space, and the squared parts of the start along them."""
    columns = [start / start.norm()]
    for _ in range(steps - 1):
        w = matrix @ columns[-1]
        for v in columns * 2:
            w = w - (v @ w) * v
        columns.append(w / w.norm())
    K = torch.stack(columns, dim=1)
    values, vectors = torch.linalg.eigh(K.T @ matrix @ K)
    return values, vectors[0] ** 2


@pytest.mark.parametrize("steps", [1, 2, 5, SIZE])
@pytest.mark.parametrize("name", ["spd", "ill_conditioned", "indefinite"])
def test_ritz_values_are_those_of_the_krylov_space(name: str, steps: int) -> None:
    A = Counted(OPERATORS[name]())
    starts = A.gaussian(3)
    found = lanczos(A, starts, steps)
    assert A.calls == steps
    for row, values, weights in zip(starts, found.values, found.weights, strict=True):
        expected = dense_ritz(A.matrix, row, steps)
        torch.testing.assert_close(values, expected[0], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(weights, expected[1], rtol=1e-6, atol=1e-10)
    one = lanczos(A, starts[1], steps)
    torch.testing.assert_close(one.values, found.values[1], rtol=1e-9, atol=1e-11)
    assert one.weights.sum().item() == pytest.approx(1.0)
    ends = torch.linalg.eigvalsh(A.matrix)[[0, -1]].tolist()
    assert ends[0] - 1e-12 <= found.lowest <= found.highest <= ends[1] + 1e-12
    if steps == SIZE:
        assert (found.lowest, found.highest) == pytest.approx(ends, rel=1e-8, abs=1e-12)


def test_weights_are_a_quadrature_rule_for_the_density_that_the_start_sees() -> None:
    A = Counted(with_spectrum(torch.linspace(-1, 2, SIZE)))
    start = A.gaussian()
    found = lanczos(A, start, steps=4)
    for degree in range(8):
        exact = start @ torch.linalg.matrix_power(A.matrix, degree) @ start / (start @ start)
        assert (found.weights * found.values**degree).sum().item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("negative", [0, 1, 4])
def test_share_of_the_negative_spectrum(negative: int) -> None:
    values = [*torch.linspace(-1, -0.3, negative).tolist(), *torch.linspace(0.2, 1, SIZE - negative).tolist()]
    A = Counted(torch.diag(torch.tensor(values)))
    basis = torch.eye(SIZE)  # over a whole basis the mean is exact
    assert lanczos(A, basis, 5).negative_share == pytest.approx(negative / SIZE)
    sampled = lanczos(A, A.gaussian(400), SIZE)
    assert sampled.negative_share == pytest.approx(negative / SIZE, abs=0.03)
    assert sampled.lowest == pytest.approx(min(values))


def test_a_zero_eigenvalue_is_not_negative() -> None:
    for dtype in (torch.float64, torch.float32):
        A = Counted(with_spectrum([0.0, 0.0, 0.0, *torch.linspace(0.1, 1, SIZE - 3).tolist()]).to(dtype))
        assert lanczos(A, A.gaussian(5), SIZE).negative_share == 0


def test_a_krylov_space_that_ends_early_leaves_no_trace_beyond_its_end() -> None:
    A = Counted(torch.diag(torch.tensor([3.0] * 4 + [-2.0] * 3 + [1.0] * 4)))
    starts = torch.stack([torch.eye(SIZE)[0], torch.eye(SIZE)[0] + torch.eye(SIZE)[5], torch.ones(SIZE)])
    found = lanczos(A, starts, steps=6)
    assert (found.lowest, found.highest) == pytest.approx((-2.0, 3.0))
    assert found.negative_share == pytest.approx((0 + 1 / 2 + 3 / 11) / 3)
    shifted = lanczos(A + 10.0, starts, steps=6)
    assert (shifted.lowest, shifted.highest) == pytest.approx((8.0, 13.0))


def test_reorthogonalisation_finds_each_eigenvalue_once() -> None:
    values = torch.cat([torch.linspace(0, 1, SIZE - 1), torch.tensor([1e4])])  # what makes plain Lanczos find it again
    A = Counted(with_spectrum(values))
    found = lanczos(A, A.gaussian(), SIZE)
    torch.testing.assert_close(found.values, values, rtol=1e-9, atol=1e-7)


def test_what_lanczos_cannot_do_is_an_error() -> None:
    A = Counted(OPERATORS["spd"]())
    with pytest.raises(ValueError, match="a product with A is infinite or NaN"):
        lanczos(Counted(torch.full((SIZE, SIZE), torch.nan)), A.gaussian(), 3)
    for refused, reason in (
        (Dense(A.matrix, symmetric=False), "symmetric"),
        (Dense(A.matrix, fixed=False), "the same operator"),
    ):
        with pytest.raises(TypeError, match=f"Lanczos needs .*{reason}"):
            lanczos(refused, A.gaussian(), 3)


def test_gaussian_is_the_same_each_time_and_stands_in_front_of_the_shapes() -> None:
    A, state = Counted(torch.eye(SIZE)), torch.get_rng_state()
    first, second, other = A.gaussian(4), A.gaussian(4), A.gaussian(4, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert first.shape == (4, SIZE)


def test_orthogonalise_takes_away_what_rounding_left() -> None:
    draw = torch.linalg.qr(torch.randn(SIZE, 6)).Q.T
    basis = list(draw)
    w = draw[0] * 1e9 + torch.randn(SIZE)
    vector = w.clone()
    found = orthogonalise_(Counted(torch.eye(SIZE)), vector, basis)
    torch.testing.assert_close(found, draw @ w, rtol=1e-9, atol=1e-6)
    assert (draw @ vector).abs().max() < 1e-12


def test_a_product_may_be_its_vector_itself() -> None:
    A = Symmetric(lambda v: v, like=torch.ones(SIZE))
    found = lanczos(A, A.gaussian(2), 3)
    torch.testing.assert_close(found.values, torch.ones(2, 3))
    estimate, v = spectral_norm(A, torch.ones(SIZE), products=2)
    assert (estimate.item(), v.norm().item()) == pytest.approx((1.0, 1.0))


def test_of_an_unsymmetric_operator_the_largest_stretch_counts() -> None:
    A = Dense(torch.tensor([[0.0, 8.0], [0.0, 0.5]]), symmetric=False)
    estimate, _ = spectral_norm(A, torch.tensor([0.0, 1.0]), products=10)
    assert estimate.item() == pytest.approx(64.25**0.5)  # of the first product; the later ones tend to 0.5
