"""Solvers that repeat one fixed step: the identity and the Neumann series."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.lanczos import spectral_norm, start_vector
from hoptim.linalg.operators import Operator
from hoptim.linalg.trees import Tree
from hoptim.solvers.base import (
    GROWTH_LIMIT,
    NEGATIVE,
    READ_EVERY,
    Deferring,
    carried,
    check_tolerance,
    check_true_residual,
    should_check_convergence,
)
from hoptim.solvers.solution import Solution, State, Status, Unread
from hoptim.validation import is_finite, is_whole

FIRST_PRODUCTS, LATER_PRODUCTS = 10, 2  # of the power iteration: from a fresh vector, and from a carried one


@dataclass(frozen=True, kw_only=True)
class Neumann(Deferring):
    """The Neumann series for the inverse: x_K = α Σ_{j=0..K} (I − αAᵀ)^j g.

    It converges to A⁻ᵀg when every eigenvalue of αA lies in (0, 2); of an unsymmetric A, when |1 − αμ| < 1 for every
    eigenvalue μ, that is α < 2 Re μ / |μ|². K terms cost K products and sum K+1 vectors; ``terms=0`` gives αg. With plain
    SGD of learning rate α, x_K is what differentiating through the last K+1 steps would give.

    The vector after j products, (I − αAᵀ)^j g, is the residual of x_{j−1}: it costs nothing, so that is what ``residuals``
    holds, and the last one is that of x_{K−1}. A series whose vectors outgrow 10·‖g‖ has failed, and stops.

    Args:
        terms: K ≥ 0, default 20; with a tolerance, the most, and one more for the residual of what converged.
        step_size: α > 0; ``None``, the default, takes 1/‖A‖₂, estimated by power iteration: 10 products at first, then 2
            each time, from the vector carried over from the last solve. Of an unsymmetric A it takes 1 / max ‖Aᵀv‖/‖v‖ over
            the iterates, between the inverses of norm and spectral radius; eigenvalues far from the real axis may need
            less, and a series that grows for that says so.
        tolerance: the relative residual at which a right-hand side stops, ≥ 0; 0, the default, takes all terms.

    Raises:
        ValueError: ``terms`` or ``tolerance`` is negative, or ``step_size`` is not positive.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), algorithm 3, with the sign corrected.

    >>> from hoptim.linalg.operators import Symmetric
    >>> A = Symmetric(lambda v: {"w": 2 * v["w"]}, like={"w": torch.ones(1)})
    >>> solution = Neumann(terms=2, step_size=0.25).solve(A, {"w": torch.ones(1)})
    >>> solution.value, solution.residuals, solution.status.ok
    ({'w': tensor([0.4375])}, tensor([0.5000, 0.2500]), True)
    """

    terms: int = 20
    step_size: float | None = None
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not (is_whole(self.terms) and self.terms >= 0):
            raise ValueError(f"terms={self.terms!r}: give a whole number of products, 0 or more")
        if self.step_size is not None and not (is_finite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size={self.step_size!r}: give a positive number, or None to choose it")
        check_tolerance(self.tolerance)

    def unread(self, A: Operator, g: Tree, state: State | None = None) -> Unread:
        """Sum the series; a step chosen too large, which a poor start of the power iteration allows, is chosen again."""

        def series(step: float) -> Unread:
            return _series(A, g, self.terms, step, self.tolerance)

        tried = (
            with_bound(A, g, state, lambda bound: series(1 / bound)) if self.step_size is None else series(self.step_size)
        )
        return check_true_residual(tried, A, g, self.tolerance)


def with_bound(A: Operator, g: Tree, state: State | None, attempt: Callable[[float], Unread]) -> Unread:
    """``attempt(‖A‖₂)``, estimated from the carried direction; again where the estimate turns out too low."""
    known = carried(state, "direction", A.like)
    products = (LATER_PRODUCTS if known else FIRST_PRODUCTS, FIRST_PRODUCTS, FIRST_PRODUCTS)
    return _attempted(A, g, known or _start(A, g), products, 0, attempt)


def _attempted(
    A: Operator, g: Tree, start: Tree, products: tuple[int, ...], spent: int, attempt: Callable[[float], Unread]
) -> Unread:
    """One attempt, after ``products[0]`` of the power iteration; where it fails for the bound, the next when it is read."""
    norm, direction = spectral_norm(A.T, start, products[0])
    before = spent + products[0]
    length, bound = torch.stack([trees.norm(g), norm]).tolist()
    if not (math.isfinite(length) and math.isfinite(bound) and bound > 0):
        return Unread.known(_without_bound(A, g, length, bound, before))
    tried = attempt(bound)

    def read(figures: list[float]) -> Solution:
        solution = tried.read(figures)
        after, towards = before + solution.products, solution.state.get("direction", direction)
        again = solution.status is Status.STEP_TOO_LARGE and A.symmetric  # a better norm cures no complex spectrum
        if again and products[1:]:
            return _attempted(A, g, towards, products[1:], after, attempt).solution()
        return replace(solution, products=after, state={"direction": towards})

    return replace(tried, read=read)


def _series(A: Operator, g: Tree, terms: int, step: float, tolerance: float) -> Unread:
    """α Σ_{j=0..K} (I − αAᵀ)^j g, stopped where it has converged or failed."""
    batched, A_T = A.is_batched(g), A.T
    vector, total = (trees.Packed.of(g, batched=batched) for _ in range(2))
    squares = [trees.dot_parts(vector.held, vector.held, batched=batched)]  # put together where they are looked at
    active = start = _lengths(squares)[0] if tolerance else squares[0][0]
    last = [torch.zeros_like(squares[0][0])]
    for term in range(1, terms + 1):
        product = A_T @ vector.entries
        if term == terms:
            last = trees.dot_parts(list(vector.entries.values()), [product[name] for name in g], batched=batched)
        if tolerance:  # what has converged is frozen by coefficients of zero, so that the host need not look
            active = active > 0
            going = active.to(start.dtype)
            trees.axpy_(vector.entries, product, -step * going)
            trees.axpy_(total.entries, vector.entries, going)
        else:
            trees.add_(vector.entries, product, alpha=-step)
            torch._foreach_add_(total.held, vector.held)
        squares.append(trees.dot_parts(vector.held, vector.held, batched=batched))
        if tolerance:
            active = active & ~(_lengths(squares[-1:])[0] <= tolerance * start)
            if should_check_convergence(term, terms, start) and not bool(active.any()):
                break
        if term % READ_EVERY == 0 and terms - term >= READ_EVERY and _is_bad(_lengths(squares)):
            break
    torch._foreach_mul_(total.held, step)
    x, figures = total.entries, torch.stack([part for parts in (*squares, last) for part in parts])

    def read(found: list[float]) -> Solution:
        sides, size = figures[0].numel(), len(squares[0])
        count = sides * size * len(squares)
        pieces = [iter(found[r:count:sides]) for r in range(sides)]
        norms = [[math.sqrt(sum(parts)) for parts in zip(*[one] * size, strict=True)] for one in pieces]  # of each side
        bad, told, walked = _bad_term(norms), State(), 0
        if bad is None:
            curvatures = [sum(found[count + r :: sides]) / (of_one[-2:][0] ** 2 or 1.0) for r, of_one in enumerate(norms)]
            status, detail = _remark(A, norms, curvatures, step, tolerance)
        else:
            status, detail, told, walked = _diagnose(A, g, step, norms, bad)
        history = figures.new_tensor([[norm / (of_one[0] or 1.0) for norm in of_one[1:]] for of_one in norms])
        return Solution(
            value=x,
            status=status,
            detail=detail,
            residuals=history.T if batched else history[0],
            products=len(squares) - 1 + walked,
            step_size=step,
            state=told,
        )

    return Unread(value=x, figures=figures.flatten(), read=read)


def _lengths(squares: list[list[Tensor]]) -> Tensor:
    """The norms of some vectors from the squares of their parts: shape (vectors,), or (vectors, R)."""
    flat = torch.stack([part for parts in squares for part in parts])
    return flat.reshape(len(squares), -1, *flat.shape[1:]).sum(1).sqrt()


def _is_bad(history: Tensor) -> bool:
    """Whether a norm is not finite or over the limit. One look of the host at the device."""
    return not bool(((history <= GROWTH_LIMIT * history[0]) & history.isfinite()).all())


def _bad_term(norms: list[list[float]]) -> int | None:
    """The first term whose norm is not finite or over the limit for any right-hand side, or ``None``."""
    found = [
        next((k for k, norm in enumerate(of_one) if not norm <= GROWTH_LIMIT * of_one[0] < math.inf), None)
        for of_one in norms
    ]
    return min((k for k in found if k is not None), default=None)


def _remark(
    A: Operator, norms: list[list[float]], curvatures: list[float], step: float, tolerance: float
) -> tuple[Status, str]:
    """What a bounded series tells: its vectors shrink steadily where every eigenvalue of αA lies in [0, 1]."""
    growth = any(now > before * (1 + 1e-5) for of_one in norms for before, now in pairwise(of_one))
    if tolerance and all(of_one[-1] <= tolerance * of_one[0] for of_one in norms):
        return Status.CONVERGED, ""
    low, high = min(curvatures), max(curvatures)
    if low * step < NEGATIVE:
        return Status.NEGATIVE_CURVATURE, f"the curvature along the last term is {low:.3g}"
    if growth and high * step > 1:
        return Status.GROWING, f"step size {step:.3g}, curvature along the last term {high:.3g}"
    if growth and A.symmetric:
        return Status.NEGATIVE_CURVATURE, "a term is longer than the one before it, though the step is small enough"
    if growth:
        return Status.GROWING, f"step size {step:.3g}: a term is longer than the one before it, since A is not symmetric"
    return Status.FINISHED, ""


def _diagnose(A: Operator, g: Tree, step: float, norms: list[list[float]], bad: int) -> tuple[Status, str, State, int]:
    """Walk to the bad term again with vectors kept at unit length, to see which curvature the series grew along.

    Returns what happened, in words too, a direction for the next bound, and the products spent.
    """
    if bad == 0:
        return Status.NON_FINITE_GRADIENT, "the right-hand side of the system is not finite", {}, 0
    if any(math.isnan(of_one[bad]) for of_one in norms):  # growth makes infinities first
        return Status.NON_FINITE_PRODUCT, f"at term {bad}", {}, 0
    worst = max(range(len(norms)), key=lambda r: norms[r][bad] if math.isfinite(norms[r][bad]) else math.inf)
    if A.is_batched(g):
        g = trees.part(g, worst)
    vector, curvature, square = trees.clone(g), 0.0, 0.0
    for walked in range(1, bad + 1):
        vector = trees.unit(vector)
        product = A.T @ vector
        curvature, square = torch.stack([trees.dot(vector, product), trees.dot(product, product)]).tolist()
        if not math.isfinite(curvature):
            return Status.NON_FINITE_PRODUCT, f"at term {bad}", {}, walked
        trees.add_(vector, product, alpha=-step)
    times = norms[worst][bad] / norms[worst][0] if norms[worst][0] else math.inf
    grown = f"the series grew to {times:.3g} times its start at term {bad}"
    if step * curvature > 1 or (curvature > 0 and not A.symmetric):
        allowed = 2 * curvature / square  # for a longer step than this, v − αAᵀv is longer than v
        advice = f"step size {step:.3g} against a curvature of {curvature:.3g}, which allows less than {allowed:.3g}"
        return Status.STEP_TOO_LARGE, f"{grown}: {advice}", {"direction": trees.unit(vector)}, bad
    if curvature > 0 and math.isinf(norms[worst][bad]):  # of a longer vector than this walk's
        return Status.NON_FINITE_PRODUCT, f"at term {bad}", {}, bad
    return Status.CURVATURE_TOO_NEGATIVE, f"{grown}, along a curvature of {curvature:.3g}", {}, bad


def _without_bound(A: Operator, g: Tree, length: float, bound: float, spent: int) -> Solution:
    """The end of a solve for which no step could be chosen; x = 0 is right where g is zero."""
    if not math.isfinite(length):
        status = Status.NON_FINITE_GRADIENT
    elif not math.isfinite(bound):
        status = Status.NON_FINITE_PRODUCT
    else:
        status = Status.FINISHED if length == 0 else Status.NO_CURVATURE
    norm = trees.norm(g, batched=A.is_batched(g))
    residuals = norm.new_empty((0, *norm.shape))
    return Solution(value=trees.zeros_like(g), status=status, residuals=residuals, products=spent, state={})


def _start(A: Operator, g: Tree) -> Tree:
    return start_vector(A.like, trees.map_tree(lambda value: value.sum(0), g) if A.is_batched(g) else g)
