"""What an audit measures: the spectrum, other methods, real retraining, the noise of the validation batch, a bound."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from hoptim.curvature.finite_difference import gradients
from hoptim.curvature.gauss_newton import GaussNewton
from hoptim.curvature.linearization import Linearization
from hoptim.diagnostics.report import Compared, ErrorBound, Spectrum
from hoptim.linalg import dicts, vectors
from hoptim.linalg.lanczos import lanczos
from hoptim.linalg.random import gaussian_like
from hoptim.linalg.vectors import Layout, Tensors
from hoptim.methods.implicit import Implicit
from hoptim.methods.kinds import is_differentiable
from hoptim.methods.method import Method, TrainingContext
from hoptim.methods.result import Hypergradient
from hoptim.methods.unrolled import Unrolled
from hoptim.methods.validation_loss import validate
from hoptim.problem.problem import At, Problem, as_leaves
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.minres import MINRES
from hoptim.training.record import cosine
from hoptim.training.record import standard_error as spread_of


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The problem with its batches; called with a method, it returns the hypergradient."""

    problem: Problem
    train: Any
    val: Any
    loop: TrainingContext

    def __call__(self, method: Method) -> Hypergradient:
        """The hypergradient by this method."""
        return method(self.problem, self.train, self.val, loop=self.loop)

    def gradient(self) -> None:
        """One training gradient: the unit of cost."""
        leaves = dicts.map_tensors(Tensor.detach, self.problem.leaves())
        with (
            self.problem.leave_no_trace(),
            self.problem.at(leaves=leaves) as at,
            at.loss("train_loss", self.train) as (loss, *_),
        ):
            torch.autograd.grad(loss, list(at.weights.values()), allow_unused=True)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measurements from one graph at the present weights.

    Attributes:
        spectrum: the ends of A's spectrum; ``None`` if A is not symmetric.
        top: the largest magnitude in it, 1 if it is unknown.
        distance: the length of a Newton step relative to that of the weights; ``None`` if its solve failed.
        newton: that step, by the names of the weights.
        product_seconds: the time of one product.
    """

    spectrum: Spectrum | None
    top: float
    distance: float | None
    newton: Tensors
    product_seconds: float


def look(setup: Setup, method: Implicit) -> Measured:
    """The spectrum, a Newton step and the cost of a product, from one graph."""
    with _condition(setup, method) as (at, F):
        A = F.A + method.damping
        probe = gaussian_like(F.value)
        known = A.is_symmetric and A.is_fixed
        spectrum = Spectrum.of(lanczos(A, A.gaussian(2), min(A.size, 30))) if known else None
        newton = (MINRES if A.is_symmetric else GMRES)(terms=30).solve(A.T, F.value) if A.is_fixed else None
        away = math.nan
        if newton is not None and newton.status.ok:
            away = float(vectors.norm(newton.value) / dicts.norm(at.weights).detach())
        return Measured(
            spectrum=spectrum,
            top=max(abs(spectrum.lowest), abs(spectrum.highest)) if spectrum else 1.0,
            distance=away if math.isfinite(away) else None,
            newton=F.layout.unflatten(newton.value) if newton is not None else {},
            product_seconds=seconds(lambda: A.T @ probe),
        )


@contextmanager
def _condition(setup: Setup, method: Implicit) -> Iterator[tuple[At, Linearization]]:
    """The method's F at the present weights."""
    with setup.problem.leave_no_trace(), setup.problem.at() as at, method.linearize(at, setup.train, setup.loop) as F:
        yield at, F


def compared(
    setup: Setup, method: Method, result: Hypergradient, reference: Hypergradient | None, inner: Optimizer, steps: int
) -> Iterator[Compared]:
    """This hypergradient beside a longer solve of the same system, and beside unrolled steps."""
    if reference is None:  # there is no system
        return
    if reference.solution.status.ok:
        name = f"{reference.solution.products} products (residual {float(reference.solution.residuals[-1].amax()):.0e})"
        yield _beside(name, result, reference)
    if not isinstance(method, Unrolled) and is_differentiable(inner):
        unrolled = Unrolled(steps)(setup.problem, setup.train, setup.val, loop=replace(setup.loop, inner=inner))
        if unrolled.solution.status.ok:
            yield _beside(f"unrolling {steps} steps", result, unrolled)


def _beside(name: str, this: Hypergradient, other: Hypergradient) -> Compared:
    a, b = this.combined(), other.combined()
    return Compared(other=name, cosine=cosine(a, b), length=float(dicts.norm(a) / dicts.norm(b)))


def standard_error(setup: Setup, method: Method, chunks: int) -> float | str:
    """√(Σ_r ‖h_r − h‖² / (R(R−1))) / ‖h‖ over R chunks of the validation batch; or why it is unknown."""
    parts = _split(setup.val, chunks)
    if parts is None:
        return "the standard error: the validation batch's tensors share no first axis to split along"

    def losses(model: Any, hparams: Any, batches: list[Any]) -> Tensor:
        return torch.stack([setup.problem.call_loss("val_loss", model, hparams, batch)[0].mean() for batch in batches])

    given, options = setup.problem, {"has_aux": setup.problem.has_aux, "process_group": setup.problem.process_group}
    problem = Problem(given.model, given.hparams, given.train_loss, losses, **options)
    try:
        result = method(problem, setup.train, parts, loop=setup.loop)
    except Exception as caught:  # of the user's loss, which may not be made for parts
        reason = str(caught).strip().partition("\n")[0]
        return f"the standard error: val_loss fails on a part of the validation batch ({type(caught).__name__}: {reason})"
    error = spread_of(result)
    if not result.solution.status.ok or error is None or not math.isfinite(error):
        return f"the standard error: for a part of the validation batch the solve ended in {result.solution.status.name}"
    return error


def _split(batch: Any, chunks: int) -> list[Any] | None:
    """The batch in parts along the first axis that its tensors share."""
    leaves, spec = pytree.tree_flatten(batch)
    sizes = {len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1 or (size := sizes.pop()) < 2:
        return None
    bounds = torch.linspace(0, size, min(chunks, size) + 1).round().long().tolist()
    return [
        pytree.tree_unflatten([leaf[a:b] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in leaves], spec)
        for a, b in pairwise(bounds)
    ]


def error_bound(setup: Setup, method: Implicit, result: Hypergradient, local: Measured) -> ErrorBound | None:
    """How far the hypergradient can be off; ``None`` if A is not positive definite, or the hypergradient is zero."""
    lowest = local.spectrum.lowest if local.spectrum else 0.0
    known = isinstance(method.curvature, GaussNewton) and 0 < 0.99 * method.damping <= lowest
    mu = method.damping if known else lowest
    length = float(dicts.norm(result.grads))
    if not result.solution.status.ok or result.val_loss.ndim or mu <= 1e-6 * local.top or not length:
        return None
    with setup.problem.leave_no_trace(), setup.problem.at() as at:
        g = validate(at, setup.val).g
    with _condition(setup, method) as (at, F):
        A, x = F.A + method.damping, F.layout.flatten(result.solution.value)
        residual, B = float(vectors.norm(F.layout.flatten(g) - A.T @ x)), _mixed_norm(at, setup.train, F)
    with _moved(setup.problem.weights(), local.newton):
        there = setup(method)
    change = float(dicts.norm({name: t - result.grads[name] for name, t in there.grads.items()}))
    return ErrorBound(mu=mu, known=known, solve=B * residual / (mu * length), inner=change / length)


def _mixed_norm(at: At, batch: Any, F: Linearization, products: int = 10) -> float:
    """‖B‖₂ by power iteration on BᵀB; B u is a central difference of gradients in λ."""
    layout = Layout.of(at.leaves)
    leaves = layout.flatten(at.leaves).detach()
    u, size = vectors.unit(gaussian_like(leaves)), 0.0
    reach = float(at.problem.rounding(layout.dtypes) ** (1 / 3) * (1 + vectors.norm(leaves)))
    for _ in range(products):
        ends = [as_leaves(layout.unflatten(leaves + sign * reach * u)) for sign in (1, -1)]
        up, down = (F.layout.flatten(gradients(replace(at, leaves=end), batch)[1]) for end in ends)
        Bu = (up - down) / (2 * reach)
        size = max(size, float(vectors.norm(Bu)))
        u = vectors.unit(layout.flatten(F.mixed(Bu)))
    return size


@contextmanager
def _moved(live: Tensors, step: Tensors) -> Iterator[None]:
    """Subtract a step from the live weights, in new memory, so that graphs of the old values still work."""
    before = {name: live[name].data for name in step}
    try:
        for name, part in step.items():
            live[name].data = before[name] - part
        yield
    finally:
        for name, value in before.items():
            live[name].data = value


def seconds(call: Callable[[], Any]) -> float:
    """Wall-clock time of a call: the shortest of three, after one to warm up."""
    call()
    found = []
    for _ in range(3):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return min(found)
