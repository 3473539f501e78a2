"""One table of solvers × one table of operators: statuses, products, residuals and iterates, against dense algebra."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from cases import SIZE, Tree, flat, like, spd, unflat, with_spectrum
from numpy.polynomial import chebyshev
from torch import Tensor

from hoptim import CG, MINRES, Identity, Neumann, Solution, Solver, Status
from hoptim.linalg.lanczos import spectral_norm, start_vector
from hoptim.linalg.operators import Operator, Symmetric
from hoptim.solvers.chebyshev import SAFETY, Chebyshev
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.nystrom import Nystrom
from hoptim.solvers.warm_start import WarmStart

FINISHED, CONVERGED, NEGATIVE, GROWING = Status.FINISHED, Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.GROWING
TOO_LARGE, TOO_NEGATIVE, FLAT = Status.STEP_TOO_LARGE, Status.CURVATURE_TOO_NEGATIVE, Status.NO_CURVATURE
LARGE, INEXACT, NON_FINITE = Status.LARGE_RESIDUAL, Status.INEXACT, Status.NON_FINITE_PRODUCT
LEADS = [(), (1,), (3,)]


class Dense(Operator):
    """A dense matrix over a dict of tensors. It notes the leading axes of every vector that it is given."""

    def __init__(self, matrix: Tensor, symmetric: bool, given: list[tuple[int, ...]] | None = None) -> None:
        super().__init__(like(matrix.dtype))
        self.matrix, self.symmetric, self.given = matrix, symmetric, [] if given is None else given

    def __matmul__(self, v: Tree) -> Tree:
        lead = tuple(v["bias"].shape[:-1])
        self.given.append(lead)
        return unflat(flat(v, lead) @ self.matrix.T, self.like)

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.matrix.T, self.symmetric, self.given)

    def products(self, lead: tuple[int, ...]) -> int:
        """Products a right-hand side: a batch of other vectors than right-hand sides counts one by one."""
        return sum(1 if given in (lead, ()) else given[0] for given in self.given)


F64 = torch.float64


def spectrum(*eigenvalues: float | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix of these eigenvalues, of single ones and of ranges."""
    return with_spectrum(torch.cat([torch.as_tensor(part, dtype=F64).reshape(-1) for part in eigenvalues]), seed)


def between(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count, dtype=F64)


def unsymmetric() -> Tensor:
    """diag(d) S, as under Adam: real positive eigenvalues, but not symmetric."""
    return between(0.2, 1.5, SIZE)[:, None] * spd(10.0, seed=3)


def rotating(real: list[float], imaginary: list[float]) -> Tensor:
    """Pairs real ± i·imaginary and one real eigenvalue, in a random basis that is not orthogonal."""
    blocks = [torch.tensor([[a, b], [-b, a]], dtype=F64) for a, b in zip(real, imaginary, strict=True)]
    draw = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)).to(F64)
    basis = torch.eye(SIZE, dtype=F64) + 0.1 * draw
    return basis @ torch.block_diag(*blocks, torch.tensor([[0.7]], dtype=F64)) @ torch.linalg.inv(basis)


@dataclass
class System:
    matrix: Tensor
    symmetric: bool = True
    consistent: bool = True  # whether g is in the range
    singular: bool = False

    def sides(self, lead: tuple[int, ...]) -> Tensor:
        g = torch.randn(*lead, SIZE, generator=torch.Generator().manual_seed(4))
        return g @ self.matrix if self.singular and self.consistent else g


SINGULAR = spectrum(0.0, 0.0, between(0.1, 1.0, SIZE - 2))
SYSTEMS = {
    "spd": System(spd(10.0)),
    "ill-conditioned": System(spd(1e6)),
    "mildly indefinite": System(spectrum(-0.01, between(0.05, 1.0, SIZE - 1))),
    "indefinite": System(spectrum(between(-0.97, 1.0, SIZE))),
    "negative definite": System(-spd(10.0)),
    "singular, consistent": System(SINGULAR, singular=True),
    "singular, inconsistent": System(SINGULAR, singular=True, consistent=False),
    "zero": System(torch.zeros(SIZE, SIZE, dtype=F64), singular=True, consistent=False),
    "unsymmetric": System(unsymmetric(), symmetric=False),
    "complex": System(rotating([1.0, 0.8, 0.6, 0.5, 0.4], [0.1, 0.3, 0.2, 0.3, 0.1]), symmetric=False),
    "complex, far from real": System(rotating([0.4, 0.8, 0.6, 0.5, 0.4], [1.3, 0.3, 0.2, 0.3, 0.1]), symmetric=False),
    "complex, unstable": System(rotating([-0.3, 0.8, 0.6, 0.5, 0.4], [0.4, 0.3, 0.2, 0.3, 0.1]), symmetric=False),
}
SOLVERS: dict[str, Solver] = {
    "Identity": Identity(),
    "Neumann": Neumann(terms=20, step_size=0.9),
    "Neumann, chosen": Neumann(terms=20),
    "Chebyshev": Chebyshev(terms=20, interval=(0.05, 1.0)),
    "Chebyshev, chosen": Chebyshev(terms=20),
    "CG": CG(terms=40, tolerance=1e-9),
    "MINRES": MINRES(terms=40, tolerance=1e-9),
    "GMRES": GMRES(terms=40, tolerance=1e-9),
    "Nystrom": Nystrom(rank=SIZE, rho=0.01),
    "Nystrom, low rank": Nystrom(rank=4, rho=0.1),
}


def solve(system: System, g: Tensor, solver: Solver, state: Any = None) -> tuple[Solution, Dense]:
    A = Dense(system.matrix, system.symmetric)
    return solver.solve(A, unflat(g, A.like), state), A


# The table: how each pair ends ----------------------------------------------------------------------------------------

NAMES = list(SOLVERS)
EXPECTED: dict[str, list[Status | None]] = {  # in the order of SOLVERS; None is a TypeError
    "spd": [FINISHED, FINISHED, FINISHED, FINISHED, FINISHED, CONVERGED, CONVERGED, CONVERGED, FINISHED, LARGE],
    "ill-conditioned": [FINISHED] * 5 + [CONVERGED, INEXACT, CONVERGED] + [FINISHED] * 2,
    "mildly indefinite": [FINISHED] + [NEGATIVE] * 8 + [LARGE],
    "indefinite": [FINISHED] + [TOO_NEGATIVE] * 4 + [NEGATIVE] * 5,
    "negative definite": [FINISHED] + [TOO_NEGATIVE] * 4 + [NEGATIVE] * 5,
    "singular, consistent": [FINISHED] * 5 + [CONVERGED] * 3 + [FINISHED, LARGE],
    "singular, inconsistent": [FINISHED] * 5 + [LARGE, FINISHED, FINISHED, FINISHED, LARGE],
    "zero": [FINISHED, FINISHED] + [FLAT] * 8,
    "unsymmetric": [FINISHED] * 3 + [None] * 4 + [CONVERGED, None, None],
    "complex": [FINISHED] * 3 + [None] * 4 + [CONVERGED, None, None],
    "complex, far from real": [FINISHED, TOO_LARGE, GROWING] + [None] * 4 + [CONVERGED, None, None],
    "complex, unstable": [FINISHED, TOO_NEGATIVE, TOO_NEGATIVE] + [None] * 4 + [NEGATIVE, None, None],
}
PAIRS = [(system, solver) for system in SYSTEMS for solver in SOLVERS]


def left(system: System, g: Tensor, x: Tensor) -> Tensor:
    """‖g − Aᵀx‖ / ‖g‖."""
    return (g - x @ system.matrix).norm(dim=-1) / g.norm(dim=-1)


def dense(matrix: Tensor, g: Tensor) -> Tensor:
    """A⁻ᵀg."""
    return torch.linalg.solve(matrix.T, g.reshape(-1, SIZE).T).T.reshape(g.shape)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("system", "solver"), PAIRS)
def test_each_pair_ends_as_the_table_says(system: str, solver: str, lead: tuple[int, ...]) -> None:
    expected = EXPECTED[system][NAMES.index(solver)]
    g = SYSTEMS[system].sides(lead)
    if expected is None:
        with pytest.raises(
            TypeError, match=r"not known to be symmetric: take hoptim.GMRES, hoptim.Neumann or hoptim.Identity"
        ):
            solve(SYSTEMS[system], g, SOLVERS[solver])
        return
    solution, A = solve(SYSTEMS[system], g, SOLVERS[solver])
    if expected is INEXACT:  # of some sides only
        expected = INEXACT if left(SYSTEMS[system], g, flat(solution.value, lead)).max() > 2e-9 else CONVERGED
    assert solution.status is expected, solution.detail
    assert solution.products == A.products(lead)
    assert flat(solution.value, lead).shape == g.shape
    assert solution.residuals.shape[1:] == lead
    assert not math.isnan(flat(solution.value, lead).sum())
    if len(solution.residuals) and not solver.startswith("Neumann"):
        true = left(SYSTEMS[system], g, flat(solution.value, lead))
        torch.testing.assert_close(solution.residuals[-1], true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(
    ("solver", "spend"),
    [
        (CG(terms=60, tolerance=1e-13), 60),
        (MINRES(terms=60, tolerance=1e-13), 60),
        (GMRES(terms=11, tolerance=1e-13), 12),
        (Chebyshev(terms=500, interval=(0.1, 1.0), tolerance=1e-13), 70),
        (Chebyshev(terms=500, ratio=20.0, tolerance=1e-13), 100),
        (Neumann(terms=2000, tolerance=1e-13), 400),
        (WarmStart(CG(terms=60, tolerance=1e-13)), 60),
    ],
    ids=["CG", "MINRES", "GMRES", "Chebyshev", "Chebyshev, chosen", "Neumann", "WarmStart"],
)
def test_enough_terms_give_the_dense_solution_and_stop_there(solver: Solver, spend: int, lead: tuple[int, ...]) -> None:
    g = SYSTEMS["spd"].sides(lead)
    solution, A = solve(SYSTEMS["spd"], g, solver)
    assert solution.status is CONVERGED
    assert solution.products == A.products(lead) <= spend
    expected = dense(SYSTEMS["spd"].matrix, g)
    torch.testing.assert_close(flat(solution.value, lead), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("system", ["unsymmetric", "complex", "complex, far from real", "complex, unstable"])
@pytest.mark.parametrize("lead", LEADS)
def test_gmres_solves_with_the_transpose(system: str, lead: tuple[int, ...]) -> None:
    g = SYSTEMS[system].sides(lead)
    solution, _ = solve(SYSTEMS[system], g, GMRES(terms=SIZE))
    expected = dense(SYSTEMS[system].matrix, g)
    torch.testing.assert_close(flat(solution.value, lead), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("system", ["singular, consistent", "singular, inconsistent"])
@pytest.mark.parametrize("solver", [MINRES(terms=60, tolerance=1e-12), GMRES(terms=60, tolerance=1e-12)])
def test_a_singular_system_is_solved_as_well_as_it_can_be(system: str, solver: Solver) -> None:
    for seed in range(6):
        matrix = spectrum(0.0, 0.0, between(0.1, 1.0, SIZE - 2), seed=seed)
        case = replace(SYSTEMS[system], matrix=matrix)
        g = case.sides((3,))
        solution, _ = solve(case, g, solver)
        best = g @ torch.linalg.pinv(matrix, atol=1e-9)
        torch.testing.assert_close(left(case, g, flat(solution.value, (3,))), left(case, g, best), rtol=1e-8, atol=1e-12)
        assert flat(solution.value, (3,)).norm() < 50 * best.norm()
        assert solution.products <= SIZE + 1  # the Krylov space has no more directions


def test_gmres_ends_with_the_krylov_space_though_rounding_leaves_a_direction() -> None:
    for seed in range(20):
        matrix = spectrum(0.3, 0.7, *[0.0] * (SIZE - 2), seed=seed)
        case = System(matrix, singular=True, consistent=False)
        solution, _ = solve(case, case.sides(()), GMRES(terms=60))
        assert solution.products <= 4  # two eigenvectors, what A takes to zero, and a direction of rounding at most


# The defining property of each iterate ----------------------------------------------------------------------------------


def krylov(M: Tensor, g: Tensor, terms: int) -> Tensor:
    """An orthonormal basis of span(g, Mg, …), as columns."""
    basis = [g / g.norm()]
    for _ in range(terms - 1):
        w = M @ basis[-1]
        for _ in range(2):
            for v in basis:
                w = w - (v @ w) * v
        basis.append(w / w.norm())
    return torch.stack(basis, dim=1)


def least_energy(M: Tensor, g: Tensor, terms: int) -> Tensor:
    K = krylov(M, g, terms)
    return K @ torch.linalg.solve(K.T @ M @ K, K.T @ g)


def least_residual(M: Tensor, g: Tensor, terms: int) -> Tensor:
    K = krylov(M, g, terms)
    return K @ torch.linalg.lstsq(M @ K, g[:, None]).solution[:, 0]


def semi_iterate(M: Tensor, g: Tensor, terms: int, a: float, b: float) -> Tensor:
    """(1 − p(λ))/λ · g by the eigenvalues of M, with p a ratio of Chebyshev polynomials and its limit where λ = 0."""
    values, vectors = np.linalg.eigh(M.numpy())
    T = np.eye(terms + 1)[terms]
    middle = (a + b) / (b - a)
    p = chebyshev.chebval(middle - 2 * values / (b - a), T) / chebyshev.chebval(middle, T)
    slope = 2 / (b - a) * chebyshev.chebval(middle, chebyshev.chebder(T)) / chebyshev.chebval(middle, T)
    safe = np.where(np.abs(values) < 1e-12, 1.0, values)
    q = np.where(np.abs(values) < 1e-12, slope, (1 - p) / safe)
    return torch.from_numpy(vectors @ (q * (vectors.T @ g.numpy())))


def chosen(M: Tensor, terms: int, ratio: float | None, g: Tensor) -> tuple[float, float]:
    """The interval that Chebyshev chooses, from the power iteration alone."""
    A = Dense(M, True)
    solution = Neumann(terms=0).solve(A, unflat(g, A.like))
    b = SAFETY / float(solution.step_size or math.nan)
    return b / (ratio or 1 / math.tanh(2 / terms) ** 2), b


ITERATES: dict[str, Any] = {
    "CG": (lambda terms: CG(terms=terms, tolerance=0.0), least_energy, ["spd", "ill-conditioned", "singular, consistent"]),
    "MINRES": (
        lambda terms: MINRES(terms=terms, tolerance=0.0),
        least_residual,
        [name for name, system in SYSTEMS.items() if system.symmetric and name != "zero"],
    ),
    "GMRES": (
        lambda terms: GMRES(terms=terms, tolerance=0.0),
        least_residual,
        [name for name in SYSTEMS if name != "zero"],
    ),
    "Chebyshev": (
        lambda terms: Chebyshev(terms=terms, interval=(0.04, 1.1), tolerance=0.0),
        lambda M, g, terms: semi_iterate(M, g, terms, 0.04, 1.1),
        ["spd", "ill-conditioned", "mildly indefinite", "singular, consistent", "singular, inconsistent"],
    ),
    "Chebyshev, chosen": (
        lambda terms: Chebyshev(terms=terms, tolerance=0.0),
        lambda M, g, terms: semi_iterate(M, g, terms, *chosen(M, terms, None, g)),
        ["spd", "ill-conditioned", "mildly indefinite", "singular, consistent", "singular, inconsistent"],
    ),
    "Chebyshev, ratio": (
        lambda terms: Chebyshev(terms=terms, tolerance=0.0, ratio=7.0),
        lambda M, g, terms: semi_iterate(M, g, terms, *chosen(M, terms, 7.0, g)),
        ["spd"],
    ),
}
STEPS = [(solver, system) for solver, (_, _, systems) in ITERATES.items() for system in systems]


@pytest.mark.parametrize("terms", [1, 2, 3, 6])
@pytest.mark.parametrize(("solver", "system"), STEPS)
def test_each_iterate_has_its_defining_property_and_its_own_residual(solver: str, system: str, terms: int) -> None:
    make, reference, _ = ITERATES[solver]
    case = SYSTEMS[system]
    g = case.sides((3,))
    one, _ = solve(case, g[0], make(terms))
    expected = reference(case.matrix.T, g[0], terms)
    torch.testing.assert_close(flat(one.value), expected, rtol=1e-7, atol=1e-7 * expected.norm().item())
    torch.testing.assert_close(one.residuals[-1], left(case, g[0], expected), rtol=1e-7, atol=1e-9)
    assert len(one.residuals) == terms
    if "chosen" in solver or "ratio" in solver:
        return  # several right-hand sides start the power iteration elsewhere
    many, _ = solve(case, g, make(terms))
    rows = torch.stack([reference(case.matrix.T, row, terms) for row in g])
    torch.testing.assert_close(flat(many.value, (3,)), rows, rtol=1e-7, atol=1e-7 * rows.norm().item())
    torch.testing.assert_close(many.residuals[:, 0], one.residuals, rtol=1e-7, atol=1e-10)
    if terms > 1:
        before, _ = solve(case, g, make(terms - 1))
        torch.testing.assert_close(many.residuals[:-1], before.residuals, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("terms", [1, 3, 7])
def test_iterates_are_scipys(terms: int) -> None:
    definite, unsymmetric_ = SYSTEMS["spd"], SYSTEMS["complex"]
    g = definite.sides(())
    M, N, rhs = definite.matrix.numpy(), unsymmetric_.matrix.T.numpy(), g.numpy()
    library = {
        "CG": scipy.sparse.linalg.cg(M, rhs, maxiter=terms, rtol=0.0)[0],
        "MINRES": scipy.sparse.linalg.minres(M, rhs, maxiter=terms, rtol=0.0)[0],
        "GMRES": scipy.sparse.linalg.gmres(N, rhs, restart=terms, maxiter=1, rtol=0.0)[0],
    }
    mine = {
        "CG": solve(definite, g, CG(terms=terms, tolerance=0.0)),
        "MINRES": solve(definite, g, MINRES(terms=terms, tolerance=0.0)),
        "GMRES": solve(unsymmetric_, g, GMRES(terms=terms, tolerance=0.0)),
    }
    for name, expected in library.items():
        torch.testing.assert_close(flat(mine[name][0].value), torch.from_numpy(expected), rtol=1e-8, atol=1e-10, msg=name)


def test_gmres_on_a_symmetric_operator_is_minres() -> None:
    case = SYSTEMS["indefinite"]
    g = case.sides((3,))
    for terms in (1, 4, 8):
        pair = [flat(solve(case, g, kind(terms=terms, tolerance=0.0))[0].value, (3,)) for kind in (GMRES, MINRES)]
        torch.testing.assert_close(*pair, rtol=1e-8, atol=1e-9)


# Each right-hand side for itself ----------------------------------------------------------------------------------------

ALONE = {
    "Neumann": Neumann(terms=300, step_size=0.9, tolerance=1e-3),
    "Chebyshev": Chebyshev(terms=60, interval=(0.1, 1.0), tolerance=1e-6),
    "CG": CG(terms=30, tolerance=1e-6),
    "MINRES": MINRES(terms=30, tolerance=1e-6),
    "GMRES": GMRES(terms=30, tolerance=1e-6),
}


@pytest.mark.parametrize("name", ALONE)
def test_each_of_several_stops_where_it_would_alone(name: str) -> None:
    case = SYSTEMS["spd"]
    values, vectors = torch.linalg.eigh(case.matrix)
    near = vectors[:, 4] + 3e-7 * case.sides(())  # solved by one product but for a residual that shows
    g = torch.stack([vectors[:, -1], case.sides(()), 1e-4 * vectors[:, 3] + vectors[:, 4], near, torch.zeros(SIZE)])
    together, _ = solve(case, g, ALONE[name])
    alone = [solve(case, row, ALONE[name])[0] for row in g]
    rows = torch.stack([flat(solution.value) for solution in alone])
    torch.testing.assert_close(flat(together.value, (5,)), rows, rtol=1e-9, atol=1e-10)
    assert together.status is CONVERGED
    assert together.products == max(solution.products for solution in alone)
    for column, solution in zip(together.residuals.T, alone, strict=True):
        k = len(solution.residuals) - 1
        torch.testing.assert_close(column[:k], solution.residuals[:k], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(column[-1], solution.residuals[-1], rtol=1e-5, atol=1e-9)  # by a product with x
        torch.testing.assert_close(column[k + 1 : -1], column[k].expand_as(column[k + 1 : -1]), rtol=1e-5, atol=1e-12)
    assert float(values[0]) > 0


@pytest.mark.parametrize("name", ALONE)
def test_a_device_is_read_each_sixteen_products_only_and_gives_the_same(name: str, monkeypatch: Any) -> None:
    case, g = SYSTEMS["spd"], SYSTEMS["spd"].sides((3,))
    here, _ = solve(case, g, replace(ALONE[name], terms=48))
    looks = []
    monkeypatch.setattr(
        f"hoptim.solvers.{name.lower()}.should_check_convergence",
        lambda term, terms, _: term < terms and term % 16 == 0 and (looks.append(term) or True),
    )
    there, A = solve(case, g, replace(ALONE[name], terms=48))
    assert there.status is here.status
    torch.testing.assert_close(there.value, here.value, rtol=1e-9, atol=1e-9)
    assert there.products == A.products((3,)) == 16 * math.ceil(len(here.residuals) / 16) + (here.status is CONVERGED)
    assert looks == [16, 32][: len(looks)]
    frozen = there.residuals[len(here.residuals) - 1 : -1]
    torch.testing.assert_close(frozen, frozen[:1].expand_as(frozen), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(there.residuals[-1], here.residuals[-1], rtol=1e-6, atol=1e-9)


# What rounding leaves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("kind", [CG, MINRES, GMRES])
def test_what_is_called_converged_is_so_by_the_true_residual(kind: Any, lead: tuple[int, ...]) -> None:
    found = set()
    for power in range(1, 7):
        matrix = spd(10.0**power).float()
        for seed in range(5):
            g = torch.randn(*lead, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            solution, A = solve(System(matrix), g, kind(terms=200, tolerance=1e-5))
            true = left(System(matrix.double()), g.double(), flat(solution.value, lead).double()).max().item()
            assert solution.products == A.products(lead)
            found.add((power, solution.status))
            if solution.status is CONVERGED:
                assert true <= 3e-5
                assert len(solution.residuals) == solution.products - 1
            elif solution.status is INEXACT:
                assert true > 1e-5
                assert 0.5 * true < solution.residuals[-1].max().item() < 2 * true
                assert "reckoned to be" in solution.detail
    assert (1, CONVERGED) in found
    assert (1, INEXACT) not in found
    assert any(status is INEXACT for _, status in found)


@pytest.mark.parametrize(("second", "status"), [(3.0, INEXACT), (math.inf, NON_FINITE), (math.nan, NON_FINITE)])
def test_products_of_fresh_batches_are_not_called_converged(second: float, status: Status) -> None:
    factors = iter([1.0, second])
    A = Symmetric(lambda v: {"w": next(factors) * v["w"]}, like={"w": torch.ones(2)})
    solution = CG().solve(A, {"w": torch.ones(2)})
    assert (solution.status, solution.products) == (status, 2)
    torch.testing.assert_close(solution.residuals, torch.tensor([abs(1 - second)]), equal_nan=True)


@pytest.mark.parametrize("lead", [(), (3,)])
def test_a_tolerance_near_that_of_float64_is_met_by_the_series(lead: tuple[int, ...]) -> None:
    torch.set_default_dtype(torch.float32)  # as it is for a user
    case = SYSTEMS["spd"]
    g = case.sides(lead).double()
    solution, _ = solve(case, g, Neumann(terms=2000, step_size=0.9, tolerance=1e-12))
    assert solution.status is CONVERGED
    assert left(case, g, flat(solution.value, lead)).max() <= 2e-12


def test_a_flat_direction_in_float32_is_not_called_negative() -> None:
    """Rounding leaves it below zero by some units in the last place of the largest."""
    for low, expected in ((-3e-7, FINISHED), (-3e-6, NEGATIVE)):
        matrix = torch.diag(torch.tensor([low] + [1.0] * (SIZE - 1), dtype=torch.float32))
        assert solve(System(matrix), torch.ones(SIZE, dtype=torch.float32), CG(terms=40))[0].status is expected


# What is not finite, and what has nothing to solve ------------------------------------------------------------------------

FINITE = {**SOLVERS, "WarmStart": WarmStart(CG()), "Neumann, tolerance": Neumann(step_size=0.5, tolerance=1e-3)}


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", FINITE)
def test_what_is_not_finite_is_named(name: str, bad: float, lead: tuple[int, ...]) -> None:
    case = SYSTEMS["spd"]
    g = case.sides(lead)
    g.view(-1)[0] = bad  # of several right-hand sides, in one only
    assert solve(case, g, FINITE[name])[0].status is Status.NON_FINITE_GRADIENT
    if name != "Identity":
        broken = replace(case, matrix=torch.full((SIZE, SIZE), bad))
        solution, A = solve(broken, case.sides(lead), FINITE[name])
        assert solution.status is Status.NON_FINITE_PRODUCT
        assert solution.products == A.products(lead)


@pytest.mark.parametrize("name", FINITE)
def test_a_right_hand_side_of_zero_has_the_answer_zero(name: str) -> None:
    solution, _ = solve(SYSTEMS["spd"], torch.zeros(2, SIZE), FINITE[name])
    assert solution.status.kind == "ok"
    assert flat(solution.value, (2,)).abs().max() == 0
    assert solution.residuals.sum() == 0


# Chebyshev --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 5, 20, 50])
def test_the_default_ratio_is_the_longest_interval_that_keeps_its_promise(terms: int) -> None:
    """Over [b/ratio, b] the residual is at most 1/cosh 4 = 3.7 %, and reaches it at both ends."""
    case = System(torch.diag(torch.linspace(0.01, 1.0, SIZE)))
    solution, _ = solve(case, torch.ones(SIZE), Chebyshev(terms=terms))
    a, b = chosen(case.matrix, terms, None, torch.ones(SIZE))
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
        blind = {"direction": unflat(torch.eye(SIZE)[1], like())}
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


# Neumann -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["unsymmetric", "complex", "complex, far from real"])
def test_neumann_sums_powers_of_the_transpose_and_takes_its_step_from_them(system: str) -> None:
    case, terms = SYSTEMS[system], 4
    g = case.sides((3,))
    solution, _ = solve(case, g, Neumann(terms=terms))
    step = solution.step_size or math.nan
    powers = sum(torch.linalg.matrix_power(torch.eye(SIZE) - step * case.matrix, j) for j in range(terms + 1))
    torch.testing.assert_close(flat(solution.value, (3,)), step * g @ powers, rtol=1e-10, atol=1e-12)
    norm, radius = torch.linalg.matrix_norm(case.matrix, 2), torch.linalg.eigvals(case.matrix).abs().max()
    assert 0.8 * radius <= 1 / step <= norm * (1 + 1e-9)
    bound, _ = spectral_norm(Dense(case.matrix.T, False), start_vector(like(), unflat(g.sum(0), like())), 10)
    assert 1 / step == pytest.approx(bound.item(), rel=1e-12)
    bound, _ = spectral_norm(Dense(case.matrix.T, False), solution.state["direction"], 300)
    assert radius * (1 - 1e-3) <= bound <= norm * (1 + 1e-9)


def test_a_complex_spectrum_is_told_the_step_that_it_allows() -> None:
    block = torch.tensor([[0.3, 1.2], [-1.2, 0.3]])
    matrix = torch.block_diag(block, *[torch.eye(1) * 0.5] * (SIZE - 2))
    case, g = System(matrix, symmetric=False), torch.eye(SIZE)[0]
    solution, A = solve(case, g, Neumann(terms=100, step_size=0.9))
    assert solution.status is TOO_LARGE
    assert "curvature of 0.3, which allows less than 0.392" in solution.detail  # 2 Re μ / |μ|²
    assert solution.products == A.products(())
    assert solve(case, g, Neumann(terms=100, step_size=0.38))[0].status is FINISHED
    stuck, A = solve(case, g, Neumann(terms=100))  # 1/‖A‖ is too long as well: tried once, not three times
    assert stuck.status is TOO_LARGE
    assert stuck.products == A.products(()) < 60


@pytest.mark.parametrize("lead", LEADS)
def test_tolerance_stops_the_series_where_its_residual_says(lead: tuple[int, ...]) -> None:
    case = SYSTEMS["spd"]
    g = case.sides(lead)
    whole, _ = solve(case, g, Neumann(terms=60, step_size=0.9))
    below = (whole.residuals.reshape(60, -1) <= 0.1).int().argmax(0) + 1
    stopped, A = solve(case, g, Neumann(terms=60, step_size=0.9, tolerance=0.1))
    assert stopped.status is CONVERGED
    assert stopped.products == A.products(lead) == below.max() + 1
    torch.testing.assert_close(stopped.residuals[-1], left(case, g, flat(stopped.value, lead)))
    for row, k, x in zip(g.reshape(-1, SIZE), below.tolist(), flat(stopped.value, lead).reshape(-1, SIZE), strict=True):
        expected = solve(case, row, Neumann(terms=k, step_size=0.9))[0]
        torch.testing.assert_close(x, flat(expected.value), rtol=1e-10, atol=1e-12)


def test_a_series_that_grew_for_a_while_and_then_converged_has_converged() -> None:
    matrix = torch.eye(SIZE)
    matrix[1, 0] = 8.0  # far from normal: Aᵀ has one eigenvalue, and stretches some vectors by 8
    case, g = System(matrix, symmetric=False), torch.eye(SIZE)[1]
    solution, _ = solve(case, g, Neumann(terms=60, step_size=0.5, tolerance=1e-3))
    assert solution.residuals[0] > 1
    assert solution.status is CONVERGED
    assert left(case, g, flat(solution.value)) <= 1e-3
    assert solve(case, g, Neumann(terms=60, step_size=0.5))[0].status is GROWING


# Nyström ------------------------------------------------------------------------------------------------------------------


def nystrom(M: Tensor, g: Tensor, rank: int, rho: float, seed: int = 0) -> Tensor:
    """(A_k + ρI)⁻¹ g from the formula, with pinv, over the span of the same draw in the basis that it comes in."""
    generator = torch.Generator().manual_seed(seed)
    draw = {name: torch.randn(rank, *value.shape, generator=generator, dtype=M.dtype) for name, value in like().items()}
    omega = flat(draw, (rank,)).T
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
    torch.testing.assert_close(flat(solution.value, lead), expected, rtol=1e-7, atol=1e-8)
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
    torch.testing.assert_close(flat(solution.value, (3,)), expected, rtol=1e-9, atol=1e-9)
    assert solution.products == A.products((3,)) == SIZE + 1


def test_nystrom_of_an_indefinite_operator_uses_the_positive_part() -> None:
    case = SYSTEMS["indefinite"]
    values, vectors = torch.linalg.eigh(case.matrix)
    g = case.sides(())
    solution, _ = solve(case, g, Nystrom(rank=SIZE, rho=0.1))
    positive = vectors @ torch.diag(values.clamp(min=0)) @ vectors.T + 0.1 * torch.eye(SIZE)
    torch.testing.assert_close(flat(solution.value), torch.linalg.solve(positive, g), rtol=1e-9, atol=1e-9)
    assert solution.status is NEGATIVE
    assert "met a curvature of -0.97" in solution.detail


def test_nystrom_wastes_no_direction_on_dead_units_and_leaves_the_generator_alone() -> None:
    values = torch.tensor([0.0] * (SIZE - 3) + [1.0, 2.0, 3.0])
    case, g = System(torch.diag(values)), torch.ones(SIZE)
    state = torch.get_rng_state()
    solution, _ = solve(case, g, Nystrom(rank=3, rho=0.5))
    torch.testing.assert_close(flat(solution.value), 1 / (values + 0.5), rtol=1e-9, atol=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


def test_nystrom_in_float32_loses_little_where_curvature_is_far_above_rho() -> None:
    values = torch.logspace(3, -5, SIZE)
    matrix = with_spectrum(values)
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    single, _ = solve(System(matrix.float()), g.float(), Nystrom(rank=SIZE, rho=0.01))
    expected = torch.linalg.solve(matrix + 0.01 * torch.eye(SIZE), g)
    assert flat(single.value).dtype == torch.float32
    assert (flat(single.value) - expected).norm() < 0.02 * expected.norm()


def test_nystrom_in_float32_takes_no_rounding_for_curvature() -> None:
    for seed in range(30):
        matrix = spectrum(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, between(0.5, 1.0, SIZE - 6), seed=seed)
        g = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))
        single, _ = solve(System(matrix.float()), g.float(), Nystrom(rank=SIZE, rho=1e-4))
        expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(SIZE), g)
        assert (flat(single.value) - expected).norm() < 0.01 * expected.norm()
        assert single.status is FINISHED


def test_a_rank_too_low_for_rho_is_a_remark() -> None:
    solution, _ = solve(SYSTEMS["spd"], SYSTEMS["spd"].sides(()), Nystrom(rank=1, rho=0.01))
    assert solution.status is LARGE
    assert solution.status.ok


# Warm starts --------------------------------------------------------------------------------------------------------------


def test_warm_start_with_no_terms_takes_the_steps_of_soba() -> None:
    rho, v, state = 0.3, torch.zeros(SIZE), None
    for step in range(10):
        matrix = spd(10.0, seed=step) @ torch.diag(torch.linspace(0.5, 1.0, SIZE))  # A and g change, as along a run
        g = torch.randn(SIZE, generator=torch.Generator().manual_seed(step))
        v = v - rho * (matrix.T @ v - g)
        solution, A = solve(System(matrix, symmetric=False), g, WarmStart(Neumann(terms=0, step_size=rho)), state)
        torch.testing.assert_close(flat(solution.value), v, rtol=1e-12, atol=1e-12)
        assert solution.products == A.products(()) == (1 if step else 0)
        assert solution.status.kind == "ok"
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
        Nystrom(rank=4, rho=1.0),
        Identity(),
    ],
    ids=lambda inner: type(inner).__name__,
)
def test_a_warm_start_solves_for_what_the_last_solution_left(inner: Solver, lead: tuple[int, ...]) -> None:
    case = SYSTEMS["spd"]
    g = case.sides(lead)
    cold, A = solve(case, g, WarmStart(inner))
    bare, _ = solve(case, g, inner)
    assert torch.equal(flat(cold.value, lead), flat(bare.value, lead))
    assert cold.products == bare.products == A.products(lead)
    torch.testing.assert_close(cold.state, {"solution": cold.value, **bare.state})

    h = g + 0.1 * g.flip(-1)
    warm, A = solve(case, h, WarmStart(inner), cold.state)
    start = flat(cold.value, lead)
    rest, _ = solve(case, h - start @ case.matrix, inner, bare.state)
    torch.testing.assert_close(flat(warm.value, lead), start + flat(rest.value, lead), rtol=1e-10, atol=1e-12)
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
    torch.testing.assert_close(flat(solution.value, (3,)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("inner", [CG(tolerance=1e-3), GMRES(tolerance=1e-3), Neumann(terms=200, tolerance=1e-3)])
def test_the_inner_tolerance_is_relative_to_the_right_hand_side(inner: Solver) -> None:
    case = SYSTEMS["spd"]
    g = case.sides((3,))
    exact = dense(case.matrix, g)
    near = {"solution": unflat(exact + 1e-2 * torch.randn(exact.shape), like())}
    warm, _ = solve(case, g, WarmStart(inner), near)
    assert warm.status is CONVERGED
    assert left(case, g, flat(warm.value, (3,))).max() <= 1e-3
    assert warm.products <= 1 + solve(case, g, inner)[0].products // 2
    there, A = solve(case, g, WarmStart(inner), {"solution": unflat(exact, like())})
    assert (there.status, there.products, A.products((3,))) == (CONVERGED, 1, 1)
    torch.testing.assert_close(flat(there.value, (3,)), exact)


def test_a_state_of_another_shape_or_another_solver_is_ignored() -> None:
    case = SYSTEMS["spd"]
    three, _ = solve(case, case.sides((3,)), WarmStart(Neumann(terms=2)))
    one, A = solve(case, case.sides(()), WarmStart(Neumann(terms=2)), three.state)
    assert (one.products, A.products(())) == (4, 4)  # no start; two for the step, whose direction still fits
    for state in ({"solution": {"other": torch.ones(2)}}, {"solution": torch.ones(3)}, {"weight": torch.ones(3)}, {}):
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


@pytest.mark.parametrize(
    "state", [None, {"solution": {name: torch.ones(value.shape, dtype=F64) for name, value in like().items()}}]
)
def test_a_diverged_inner_solve_is_passed_on_and_forgotten(state: Any) -> None:
    case = SYSTEMS["negative definite"]
    solution, _ = solve(case, case.sides(()), WarmStart(Neumann(terms=60)), state)
    assert (solution.status, solution.state) == (TOO_NEGATIVE, {})


def test_a_right_hand_side_that_has_become_zero_has_the_answer_zero() -> None:
    case = SYSTEMS["spd"]
    first, _ = solve(case, case.sides((2,)), WarmStart(CG(terms=2)))
    g = case.sides((2,)) * torch.tensor([[0.0], [1.0]])
    second, _ = solve(case, g, WarmStart(CG(terms=2)), first.state)
    assert flat(second.value, (2,))[0].abs().max() == 0
    assert second.residuals[:, 0].abs().max() == 0
    assert flat(second.value, (2,))[1].abs().min() > 0


def test_a_start_that_is_far_off_is_dropped_for_its_right_hand_side_alone() -> None:
    case = SYSTEMS["spd"]
    g = case.sides((2,))
    first, _ = solve(case, g, WarmStart(MINRES(terms=3, tolerance=0.0)))
    h = g * torch.tensor([[1e-3], [1.0]])
    second, _ = solve(case, h, WarmStart(MINRES(terms=3, tolerance=0.0)), first.state)
    fresh, _ = solve(case, h[0], MINRES(terms=3, tolerance=0.0))
    again, _ = solve(case, h[1] - flat(first.value, (2,))[1] @ case.matrix, MINRES(terms=3, tolerance=0.0))
    expected = torch.stack([flat(fresh.value), flat(first.value, (2,))[1] + flat(again.value)])
    torch.testing.assert_close(flat(second.value, (2,)), expected, rtol=1e-9, atol=1e-12)
    assert second.status is GROWING
    assert "dropped" in second.detail
    assert second.residuals[0, 0] > 10


def test_steps_of_soba_along_negative_curvature_are_named_before_they_run_away() -> None:
    case, state, seen = System(torch.diag(torch.tensor([-1.0] + [0.5] * (SIZE - 1)))), None, []
    for _ in range(60):
        solution, _ = solve(case, torch.ones(SIZE), WarmStart(Neumann(terms=0, step_size=0.5)), state)
        state = solution.state
        seen.append(solution.status)
        assert solution.residuals.numel() == 0 or solution.residuals[0] < 20
        assert flat(solution.value).norm() < 100
    assert NEGATIVE in seen


@pytest.mark.parametrize("solver", ["CG", CG, WarmStart(CG())])
def test_what_cannot_be_started_is_an_error(solver: Any) -> None:
    with pytest.raises(TypeError, match="give a solver to start"):
        WarmStart(solver)


# Options --------------------------------------------------------------------------------------------------------------

BAD = [
    (Chebyshev, {"terms": 0}),
    (Chebyshev, {"tolerance": -1.0}),
    (Chebyshev, {"interval": (0.0, 1.0)}),
    (Chebyshev, {"interval": (2.0, 1.0)}),
    (Chebyshev, {"interval": (1.0, math.inf)}),
    (Chebyshev, {"interval": (1.0,)}),
    (Chebyshev, {"interval": 1.0}),
    (Chebyshev, {"ratio": 0.5}),
    (Chebyshev, {"ratio": 2.0, "interval": (1.0, 2.0)}),
    (GMRES, {"terms": 2.5}),
    (GMRES, {"tolerance": math.nan}),
    (Nystrom, {"rank": 0}),
    (Nystrom, {"rank": True}),
    (Nystrom, {"rho": 0.0}),
    (Nystrom, {"rho": math.inf}),
    (Neumann, {"tolerance": -1e-3}),
]


@pytest.mark.parametrize(("kind", "options"), BAD)
def test_bad_options_name_the_value_and_the_remedy(kind: Any, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: ")):
        kind(**options)


def test_an_interval_from_a_config_is_a_tuple_and_one_point_is_an_interval() -> None:
    solver: Any = Chebyshev(interval=[0.5, 0.5], terms=3)  # type: ignore[arg-type]
    assert solver == Chebyshev(interval=(0.5, 0.5), terms=3)
    assert hash(solver) == hash(replace(solver))
    solution, _ = solve(System(0.5 * torch.eye(SIZE)), torch.ones(SIZE), solver)
    torch.testing.assert_close(flat(solution.value), 2 * torch.ones(SIZE))
    assert (solution.status, solution.products) == (CONVERGED, 2)  # one for its residual
