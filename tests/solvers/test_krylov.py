"""CG and MINRES against dense float64 linear algebra, one right-hand side and several, definite and not."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from hoptim import CG, MINRES, Status
from hoptim.linalg.operators import Symmetric

F64 = torch.float64


def symmetric(eigenvalues: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator, dtype=F64)).Q
    return Q @ torch.diag(torch.tensor(eigenvalues, dtype=F64)) @ Q.T


def solve(H: Tensor, g: Tensor, solver: CG | MINRES) -> Any:
    A = Symmetric(lambda v: {"w": v["w"] @ H}, {"w": torch.zeros(len(H), dtype=F64)})
    return solver.solve(A, {"w": g})


SPD = symmetric([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
G = torch.linspace(-1, 2, 6, dtype=F64)
MANY = torch.stack([G, G.flip(0), G.square()])


INDEFINITE = symmetric([-3.0, -1.0, 2.0, 5.0, 8.0, 13.0], seed=1)
SYSTEMS = {"CG, definite": (CG, SPD), "MINRES, definite": (MINRES, SPD), "MINRES, indefinite": (MINRES, INDEFINITE)}


@pytest.mark.parametrize("g", [G, MANY], ids=["one", "several"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_as_many_terms_as_dimensions_give_the_dense_solution(name: str, g: Tensor) -> None:
    kind, H = SYSTEMS[name]
    solution = solve(H, g, kind(terms=6, tolerance=0.0))
    torch.testing.assert_close(solution.value["w"] @ H, g, rtol=1e-9, atol=1e-11)
    assert (solution.status is Status.NEGATIVE_CURVATURE) == (name == "MINRES, indefinite")


@pytest.mark.parametrize("terms", [1, 2, 3, 5])
@pytest.mark.parametrize("H", [SPD, INDEFINITE], ids=["definite", "indefinite"])
def test_each_iterate_of_minres_has_the_least_residual_of_its_krylov_space(H: Tensor, terms: int) -> None:
    solution = solve(H, G, MINRES(terms=terms, tolerance=0.0))
    K = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(H, j) @ G for j in range(terms)], dim=1)).Q
    best = K @ torch.linalg.lstsq(H @ K, G[:, None]).solution[:, 0]
    torch.testing.assert_close(solution.value["w"], best, rtol=1e-8, atol=1e-10)
    assert solution.residuals[-1].item() == pytest.approx(((G - H @ best).norm() / G.norm()).item(), rel=1e-8)
    assert solution.products == len(solution.residuals) == terms


def test_minres_is_scipys() -> None:
    H = symmetric([(-1.0) ** k * 1.3**k for k in range(20)], seed=5)
    g = torch.linspace(0, 1, 20, dtype=F64)
    for terms in (3, 7, 12):
        found = scipy.sparse.linalg.minres(H.numpy(), g.numpy(), maxiter=terms, rtol=0.0)[0]
        mine = solve(H, g, MINRES(terms=terms, tolerance=0.0)).value["w"]
        torch.testing.assert_close(mine, torch.from_numpy(found), rtol=1e-6, atol=1e-8)


def test_minres_solves_a_consistent_singular_system_with_the_least_x() -> None:
    H = symmetric([0.0, 1.0, 2.0, 4.0, -3.0, 6.0], seed=2)
    g = H @ torch.ones(6, dtype=F64)
    solution = solve(H, g, MINRES(terms=5, tolerance=1e-12))
    torch.testing.assert_close(solution.value["w"], torch.linalg.pinv(H, atol=1e-9) @ g, rtol=1e-8, atol=1e-9)


def test_minres_names_negative_curvature_by_its_sign_alone() -> None:
    for seed in range(5):
        assert solve(symmetric([0.1, 1.0, 2.0, 3.0, 4.0, 9.0], seed), G, MINRES(terms=6)).status.kind == "ok"
        assert (
            solve(symmetric([-0.1, 1.0, 2.0, 3.0, 4.0, 9.0], seed), G, MINRES(terms=6)).status is Status.NEGATIVE_CURVATURE
        )


@pytest.mark.parametrize("terms", [1, 2, 4])
def test_each_iterate_is_the_best_of_its_krylov_space(terms: int) -> None:
    solution = solve(SPD, G, CG(terms=terms, tolerance=0.0))
    K = torch.stack([torch.linalg.matrix_power(SPD, j) @ G for j in range(terms)], dim=1)
    K = torch.linalg.qr(K).Q
    best = K @ torch.linalg.solve(K.T @ SPD @ K, K.T @ G)
    torch.testing.assert_close(solution.value["w"], best, rtol=1e-9, atol=1e-11)
    assert (solution.products, solution.status) == (terms, Status.FINISHED)
    residual = (G - SPD @ best).norm() / G.norm()
    assert solution.residuals[-1].item() == pytest.approx(residual.item(), rel=1e-9)
    assert len(solution.residuals) == terms


def test_it_stops_at_the_tolerance() -> None:
    H = symmetric([1.0] * 3 + [2.0] * 3)
    solution = solve(H, G, CG(terms=100))
    assert (solution.products, solution.status) == (3, Status.CONVERGED)


def test_an_ill_conditioned_system_converges() -> None:
    H = symmetric([10.0**k for k in range(-3, 4)])
    g = torch.ones(7, dtype=F64)
    solution = solve(H, g, CG(terms=200, tolerance=1e-10))
    assert solution.status is Status.CONVERGED
    assert ((H @ solution.value["w"] - g).norm() / g.norm()).item() < 1e-8


def test_negative_curvature_gives_the_iterate_before_that_direction() -> None:
    H = symmetric([-1.0, 2.0, 3.0, 5.0, 8.0, 13.0], seed=3)
    g = H @ torch.ones(6, dtype=F64)
    solution = solve(H, g, CG(terms=50, tolerance=0.0))
    assert solution.status is Status.NEGATIVE_CURVATURE
    stop = int((solution.residuals[1:] == solution.residuals[:-1]).nonzero()[0]) + 1
    before = solve(H, g, CG(terms=stop, tolerance=0.0))
    assert before.status is Status.FINISHED
    assert torch.equal(solution.value["w"], before.value["w"])
    assert "curvature -" in solution.detail


def test_a_first_direction_that_curves_downward_is_scaled_by_its_curvature() -> None:
    solution = solve(symmetric([-4.0] * 6), G, CG())
    torch.testing.assert_close(solution.value["w"], G / 4)
    assert (solution.status, solution.status.ok) == (Status.NEGATIVE_CURVATURE, True)


@pytest.mark.parametrize("kind", [CG, MINRES])
def test_each_of_several_stops_for_itself(kind: Any) -> None:
    H = symmetric([-1.0, 2.0, 3.0, 5.0, 8.0, 13.0], seed=3)
    values, vectors = torch.linalg.eigh(H)
    rhs = torch.stack(
        [vectors[:, 0], vectors[:, 1] + vectors[:, 2], H @ torch.ones(6, dtype=F64), torch.zeros(6, dtype=F64)]
    )
    together = solve(H, rhs, kind(terms=12, tolerance=1e-10))
    alone = [solve(H, g, kind(terms=12, tolerance=1e-10)).value["w"] for g in rhs]
    torch.testing.assert_close(together.value["w"], torch.stack(alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(alone[1], vectors[:, 1] / values[1] + vectors[:, 2] / values[2], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("H", "g", "status"),
    [
        (0 * SPD, G, Status.NO_CURVATURE),
        (SPD, 0 * G, Status.CONVERGED),
        (SPD * float("nan"), G, Status.NON_FINITE_PRODUCT),
        (SPD, G * float("inf"), Status.NON_FINITE_GRADIENT),
    ],
    ids=["flat", "zero", "product", "gradient"],
)
@pytest.mark.parametrize("solver", [CG(), MINRES()], ids=["CG", "MINRES"])
def test_what_is_degenerate_is_named(H: Tensor, g: Tensor, status: Status, solver: Any) -> None:
    solution = solve(H, g, solver)
    assert solution.status is status
    if status is Status.CONVERGED:
        assert solution.value["w"].abs().max().item() == 0


def test_products_are_counted() -> None:
    calls = []
    A = Symmetric(lambda v: calls.append(1) or {"w": v["w"] @ SPD}, {"w": G})
    assert CG(terms=4, tolerance=0.0).solve(A, {"w": G}).products == len(calls) == 4


@pytest.mark.parametrize("options", [{"terms": 0}, {"terms": 2.5}, {"tolerance": -1.0}, {"tolerance": float("nan")}])
@pytest.mark.parametrize("kind", [CG, MINRES])
def test_bad_options_name_the_value(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.*: give a"):
        kind(**options)
