"""Two sections on solving: the time to a given accuracy, and several right-hand sides at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from benchmark_cases import PROBLEMS, Case, make, training
from benchmark_measure import Calls, Row, in_turn, ratio
from benchmark_sections import solvers

import hoptim

Tree = dict[str, torch.Tensor]
GOALS = {"residual 1e-2": "residual", "cosine 0.99": "cosine"}
STEPS = (1.0, 1.5, 1.8, 1.9, 1.95, 1.99)  # over the largest eigenvalue
MOST = 400  # terms tried of any solver but Neumann with a fixed step
BEHIND = 20  # a Neumann series is given up when it has spent this many times the products of the best


@dataclass(frozen=True, kw_only=True)
class Caught(hoptim.Solver):
    """No solver: it keeps the operator and the right-hand side that :class:`hoptim.Implicit` built."""

    box: list[Any]

    def solve(self, A: Any, g: Tree, state: Any = None) -> hoptim.Solution:
        self.box[:] = [A, g]
        return hoptim.Identity().solve(A, g)


@dataclass(frozen=True)
class System:
    """A x = g of one case, and the exact x, computed in float64."""

    case: Case
    method: Callable[[hoptim.Solver], hoptim.Implicit]
    matrix: str
    A: Any
    g: Tree
    exact: Tree

    def residual(self, x: Tree) -> float:
        return norm(subtract(self.g, self.A @ x)) / norm(self.g)

    def cosine(self, x: Tree) -> float:
        return dot(x, self.exact) / (norm(x) * norm(self.exact))

    def reached(self, goal: str, x: Tree) -> bool:
        return self.residual(x) <= 1e-2 if goal == "residual" else self.cosine(x) >= 0.99


def dot(x: Tree, y: Tree) -> float:
    return float(sum((x[name].double() * y[name].double()).sum() for name in x))


def norm(x: Tree) -> float:
    return math.sqrt(dot(x, x))


def subtract(x: Tree, y: Tree) -> Tree:
    return {name: x[name] - y[name] for name in x}


def caught(case: Case, method: Callable[[hoptim.Solver], hoptim.Implicit]) -> tuple[Any, Tree]:
    box: list[Any] = []
    case.implicit(method(Caught(box=box)))
    return box[0], box[1]


def system(case: Case) -> System:
    """The exact Hessian's system where no negative curvature shows in 300 products, else damped Gauss-Newton's."""
    wide = case.in_float64()

    def exact(solver: hoptim.Solver) -> hoptim.Implicit:
        return hoptim.Implicit(solver, curvature=hoptim.Exact())

    def damped(solver: hoptim.Solver) -> hoptim.Implicit:
        return hoptim.Implicit(solver, curvature=hoptim.GaussNewton(), damping=1e-3)

    look = hoptim.MINRES(terms=300, tolerance=1e-8).solve(*caught(wide, exact))
    indefinite = look.status is hoptim.Status.NEGATIVE_CURVATURE
    method, matrix = (damped, "Gauss-Newton + 1e-3") if indefinite else (exact, "Hessian")
    A, g = caught(wide, method)
    x = hoptim.CG(terms=20_000, tolerance=1e-9).solve(A, g).value
    left = norm(subtract(g, A @ x)) / norm(g)  # by a product, not by the solver's word
    if not left < 1e-7:
        raise RuntimeError(f"{case.name}: the exact solution has a residual of {left:.1e}")
    return System(case, method, matrix, *caught(case, method), x)


def least(solver: Callable[[int], hoptim.Solver], to: System, goal: str, state: Any = None) -> int | None:
    """The fewest terms that reach the goal: doubled until they do, then halved in between."""

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
    return hoptim.WarmStart(hoptim.CG(terms=terms, tolerance=0.0))


def carried(to: System, goal: str) -> dict[str, Tree]:
    """What a warm start would carry from here: a solution that reaches the goal."""
    return dict(warm(least(warm, to, goal) or MOST).solve(to.A, to.g).state)


def best_fixed_step(to: System, goal: str, at_most: int) -> tuple[float, int, bool]:
    """The step of the grid whose Neumann series is there first, its terms, and whether it got there: a race of all steps.

    The series is the textbook's, so that no check stops it early; the search is free, only the winner is timed.
    """
    largest = 1.0 / hoptim.Neumann(terms=0).solve(to.A, to.g).step_size
    racing = {share / largest: (to.g, dict(to.g)) for share in STEPS}
    for terms in range(1, at_most + 1):
        for step, (vector, total) in racing.items():
            vector = {
                name: v.add(p, alpha=-step) for (name, v), p in zip(vector.items(), (to.A @ vector).values(), strict=True)
            }
            racing[step] = vector, {name: total[name] + vector[name] for name in total}
        there = [step for step, (vector, total) in racing.items() if _there(to, goal, vector, total)]
        if there:
            return there[0], terms, True
    alive = {step: norm(vector) for step, (vector, _) in racing.items() if norm(vector) <= norm(to.g)}
    return min(alive, key=alive.__getitem__), at_most, False


def _there(to: System, goal: str, vector: Tree, total: Tree) -> bool:
    """The residual of the sum is the next vector: the present one is a bound from above where the series shrinks."""
    return norm(vector) <= 1e-2 * norm(to.g) if goal == "residual" else to.cosine(total) >= 0.99


def accuracy(rounds: int) -> list[Row]:
    """Whole hypergradients whose x reaches a goal with the fewest terms: CPU seconds, and over the fastest one's.

    "Neumann, best step": the fixed step of a grid of six that gets there first; ">": given up there, so a lower bound.
    "best cold": the fastest eager one that starts from zero. "CG, warm": from a solution as good of ten training steps ago,
    on the same batch. "compiled": with a compiled curvature, once it is.
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


def _to_goal(to: System, label: str, goal: str, state: dict[str, Tree], rounds: int) -> list[Row]:
    builders = {name: lambda terms, name=name: solvers(terms)[name] for name in solvers(1)}
    terms = {
        name: least(build, to, goal) for name, build in builders.items() if name not in ("Identity", "Neumann, step given")
    }
    ways: dict[str, tuple[hoptim.Implicit, Any, int]] = {}  # the method, what it starts from, its products
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
            goals, figures["note"] = {"over the fastest": 5.0}, "there" if arrived else "> (given up)"
        rows.append(Row(to.case.name, labels, figures, at_least=goals))
    return rows


def sides(rounds: int) -> list[Row]:
    """Eight products with the Hessian, over eight one by one: vmapped over chunks by hand, and as hoptim's operator does."""
    rows = []
    for name in PROBLEMS:
        case = make(name, dropout=0.0)
        A, g = caught(case, lambda solver: hoptim.Implicit(solver, curvature=hoptim.Exact()))
        many = {name: torch.randn(8, *value.shape) for name, value in g.items()}
        weights = list(case.problem.model.parameters())
        with case.unfused():
            gradient = torch.autograd.grad(case.problem.loss(case.batch), weights, create_graph=True)

        def chunked(size: int, many: Tree = many, weights: Any = weights, gradient: Any = gradient) -> list[Any]:
            found = []
            for part in zip(*(value.split(size) for value in many.values()), strict=True):
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
