"""The methods of the study by name, each with the curve that it is a point of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import hoptim
from hoptim.methods.method import Method

TERMS = (5, 10, 20, 50)
KRYLOV_TERMS = (5, 7, 10, 20, 50)  # 7 too, since for few terms each one makes a difference
FEW = (2, 5, 10)
CURVATURES = {"exact": hoptim.Exact(), "GN": hoptim.GaussNewton()}
DAMPINGS = {
    "Neumann": (0.0, 1e-2),
    "CG": (0.0, 1e-3, 1e-2, 1e-1),
    "MINRES": (0.0, 1e-3, 1e-2, 1e-1),
    "Chebyshev": (0.0, 1e-2),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method.

    Attributes:
        family: the name of its curve: the solver, then the curvature.
        terms: the number of terms, which orders the points of a curve.
        method: the method itself.
        curvature: ``exact`` or ``GN``, which needs a ``CompositeLoss``.
        shown: whether to draw its curve.
        factored: whether it is preconditioned by the Kronecker factors of the problem's model, for a classifier.
    """

    family: str
    terms: int
    method: Method
    curvature: str = "exact"
    shown: bool = False
    factored: bool = False

    def on(self, model: nn.Module, batches: Sequence[Any]) -> Method:
        """The method on a problem with this model and these training batches, each of inputs, labels and more."""
        if not self.factored:
            return self.method
        pairs = [batch[:2] for batch in batches]
        return replace(self.method, preconditioner=hoptim.EKFAC(model=model, criterion=nn.CrossEntropyLoss(), batches=pairs))

    @property
    def carries(self) -> bool:
        """Whether it starts from a step size or a solution of the last hyperstep."""
        solver = getattr(self.method, "solver", None)
        chooses = isinstance(solver, hoptim.Neumann) and solver.step_size is None
        return chooses or isinstance(solver, (hoptim.Chebyshev, hoptim.WarmStart))


def _all() -> Iterator[Entry]:
    yield Entry(family="Identity", terms=0, method=hoptim.Implicit(hoptim.Identity(), curvature=hoptim.Exact()), shown=True)
    blog = hoptim.Implicit(hoptim.Neumann(terms=5, step_size=0.1), curvature=hoptim.Exact())
    yield Entry(family="Neumann 0.1 (the blog's)", terms=5, method=blog, shown=True)
    for solver, make, counts in SOLVERS:
        yield from _on_each(solver, make, counts, DAMPINGS[solver], shown=True)
    for tolerance in (0.3, 0.1, 0.03):
        for kind in (hoptim.CG, hoptim.MINRES):
            yield from _on_each(f"{kind.__name__} to {tolerance}", _stopped(kind, tolerance), (20,), (0.0, 1e-2))
    for rho in (1e-2, 1e-1):
        yield from _on_each(f"Nyström {rho}", _nystrom(rho), TERMS, shown=rho == 1e-2)
    for solver, make, _ in SOLVERS[:3]:
        yield from _on_each(f"warm {solver}", _warm(make), FEW)
    for solver, make, _ in SOLVERS[1:3]:
        yield from _on_each(f"Jacobi {solver}", make, (5, 10, 20), preconditioner=hoptim.Jacobi())
    for terms in (0, 3, 5):
        solver = hoptim.MINRES(terms=terms) if terms else hoptim.Identity()
        method = hoptim.Implicit(solver, curvature=hoptim.Exact())
        yield Entry(family="EKFAC MINRES, exact" if terms else "EKFAC", terms=terms, method=method, factored=True)
    yield from _on_each("GMRES on Update", lambda k: hoptim.GMRES(terms=k), (5, 10, 20), condition=hoptim.Update())
    for steps in TERMS:
        yield Entry(family="Unrolled", terms=steps, method=hoptim.Unrolled(steps), shown=True)
    for solver, make, _ in SOLVERS[1:3]:
        for label, curvature in CURVATURES.items():
            for terms in (5, 10):
                method = hoptim.Implicit(make(terms), curvature=hoptim.Averaged(batches=4, curvature=curvature))
                yield Entry(family=f"{solver}, {label}, 4 batches", terms=terms, method=method, curvature=label)


def _on_each(
    solver: str,
    make: Callable[[int], hoptim.Solver],
    counts: tuple[int, ...],
    dampings: tuple[float, ...] = (0.0,),
    *,
    shown: bool = False,
    **options: object,
) -> Iterator[Entry]:
    """A solver on each curvature, with each damping."""
    for label, curvature in CURVATURES.items():
        for damping in dampings:
            family = f"{solver}, {label}" + (f", +{damping:g}" if damping else "")
            for terms in counts:
                if damping and terms > 20:
                    continue  # damping matters for few terms
                method = hoptim.Implicit(make(terms), curvature=curvature, damping=damping, **options)
                yield Entry(family=family, terms=terms, method=method, curvature=label, shown=shown and not damping)


def _stopped(kind: type[hoptim.CG | hoptim.MINRES], tolerance: float) -> Callable[[int], hoptim.Solver]:
    return lambda terms: kind(terms=terms, tolerance=tolerance)


def _nystrom(rho: float) -> Callable[[int], hoptim.Solver]:
    return lambda rank: hoptim.Nystrom(rank=rank, rho=rho)


def _warm(make: Callable[[int], hoptim.Solver]) -> Callable[[int], hoptim.Solver]:
    return lambda terms: hoptim.WarmStart(make(terms))


SOLVERS: list[tuple[str, Callable[[int], hoptim.Solver], tuple[int, ...]]] = [
    ("Neumann", lambda terms: hoptim.Neumann(terms=terms), (1, *TERMS)),
    ("CG", lambda terms: hoptim.CG(terms=terms), KRYLOV_TERMS),
    ("MINRES", lambda terms: hoptim.MINRES(terms=terms), KRYLOV_TERMS),
    ("Chebyshev", lambda terms: hoptim.Chebyshev(terms=terms), TERMS),
]
METHODS: dict[str, Entry] = {f"{entry.family}, {entry.terms}": entry for entry in _all()}
