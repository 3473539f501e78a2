"""audit: is this hypergradient right, on this model?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import cycle, pairwise
from typing import Any

import torch
from torch.optim import Optimizer

from hoptim.checks import is_whole
from hoptim.curvature.exact import Exact
from hoptim.diagnostics.evidence import Setup, compared, error_bound, look, seconds, standard_error
from hoptim.diagnostics.report import Audit, Direction, brief
from hoptim.diagnostics.retraining import slopes
from hoptim.methods.conditions import Gradient, Update
from hoptim.methods.hypergradient import default_method
from hoptim.methods.implicit import Implicit
from hoptim.methods.kinds import is_differentiable
from hoptim.methods.method import Method, check_one_training, checked
from hoptim.methods.replay import Replay
from hoptim.methods.result import Hypergradient
from hoptim.methods.unrolled import Unrolled
from hoptim.problem.composite_loss import CompositeLoss
from hoptim.problem.data import Batches
from hoptim.problem.problem import Problem
from hoptim.solvers.base import Solver
from hoptim.solvers.cg import CG
from hoptim.solvers.chebyshev import Chebyshev
from hoptim.solvers.gmres import GMRES
from hoptim.solvers.minres import MINRES
from hoptim.solvers.neumann import Neumann
from hoptim.solvers.warm_start import WarmStart
from hoptim.training.record import cosine

PATH = (1, 2, 5, 10, 20, 50, 100)  # numbers of terms on the path to the answer


def audit(
    problem: Problem,
    train_batch: Any,
    val_batch: Any,
    method: Method | None = None,
    *,
    inner: Optimizer | None = None,
    options: Mapping[str, Any] | None = None,
    train_batches: Iterable[Any] | Callable[[], Any] | None = None,
    longer: int = 200,
    steps: int = 100,
    directions: int = 2,
    chunks: int = 8,
) -> Audit:
    """Is this hypergradient right, on this model? Measured at the model's present weights, without changing it.

    It looks at the residual of the solve, the spectrum, a much longer solve of the same system, unrolled steps, finite
    differences of real retraining along the hypergradient and along random directions, and the noise of the validation
    batch. Retraining takes most of the time, about 4·``steps``·(``directions`` + 1) training gradients.

    Args:
        problem: the bilevel problem, trained as far as it will be at a hyperstep.
        train_batch: the batch for the training loss.
        val_batch: the batch for the validation loss.
        method: the method to audit; default ``Implicit()``, or ``Unrolled()`` if an option of ``inner`` is learned.
        inner: the inner optimizer, to retrain with; by default plain gradient descent with the step 1 / ‖A‖.
        options: the options of ``inner`` that are hyperparameters, as in ``hypergradient``.
        train_batches: batches to retrain on; by default ``train_batch`` in each step.
        longer: the most products of the longer solve, ≥ 1, default 200.
        steps: inner steps of each retraining, ≥ 1, default 100.
        directions: random directions besides the hypergradient's own, ≥ 0, default 2.
        chunks: parts of the validation batch for the standard error, ≥ 2, default 8.

    Returns:
        The results: print them, or take ``.to_dict()``, ``.plot(path)``, ``.advice``.

    Raises:
        TypeError: ``problem`` is no :class:`Problem`, or ``method`` no method.
        ValueError: several processes train together, a number is out of its range, or what ``hypergradient`` raises.

    Source: the bound of the solve: Ehrhardt and Roberts 2023 (arXiv 2301.04764), section 3.

    >>> from torch import nn
    >>> model, hparams = nn.Linear(1, 1, bias=False), nn.ParameterDict({"decay": torch.tensor(1.0)})
    >>> _ = model.weight.data.fill_(2.0)
    >>> def train(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 4.0).square().mean() + 0.5 * hparams["decay"] * model.weight.square().sum()
    >>> def val(model, hparams, batch):
    ...     return 0.5 * (model(batch) - 1.0).square().mean()
    >>> found = audit(Problem(model, hparams, train, val), torch.ones(8, 1), torch.ones(8, 1), steps=20)
    >>> found.status.name, round(found.compared[0].cosine, 3), found.directions[0].verdict, found.advice
    ('CONVERGED', 1.0, 'agrees', ())
    """
    loop = checked(problem, method, inner, options)
    check_one_training("method", method)
    inner = loop.inner
    if problem.is_sharded or problem.ranks.size > 1:
        raise ValueError(
            f"an audit is for one process, and {problem.ranks.size} train together here: audit on one of them, on a problem "
            "of a model that is neither wrapped nor sharded, Problem(model, ..., process_group=None)"
        )
    for name, value, least in (
        ("longer", longer, 1),
        ("steps", steps, 1),
        ("directions", directions, 0),
        ("chunks", chunks, 2),
    ):
        if not (is_whole(value) and value >= least):
            raise ValueError(f"{name}={value!r}: give a whole number, {least} or more")
    method = default_method(loop.learned) if method is None else method
    if isinstance(method, Replay) and train_batch is None:
        train_batch = method.batches[0]  # for the unit of cost, and the curvature at the start
    other = Implicit() if all(option.is_decay for option in loop.learned) else Implicit(condition=Update())
    implicit = (method if isinstance(method, Implicit) else other).completed(problem)
    method = implicit if isinstance(method, Implicit) else method
    draw = cycle([train_batch]).__next__ if train_batches is None else Batches(train_batches, "train_batches").draw
    setup = Setup(problem=problem, train=train_batch, val=val_batch, loop=replace(loop, draw=draw))

    result = setup(method)
    result.check_touched(loop.learned, sees_options=method.sees_options)
    gradient_seconds = seconds(setup.gradient)
    cost = seconds(lambda: setup(method)) / gradient_seconds
    local = look(setup, implicit)
    reference = None if isinstance(method, Replay) else setup(replace(implicit, solver=_longer(implicit, longer)))
    retrainer = inner or torch.optim.SGD(problem.weights().values(), lr=1 / max(local.top, 1e-12))
    error = standard_error(setup, method, chunks)
    directions_found = _measured(setup, method, result, retrainer, steps, directions)
    found = Audit(
        method=brief(method),
        status=result.solution.status,
        detail=result.solution.detail,
        gradient_norm=float(result.gradient_norm),
        distance=local.distance,
        spectrum=local.spectrum,
        residuals=tuple(float(row.amax()) for row in result.solution.residuals),
        compared=tuple(compared(setup, method, result, reference, retrainer, steps)),
        directions=() if isinstance(directions_found, str) else directions_found,
        standard_error=None if isinstance(error, str) else error,
        bound=error_bound(setup, implicit, result, local) if implicit is method else None,
        product_cost=local.product_seconds / gradient_seconds,
        cost=cost,
        path=tuple(_path(setup, method, reference)),
        missing=tuple(_missing(error, directions_found, reference, method, retrainer)),
    )
    shows_parts = isinstance(problem.train_loss, CompositeLoss)
    return replace(found, advice=tuple(_advice(found, method, shows_parts=shows_parts)))


def _measured(
    setup: Setup, method: Method, result: Hypergradient, inner: Optimizer, steps: int, count: int
) -> tuple[Direction, ...] | str:
    """The slopes by retraining; or why they could not be measured."""
    if not result.solution.status.ok:
        return "retraining: the hypergradient itself has failed"
    if setup.loop.learned and not is_differentiable(inner):
        return f"retraining: an option of {type(inner).__name__} is learned, in which torch can't differentiate its step"
    try:
        return tuple(slopes(setup, method, result, inner, steps, count))
    except Exception as caught:
        if is_differentiable(inner):
            raise
        reason = str(caught).strip().partition("\n")[0]
        who = type(inner).__name__
        return f"retraining: a copy of {who} and the model can't be trained ({type(caught).__name__}: {reason})"


def _missing(
    error: float | str,
    directions: tuple[Direction, ...] | str,
    reference: Hypergradient | None,
    method: Method,
    inner: Optimizer,
) -> Iterator[str]:
    """What could not be measured, and why."""
    if isinstance(error, str):
        yield error
    if isinstance(directions, str):
        yield directions
    if reference is not None and not reference.solution.status.ok:
        yield f"the longer solve: it ended in {reference.solution.status.name}"
    if reference is not None and not isinstance(method, Unrolled) and not is_differentiable(inner):
        yield f"unrolling: torch can't differentiate a step of {type(inner).__name__}"


def _more_terms(method: Method) -> str:
    """The advice for a solve that is too short."""
    solver = method.solver if isinstance(method, Implicit) else None
    inside = solver.solver if isinstance(solver, WarmStart) else solver
    if isinstance(inside, (CG, MINRES, GMRES)):
        return f"take more terms than {brief(inside)} has, or damping"
    if isinstance(inside, (Neumann, Chebyshev)):
        return f"take more terms than {brief(inside)} has, or hoptim.CG or MINRES, which need fewer"
    return f"take hoptim.MINRES in place of {type(inside).__name__}"


def _longer(method: Implicit, terms: int) -> Solver:
    """The solver of the reference: MINRES for a symmetric curvature, else GMRES."""
    return (
        MINRES(terms=terms, tolerance=1e-6)
        if isinstance(method.condition, Gradient)
        else GMRES(terms=min(terms, 100), tolerance=1e-6)
    )


def _path(setup: Setup, method: Method, reference: Hypergradient | None) -> Iterator[tuple[int, float, float]]:
    """Residual and cosine to the longer solve, for fewer terms of the same solver and for its own number."""
    if not isinstance(method, Implicit) or reference is None or not reference.solution.status.ok:
        return
    solver = method.solver.solver if isinstance(method.solver, WarmStart) else method.solver
    if not isinstance(solver, (Neumann, Chebyshev, CG, MINRES, GMRES)):
        return
    most = solver.terms
    for terms in sorted({*(t for t in PATH if t < most), most}):
        result = setup(replace(method, solver=replace(solver, terms=terms)))
        if result.solution.status.ok and len(result.solution.residuals):
            residual = float(result.solution.residuals[-1].amax())
            yield terms, residual, cosine(result.combined(), reference.combined())


def _advice(found: Audit, method: Method, *, shows_parts: bool) -> Iterator[str]:
    """What to change, the most serious first."""
    if not found.status.ok:
        yield f"the solve failed: {found.status.message}"
        return
    if isinstance(method, Implicit) and found.distance is not None and found.distance > 0.1:
        yield (
            f"the weights are {found.distance:.0%} of their length from a stationary point: train longer before a hyperstep "
            "(warmup, every), or take hoptim.Unrolled, which does not need one"
        )
    low, high = (found.spectrum.lowest, found.spectrum.highest) if found.spectrum else (0.0, 1.0)
    if isinstance(method, Implicit) and isinstance(method.curvature, Exact) and low < -1e-3 * abs(high):
        way = "GaussNewton()" if shows_parts else "GaussNewton(), with the loss as a hoptim.CompositeLoss"
        yield f"the curvature goes down to {low:.1e}: take curvature=hoptim.{way}, or damping above {-low:.1e}"
    wrong = [line.name for line in found.directions if line.verdict == "opposite sign"]
    if wrong:
        yield (
            f"retraining has the opposite sign along {', '.join(wrong)}: do not trust it there. Try another solver, or "
            "fewer terms (stopping early regularises), and retrain for longer (steps=) to be sure"
        )
    own = found.directions[0] if found.directions else None
    if own and own.verdict.startswith("same sign"):
        yield (
            f"it points downhill, but is {own.predicted / own.measured:.2g} times as long as retraining says: choose the "
            "outer learning rate by that, or an outer optimizer that looks at no lengths, such as Adam"
        )
    if own and own.verdict == "diverges":
        yield "retraining diverges: take fewer steps (steps=), or an inner optimizer with a smaller learning rate"
    if own and own.verdict == "does not move":
        yield (
            "retraining ends at the same loss with other hyperparameters: is a tolerance of the inner optimizer, as "
            "tolerance_grad and tolerance_change of LBFGS, larger than the change? Give the audit one with smaller ones"
        )
    if own and own.verdict == "lost in noise":
        yield "along the hypergradient retraining shows no slope beyond its noise: retrain for longer (steps=) to be sure"
    if isinstance(method, Implicit) and found.compared and found.compared[0].cosine < 0.9:
        last, cosine_to = found.residuals[-1] if found.residuals else 1.0, found.compared[0].cosine
        but = "" if wrong or not found.directions else ", though retraining agrees with it as it is"
        yield (
            f"a longer solve of the same system points elsewhere (cosine {cosine_to:.2f}), and the residual is {last:.1g}: "
            f"{_more_terms(method)}{but}"
        )
    if turn := next(((a, b) for a, b in pairwise(found.path) if a[2] * b[2] < 0), None):
        (few, _, before), (more, _, after) = turn
        yield (
            f"between {few} and {more} terms the answer turns round (cosine {before:.3f} and {after:.3f} to the longer "
            f"solve), so that its sign depends on their number: {_more_terms(method)}, until it no longer changes"
        )
    if found.standard_error is not None and found.standard_error > 0.5:
        yield (
            f"the validation batch's noise is {found.standard_error:.0%} of the hypergradient: a larger validation batch, "
            "or a smaller outer learning rate"
        )
