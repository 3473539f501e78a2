"""The outer step: the outer optimizer moves the leaves by a hypergradient, and constraints are restored."""

from __future__ import annotations

import warnings

from torch.optim import Optimizer

from hoptim.linalg.vectors import Tree
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.problem.problem import Problem

MANY, FEW = 1000, 0.01  # warn if, of at least so many entries, at most this share has a gradient


def outer_step(problem: Problem, outer: Optimizer, grads: Tree) -> None:
    """One step of the outer optimizer with these hypergradients, after which every constraint holds.

    A hyperstep of :class:`BilevelOptimizer` does this once it has the hypergradient; call it in a loop of your own.

    Args:
        problem: the problem whose hyperparameters move.
        outer: the optimizer of ``problem.hparams.parameters()``.
        grads: dL_V/dλ by the names of ``problem.leaves()``, such as ``Hypergradient.grads``, or ``combined()`` if the
            validation loss is a vector.

    Raises:
        ValueError: ``grads`` lacks a hyperparameter, has another shape, or is not finite, as after a failed solve.

    >>> import torch
    >>> from torch import nn
    >>> from torch.distributions import constraints
    >>> model, hparams = nn.Linear(1, 1), HyperParameters({"decay": torch.tensor(0.1)}, {"decay": constraints.nonnegative})
    >>> def loss(model, hparams, batch):
    ...     return hparams["decay"] * model(batch).square().sum()
    >>> outer = torch.optim.SGD(hparams.parameters(), lr=1.0)
    >>> outer_step(Problem(model, hparams, loss, loss), outer, {"decay": torch.tensor(0.5)})
    >>> hparams["decay"].item()
    0.0
    """
    leaves = problem.leaves()
    for name, leaf in leaves.items():
        if name not in grads:
            raise ValueError(f"grads have nothing for hyperparameter {name!r}: give result.grads, by all names")
        if grads[name].shape != leaf.shape:
            raise ValueError(
                f"the hypergradient of {name!r} has shape {tuple(grads[name].shape)}, the hyperparameter "
                f"{tuple(leaf.shape)}: of several validation losses give result.combined()"
            )
        if not bool(grads[name].isfinite().all()):
            raise ValueError(
                f"the hypergradient of {name!r} is not finite, so that nothing was moved: look at result.solution.status, "
                "whose message says what to do, and step where it is ok"
            )
    try:
        for name, leaf in leaves.items():
            leaf.grad = grads[name].clone()
        outer.step()
    finally:
        for leaf in leaves.values():
            leaf.grad = None
    project_(problem)


def project_(problem: Problem) -> None:
    """Move hyperparameters back into their constraints."""
    for module in problem.hparams.modules():
        if isinstance(module, HyperParameters):
            module.project_()


def warn_of_first_step(before: Tree, after: Tree, grads: Tree, every: int | None) -> None:
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
                stacklevel=6,
            )
        if size >= MANY and 0 < reached <= FEW * size:
            steps = "" if every is None else f", that is every {every * size // reached:,} training steps"
            warnings.warn(
                f"the first hyperstep has a gradient for {reached:,} of the {size:,} entries of hyperparameter {name!r}: at "
                f"this rate each is reached every {size // reached:,} hypersteps{steps}. Lower every, give train_batches "
                "with larger batches, or share one entry among many examples",
                stacklevel=6,
            )
