"""Checks at the first loss, the first steps and the first hyperstep, so that mistakes show at once; and of lost weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hoptim.linalg import dicts
from hoptim.linalg.vectors import Tensors
from hoptim.methods.method import Method, TrainingContext
from hoptim.problem.loss_checks import annotate_errors
from hoptim.problem.problem import Problem
from hoptim.problem.random_stream import set_generators
from hoptim.problem.sharding import whole
from hoptim.problem.wrappers import is_compiled
from hoptim.solvers.solution import Status
from hoptim.training.recent_steps import RecentSteps, SeenLoss

ALIKE, UNLIKE = 0.9, 0.5  # below these cosines two gradients are not of one loss, without and with clipping
MANY, FEW = 1000, 0.01  # warn if, of at least so many entries, at most this share has a gradient
GONE = 0.01  # of the norm at the start; in scripts/studies/one_training models kept 5 %, those that died less than 1 %
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
        warnings.warn(f"in the dry run: {status.name}: {status.message} ({detail})", stacklevel=7)


@dataclass
class FirstSteps:
    """Looks for common mistakes of a training loop until its second step.

    These are: ``optimizer.loss`` is never called; the inner optimizer is stepped instead of the BilevelOptimizer; another
    loss goes backward than the one from ``optimizer.loss``.

    Args:
        needs_losses: whether hypersteps need the batches given to ``optimizer.loss``.
    """

    needs_losses: bool
    steps: int = 0
    _has_closures: bool = False  # with closures, weights move and losses are computed within a step
    _version: int | None = None  # of the weights at the last loss, if no step has come since

    def before_loss(self, problem: Problem, recent: RecentSteps, check: Callable[[], None]) -> None:
        """Call this before a training loss is computed; the first time it calls ``check``."""
        if not recent.computed:
            check()
        version = sum(w._version for w in problem.weights().values())
        if self._version not in (None, version) and not self._has_closures:
            warnings.warn(
                f"the weights have moved between losses {recent.computed} and {recent.computed + 1} without a step of the "
                "BilevelOptimizer. If the inner optimizer is stepped in its place, call optimizer.step() on the "
                "BilevelOptimizer, or no hyperstep will come. If a step moves the weights twice, as that of SAM does, "
                "give both losses to it as a closure, optimizer.step(closure)",
                stacklevel=4,
            )
        self._version = version

    def before_step(self, problem: Problem, recent: RecentSteps, *, has_closure: bool) -> None:
        """Call this before a step is taken.

        Raises:
            ValueError: it is the second step and ``optimizer.loss`` was not called, though hypersteps need it.
        """
        if not recent.computed and self.needs_losses and self.steps:  # torch itself may take one step, to make a state
            raise ValueError(
                "two steps were taken and no loss has come from optimizer.loss(batch), so that a hyperstep would have no "
                "training batch: compute the loss with it in place of the criterion, or give train_batches"
            )
        losses = recent.losses()
        if not self.steps and len(losses) == 1 and not has_closure:
            _check_gradient(problem, losses[0])
        self.steps, self._has_closures, self._version = self.steps + 1, has_closure, None


def _check_gradient(problem: Problem, loss: SeenLoss) -> None:
    """Warn if the weights' ``.grad`` is not the gradient of this training loss."""
    if is_compiled(problem.wrapper) or problem.ranks.size > 1:  # other masks; other ranks may have more losses
        return
    live = {name: w for name, w in problem.weights().items() if w.grad is not None and not w.grad.is_sparse}
    if not live:
        return
    expected = _gradient(problem, loss)
    pairs = {name: (whole(w.grad), expected[name]) for name, w in live.items() if w.grad is not None and name in expected}
    given, own = ({name: pair[side].float() for name, pair in pairs.items()} for side in (0, 1))
    lengths = [float(dicts.norm(x)) for x in (given, own)]
    product = lengths[0] * lengths[1]
    if not 0 < product < float("inf"):
        return
    cosine = float(dicts.dot(given, own)) / product
    if cosine < (ALIKE if lengths[0] > ALIKE * lengths[1] else UNLIKE):  # clipped gradients are shorter, and may be turned
        warnings.warn(
            f"the gradient of the first step is not that of train_loss: their cosine is {cosine:.2f}, their lengths are "
            f"{lengths[0]:.3g} and {lengths[1]:.3g}. Hypergradients are for train_loss alone. If something is added to "
            "optimizer.loss(batch) before backward(), or a gradient is added to, put it into train_loss; if train_loss "
            "draws random numbers elsewhere than from torch's generators, that is all it is",
            stacklevel=6,
        )


def _gradient(problem: Problem, loss: SeenLoss) -> Tensors:
    """∇_w L_T of a loss, computed again."""
    with problem.leave_no_trace():
        set_generators(loss.generators or {})
        with problem.at() as at, at.loss("train_loss", loss.batch.batch) as (value, *_):
            found = torch.autograd.grad(value, list(at.weights.values()), allow_unused=True)
            return dicts.present(dict(zip(at.weights, found, strict=True)))


def warn_of_first_hyperstep(before: Tensors, after: Tensors, grads: Tensors, every: int | None) -> None:
    """Warn if the first outer step took most of a hyperparameter to zero, or had a gradient for hardly any of it."""
    for name in before.keys() & grads.keys():
        old, new, reached, size = before[name], after[name], int(grads[name].count_nonzero()), grads[name].numel()
        positive = old > 0
        share = float(((new.abs() < 0.01 * old) & positive).sum() / positive.sum().clamp(min=1))
        if share > 0.5:
            warnings.warn(
                f"the first outer step took {share:.0%} of hyperparameter {name!r} to zero, from {float(old.mean()):.3g} on "
                f"average to {float(new.mean()):.3g}: the outer rate is too large for it. Take one well below the value, or "
                "constraints.positive, under which steps are relative",
                stacklevel=7,
            )
        if size >= MANY and 0 < reached <= FEW * size:
            steps = "" if every is None else f", that is every {every * size // reached:,} training steps"
            warnings.warn(
                f"the first hyperstep has a gradient for {reached:,} of the {size:,} entries of hyperparameter {name!r}: at "
                f"this rate each is reached every {size // reached:,} hypersteps{steps}. Lower every, give train_batches "
                "with larger batches, or share one entry among many examples",
                stacklevel=7,
            )


def weight_norms(problem: Problem) -> dict[str, float]:
    """The norms of the matrices among the weights; others, such as biases and scales, may begin and stay near zero.

    Where weights are sharded, these are the norms of whole weights, and every rank has to call this.
    """
    live = problem.weights().items()
    weights = {name: weight.detach() for name, weight in live if weight.ndim > 1 and min(weight.shape[:2]) > 1}
    wide = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in weights.items()}
    found = [whole(torch.linalg.vector_norm(weight, dtype=wide[name])).float() for name, weight in weights.items()]
    return dict(zip(weights, torch.stack([one.to(found[0].device) for one in found]).tolist() if found else [], strict=True))


def vanished_weights(problem: Problem, begun: Mapping[str, float]) -> dict[str, str]:
    """A doubt if a weight has all but gone from the norm that it had when training began; none if no weight has."""
    shares = {name: now / begun[name] for name, now in weight_norms(problem).items() if begun.get(name)}
    name = min(shares, key=lambda name: shares[name], default=None)
    if name is None or not shares[name] < GONE:
        return {}
    return {
        "collapsed": f"weight {name!r} is at {shares[name]:.2g} of the norm that it had when training began. If a decay "
        "takes it to zero, it is too large: the model hardly depends on its input, and hypergradients say little. Start "
        "again with a smaller one"
    }
