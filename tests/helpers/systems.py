"""The linear systems that solvers are tested on: dense matrices of known spectra, whose operators count their products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from cases import SIZE, spd, with_spectrum
from torch import Tensor

from hoptim import Neumann, Solution, Solver
from hoptim.linalg.operators import Operator
from hoptim.solvers.chebyshev import SAFETY

F64 = torch.float64
LEADS = [(), (1,), (3,)]  # one right-hand side, one of several, several


class Dense(Operator):
    """A dense matrix, which notes the leading axes of every vector that it is given."""

    def __init__(
        self, matrix: Tensor, *, symmetric: bool = True, fixed: bool = True, given: list[tuple[int, ...]] | None = None
    ) -> None:
        super().__init__(matrix[0], is_symmetric=symmetric, is_fixed=fixed)
        self.matrix, self.given = matrix, [] if given is None else given

    def __matmul__(self, v: Tensor) -> Tensor:
        self.given.append(tuple(v.shape[:-1]))
        return v @ self.matrix.T

    @property
    def T(self) -> Dense:  # noqa: N802
        return Dense(self.matrix.T, symmetric=self.is_symmetric, fixed=self.is_fixed, given=self.given)

    def products(self, lead: tuple[int, ...] = ()) -> int:
        """Products a right-hand side: a batch of other vectors than right-hand sides counts one by one."""
        return sum(1 if given in (lead, ()) else given[0] for given in self.given)


@dataclass
class System:
    matrix: Tensor
    symmetric: bool = True
    consistent: bool = True  # whether g is in the range
    singular: bool = False

    def sides(self, lead: tuple[int, ...] = ()) -> Tensor:
        g = torch.randn(*lead, SIZE, generator=torch.Generator().manual_seed(4))
        return g @ self.matrix if self.singular and self.consistent else g


def solve(system: System | Tensor, g: Tensor, solver: Solver, state: Any = None) -> tuple[Solution, Dense]:
    """The solution, and the operator, which knows the products that were really spent."""
    system = System(system) if isinstance(system, Tensor) else system
    A = Dense(system.matrix, symmetric=system.symmetric)
    return solver.solve(A, g, state), A


def left(system: System | Tensor, g: Tensor, x: Tensor) -> Tensor:
    """‖g − Aᵀx‖ / ‖g‖."""
    matrix = system if isinstance(system, Tensor) else system.matrix
    return (g - x @ matrix).norm(dim=-1) / g.norm(dim=-1)


def dense(matrix: Tensor, g: Tensor) -> Tensor:
    """A⁻ᵀg."""
    return torch.linalg.solve(matrix.T, g.reshape(-1, SIZE).T).T.reshape(g.shape)


def chosen_interval(M: Tensor, terms: int, g: Tensor) -> tuple[float, float]:
    """The interval that Chebyshev chooses, from the power iteration alone."""
    solution, _ = solve(M, g, Neumann(terms=0))
    b = SAFETY / float(solution.step_size or math.nan)
    return b * math.tanh(2 / terms) ** 2, b


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
