"""Checks at the first loss and the first steps, so that mistakes show at once and not after the warm-up."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import trees
from hoptim.linalg.vectors import Tree
from hoptim.methods.method import Method, TrainingContext
from hoptim.problem.kept import Kept, copied
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.problem.random_stream import set_generators
from hoptim.problem.wrappers import is_compiled
from hoptim.solvers.solution import Status

ALIKE, UNLIKE = 0.9, 0.5  # below these cosines two gradients are not of one loss, without and with clipping
_NON_FINITE = (Status.NON_FINITE_LOSS, Status.NON_FINITE_GRADIENT, Status.NON_FINITE_PRODUCT)


def dry_run(
    problem: Problem,
    method: Method,
    train_batch: Any,
    val_batch: Any,
    loop: TrainingContext,
    val_weights: list[float] | None = None,
) -> None:
    """Compute a hypergradient and throw it away: this changes nothing, and raises what the first hyperstep would raise.

    On an untrained model it says little whether a solve succeeds, but an infinite or NaN value is worth a warning.
    """
    with annotate_errors("in the dry run, which computes what each hyperstep does"):
        problem.check_ranks()
        result = method.cut_short()(problem, train_batch, val_batch, loop=loop)
        result.check_touched(loop.learned, sees_options=method.sees_options)
        result.combined(val_weights)
    status, detail = result.solution.status, result.solution.detail
    if status in _NON_FINITE:
        warnings.warn(f"in the dry run: {status.name}: {status.message} ({detail})", stacklevel=4)


class FirstSteps:
    """Looks for common mistakes of a training loop at its first losses and steps.

    These are: ``optimizer.loss`` is never called; the inner optimizer is stepped instead of the BilevelOptimizer; another
    loss goes backward than the one from ``optimizer.loss``.

    Args:
        needs_losses: whether hypersteps need the batches given to ``optimizer.loss``.
    """

    def __init__(self, needs_losses: bool) -> None:
        self._needs_losses = needs_losses
        self._steps = self._losses = 0
        self._has_closures = False  # with closures, weights move and losses are computed within a step
        self._version: int | None = None  # of the weights at the last loss, if no step has come since
        self._since_step: list[tuple[Kept, dict[str, Tensor]]] = []  # up to two losses: batch, random states before

    def before_loss(self, problem: Problem, batch: Any, check: Callable[[], None]) -> None:
        """Call this before a training loss is computed; the first time it calls ``check``."""
        if not self._losses:
            check()
        self._losses += 1
        version = sum(w._version for w in problem.weights().values())
        if self._version not in (None, version) and not self._has_closures:
            warnings.warn(
                f"the weights have moved between losses {self._losses - 1} and {self._losses} without a step of the "
                "BilevelOptimizer. If the inner optimizer is stepped in its place, call optimizer.step() on the "
                "BilevelOptimizer, or no hyperstep will come. If a step moves the weights twice, as that of SAM does, "
                "give both losses to it as a closure, optimizer.step(closure)",
                stacklevel=4,
            )
        self._version = version
        if len(self._since_step) < 2 and not self._steps:
            self._since_step.append((copied(batch), problem.generators()))

    def before_step(self, problem: Problem, *, has_closure: bool) -> FirstSteps | None:
        """Call this before a step is taken. Returns itself, or ``None`` if there is nothing more to check.

        Raises:
            ValueError: it is the second step and ``optimizer.loss`` was not called, though hypersteps need it.
        """
        if not self._losses and self._needs_losses and self._steps:  # torch itself may take one step, to make a state
            raise ValueError(
                "two steps were taken and no loss has come from optimizer.loss(batch), so that a hyperstep would have no "
                "training batch: compute the loss with it in place of the criterion, or give train_batches"
            )
        self._has_closures = has_closure
        if not self._steps and len(self._since_step) == 1 and not has_closure:
            kept, generators = self._since_step[0]
            _check_gradient(problem, kept.batch, generators)
        self._steps += 1
        self._version, self._since_step = None, []
        return self if self._steps < 2 else None


def _check_gradient(problem: Problem, batch: Any, generators: dict[str, Tensor]) -> None:
    """Warn if the weights' ``.grad`` is not the gradient of the training loss on this batch."""
    if is_compiled(problem.wrapper) or problem.ranks.size > 1:  # other masks; other ranks may have more losses
        return
    live = {name: w for name, w in problem.weights().items() if w.grad is not None and not w.grad.is_sparse}
    if not live:
        return
    expected = _gradient(problem, batch, generators)
    pairs = {name: (w.grad, expected[name]) for name, w in live.items() if w.grad is not None and name in expected}
    given, own = ({name: pair[side].float() for name, pair in pairs.items()} for side in (0, 1))
    lengths = [float(trees.norm(x)) for x in (given, own)]
    product = lengths[0] * lengths[1]
    if not 0 < product < float("inf"):
        return
    cosine = float(trees.dot(given, own)) / product
    if cosine < (ALIKE if lengths[0] > ALIKE * lengths[1] else UNLIKE):  # clipped gradients are shorter, and may be turned
        warnings.warn(
            f"the gradient of the first step is not that of train_loss: their cosine is {cosine:.2f}, their lengths are "
            f"{lengths[0]:.3g} and {lengths[1]:.3g}. Hypergradients are for train_loss alone. If something is added to "
            "optimizer.loss(batch) before backward(), or a gradient is added to, put it into train_loss; if train_loss "
            "draws random numbers elsewhere than from torch's generators, that is all it is",
            stacklevel=4,
        )


def _gradient(problem: Problem, batch: Any, generators: dict[str, Tensor]) -> Tree:
    """∇_w L_T on this batch, from these random states."""
    with problem.leave_no_trace():
        set_generators(generators)
        with problem.at() as at, at.loss("train_loss", batch) as (loss, *_):
            found = torch.autograd.grad(loss, list(at.weights.values()), allow_unused=True)
            return trees.present(dict(zip(at.weights, found, strict=True)))
