"""Two sections on solvers: the time to reach a given accuracy, and several right-hand sides at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from studies.benchmark.cases import PROBLEMS, Case, make, training
from studies.benchmark.measure import Calls, Row, in_turn, ratio
from studies.benchmark.sections import solvers
from torch import Tensor

import hoptim

GOALS = {"residual 1e-2": "residual", "cosine 0.99": "cosine"}
STEPS = (1.0, 1.5, 1.8, 1.9, 1.95, 1.99)  # step sizes to try, times the inverse of the largest eigenvalue
MOST = 400  # the most terms to try, except for Neumann with a fixed step
BEHIND = 20  # a Neumann series is given up after this many times the products of the best solver


@dataclass(frozen=True, kw_only=True)
class Capture(hoptim.Solver):
    """Not a real solver: it keeps the operator and the right-hand side that ``hoptim.Implicit`` has built."""

    box: list[Any]

    def solve(self, A: Any, g: Tensor, state: Any = None) -> hoptim.Solution:
        self.box[:] = [A, g]
        return hoptim.Identity().solve(A, g)


@dataclass(frozen=True)
class System:
    """The system A x = g of a case, with its exact solution, computed in float64."""

    case: Case
    method: Callable[[hoptim.Solver], hoptim.Implicit]
    matrix: str
    A: Any
    g: Tensor
    exact: Tensor

    def residual(self, x: Tensor) -> float:
        return norm(self.g - self.A @ x) / norm(self.g)

    def cosine(self, x: Tensor) -> float:
        return dot(x, self.exact) / (norm(x) * norm(self.exact))

    def reached(self, goal: str, x: Tensor) -> bool:
        return self.residual(x) <= 1e-2 if goal == "residual" else self.cosine(x) >= 0.99


def dot(x: Tensor, y: Tensor) -> float:
    return float(x.double() @ y.double())


def norm(x: Tensor) -> float:
    return math.sqrt(dot(x, x))


def capture(case: Case, method: Callable[[hoptim.Solver], hoptim.Implicit]) -> tuple[Any, Tensor]:
    """The operator and the right-hand side that the method would solve with."""
    box: list[Any] = []
    case.implicit(method(Capture(box=box)))
    return box[0], box[1]


def system(case: Case) -> System:
    """The system of the exact Hessian, or of damped Gauss-Newton if 300 products of MINRES meet negative curvature."""
    wide = case.in_float64()

    def exact(solver: hoptim.Solver) -> hoptim.Implicit:
        return hoptim.Implicit(solver, curvature=hoptim.Exact())

    def damped(solver: hoptim.Solver) -> hoptim.Implicit:
        return hoptim.Implicit(solver, curvature=hoptim.GaussNewton(), damping=1e-3)

    look = hoptim.MINRES(terms=300, tolerance=1e-8).solve(*capture(wide, exact))
    indefinite = look.status is hoptim.Status.NEGATIVE_CURVATURE
    method, matrix = (damped, "Gauss-Newton + 1e-3") if indefinite else (exact, "Hessian")
    A, g = capture(wide, method)
    x = hoptim.CG(terms=20_000, tolerance=1e-9).solve(A, g).value
    left = norm(g - A @ x) / norm(g)  # computed here, not taken from the solver
    if not left < 1e-7:
        raise RuntimeError(f"{case.name}: the exact solution has a residual of {left:.1e}")
    return System(case, method, matrix, *capture(case, method), x)


def least(solver: Callable[[int], hoptim.Solver], to: System, goal: str, state: Any = None) -> int | None:
    """The smallest number of terms that reaches the goal, by doubling and then bisection; ``None`` if 400 do not."""

    def reaches(terms: int) -> bool:
        solution = solver(terms).solve(to.A, to.g, state)
        return solution.status.ok and to.reached(goal, solution.value)

    high = 1
    while not reaches(high):
        if high >= MOST:
            return None
        high = min(2 * high, MOST)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def warm(terms: int) -> hoptim.Solver:
    """CG that starts from the last solution."""
    return hoptim.WarmStart(hoptim.CG(terms=terms, tolerance=0.0))


def carried(to: System, goal: str) -> dict[str, Tensor]:
    """The state that a warm start would have from this system: a solution that reaches the goal."""
    return dict(warm(least(warm, to, goal) or MOST).solve(to.A, to.g).state)


def best_fixed_step(to: System, goal: str, at_most: int) -> tuple[float, int, bool]:
    """The step size whose Neumann series reaches the goal first, its number of terms, and whether it reached the goal.

    The series is written out here, so that no check of hoptim stops it early. Only the winner is timed, not the search.
    """
    largest = 1.0 / hoptim.Neumann(terms=0).solve(to.A, to.g).step_size
    racing = {share / largest: (to.g, to.g) for share in STEPS}
    for terms in range(1, at_most + 1):
        for step, (vector, total) in racing.items():
            vector = vector - step * (to.A @ vector)
            racing[step] = vector, total + vector
        there = [step for step, (vector, total) in racing.items() if _reaches(to, goal, vector, total)]
        if there:
            return there[0], terms, True
    alive = {step: norm(vector) for step, (vector, _) in racing.items() if norm(vector) <= norm(to.g)}
    return min(alive, key=alive.__getitem__), at_most, False


def _reaches(to: System, goal: str, vector: Tensor, total: Tensor) -> bool:
    """Whether the sum reaches the goal. Its residual is the next vector of the series, which is at most as long as this."""
    return norm(vector) <= 1e-2 * norm(to.g) if goal == "residual" else to.cosine(total) >= 0.99


def accuracy(rounds: int) -> list[Row]:
    """CPU seconds of a whole hypergradient with the fewest terms that reach the goal, also relative to the fastest solver.

    "Neumann, best step": the best of six fixed step sizes; ">": it was given up there, so this is a lower bound. "best
    cold": the fastest eager solver that starts from zero. "CG, warm": started from an equally good solution ten training
    steps earlier, on the same batch. "compiled": with a compiled curvature; compilation is not counted.
    """
    rows = []
    for name in PROBLEMS:
        torch.manual_seed(0)
        case = make(name, dropout=0.0).composite()
        before = system(case)
        carry = {goal: carried(before, goal) for goal in GOALS.values()}
        step = training(
            torch.optim.SGD(case.problem.model.parameters(), lr=0.05, momentum=0.9), case.problem.loss, case.batch
        )
        for _ in range(10):
            step()
        case.problem.model.zero_grad()
        to = system(case)
        for label, goal in GOALS.items():
            rows += _to_goal(to, label, goal, carry[goal], max(3, rounds // 3))
    return rows


def _to_goal(to: System, label: str, goal: str, state: dict[str, Tensor], rounds: int) -> list[Row]:
    builders = {name: lambda terms, name=name: solvers(terms)[name] for name in solvers(1)}
    terms = {
        name: least(build, to, goal) for name, build in builders.items() if name not in ("Identity", "Neumann, step given")
    }
    ways: dict[str, tuple[hoptim.Implicit, Any, int]] = {}  # method, state to start from, products
    for name, k in terms.items():
        if k is not None:
            ways[name] = to.method(builders[name](k)), None, builders[name](k).solve(to.A, to.g).products
    times = in_turn({name: partial(to.case.implicit, *way[:2]) for name, way in ways.items()}, rounds)
    cold = min(ways, key=lambda name: median(times[name]))
    step, fixed, arrived = best_fixed_step(to, goal, BEHIND * min(products for *_, products in ways.values()))
    if (k := least(warm, to, goal, state)) is not None:
        ways["CG, warm"] = to.method(warm(k)), state, k + 1
    for name in [name for name in (cold, "CG, warm") if name in ways]:
        method, start, products = ways[name]
        fast = replace(method, curvature=replace(method.curvature, compile=True))
        ways[f"{name}, compiled"] = fast, start, products
    ways["Neumann, best step"] = to.method(hoptim.Neumann(terms=fixed, step_size=step)), None, fixed

    calls: Calls = {name: partial(to.case.implicit, *way[:2]) for name, way in ways.items()}
    times = in_turn(calls, rounds)
    fastest = min(calls, key=lambda name: median(times[name]))
    rows = []
    for name in (*calls, *(name for name, k in terms.items() if k is None)):
        labels = {"system": to.matrix, "to": label, "solver": name}
        if name not in calls:
            rows.append(Row(to.case.name, labels, {"note": f"not within {MOST} terms"}))
            continue
        figures: dict[str, float | str] = {"products": float(ways[name][2]), "s": median(times[name])}
        figures |= {"over the best cold": ratio(times, name, cold), "over the fastest": ratio(times, name, fastest)}
        goals = {}
        if name == "Neumann, best step":
            goals, figures["note"] = {"over the fastest": 5.0}, "reached" if arrived else "> (given up)"
        rows.append(Row(to.case.name, labels, figures, at_least=goals))
    return rows


def sides(rounds: int) -> list[Row]:
    """Eight Hessian products at once over eight one by one: in chunks of 1 to 8 by vmap, and by hoptim's operator."""
    rows = []
    for name in PROBLEMS:
        case = make(name, dropout=0.0)
        A, g = capture(case, lambda solver: hoptim.Implicit(solver, curvature=hoptim.Exact()))
        many, weights = torch.randn(8, len(g)), list(case.problem.model.parameters())
        with case.unfused():
            gradient = torch.autograd.grad(case.problem.loss(case.batch), weights, create_graph=True)

        pieces = many.split([p.numel() for p in weights], dim=1)
        by_weight = [piece.view(8, *p.shape) for piece, p in zip(pieces, weights, strict=True)]

        def chunked(size: int, many: Any = by_weight, weights: Any = weights, gradient: Any = gradient) -> list[Any]:
            found = []
            for part in zip(*(value.split(size) for value in many), strict=True):
                vectors, batched = (part, True) if size > 1 else ([value[0] for value in part], False)
                found.append(torch.autograd.grad(gradient, weights, vectors, retain_graph=True, is_grads_batched=batched))
            return found

        calls: Calls = {f"by {size}": lambda c=chunked, s=size: c(s) for size in (1, 2, 4, 8)}
        calls["hoptim"] = lambda A=A, v=many: A @ v
        times = in_turn(calls, rounds)
        figures: dict[str, float | str] = {"one by one, ms": 1e3 * median(times["by 1"])}
        figures |= {by: ratio(times, by, "by 1") for by in list(calls)[1:]}
        rows.append(Row(case.name, {}, figures, {"hoptim": 1.0}))
    return rows
