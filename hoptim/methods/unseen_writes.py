"""What a forward pass writes without a derivative, though later losses read it: found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hoptim.linalg import dicts
from hoptim.linalg.random import gaussian_like
from hoptim.linalg.vectors import Tensors
from hoptim.linalg.vjp import ends_of
from hoptim.methods.trajectory import Snapshot, Step, evaluated_losses
from hoptim.problem.functional import Attributes, ConstantStatistics
from hoptim.problem.problem import ModuleState, Problem, as_leaves
from hoptim.problem.random_stream import set_generators

REACH = 1e-2  # how far the weights are moved, relative to their size, to see what depends on them


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The gradient of a step's losses and what they have written.

    Attributes:
        gradient: the gradient.
        modules: what was written.
        seen: the names of buffers that have a graph to the weights.
        cut: those of them that have none to themselves before the step, as the mean in ``0.9 * m.detach() + 0.1 * x``.
    """

    gradient: Tensors
    modules: ModuleState
    seen: frozenset[str]
    cut: frozenset[str]


def unseen_writes(
    problem: Problem,
    step: Step,
    at: Snapshot,
    leaves: Tensors,
    moving: Sequence[str],
    val_loss: Callable[[Snapshot], Any],
    *,
    with_statistics: bool = True,
) -> list[str]:
    """The buffers and attributes by which weights act on later losses, but not in autograd's graph.

    Such are a running mean under ``no_grad``, or a hidden state that is detached. They are found by a step from other
    weights: what it writes differently depends on the weights; and if the next losses differ with it, they read it.

    Args:
        problem: the problem.
        step: an inner step.
        at: the snapshot before it.
        leaves: the hyperparameters.
        moving: the floating-point buffers that change in the training.
        val_loss: the validation loss at a snapshot.
        with_statistics: whether running statistics have a derivative.
    """
    passed = partial(_passed, problem, step, leaves=leaves, moving=moving, with_statistics=with_statistics)
    here = passed(at)
    elsewhere = replace(at, weights={name: w + REACH * _noise(w) for name, w in at.weights.items()})
    there = passed(elsewhere).modules
    before = here.modules
    differing = {name: t for name, t in there.tensors.items() if t.is_floating_point() and name not in here.seen}
    if any(problem.ranks.gathered(bool(here.cut))):
        tensors = {name: t + REACH * _noise(t) if name in here.cut else t for name, t in at.modules.tensors.items()}
        moved = passed(replace(at, modules=replace(at.modules, tensors=tensors))).modules
        differing |= {name: moved.tensors[name] for name in here.cut}
    changed = {name: t for name, t in differing.items() if not dicts.is_same(t, before.tensors[name])}
    own = [name.partition(".")[2] for name in changed] + before.attributes.differing(there.attributes)
    names = sorted({name for names in problem.ranks.gathered(own) for name in names})
    if not names:
        return []
    places = before, replace(before, tensors={**before.tensors, **changed}, attributes=there.attributes)
    one, other = (replace(at, modules=modules) for modules in places)
    gradients = [passed(place).gradient for place in (one, other)]
    is_read = any(not dicts.is_same(g, gradients[1].get(name)) for name, g in gradients[0].items())
    if is_read:
        return names
    generators = problem.generators()
    losses = []
    for place in (one, other):
        set_generators(generators)
        losses.append(val_loss(place))
    return [] if dicts.is_same(*losses) else names


def _passed(
    problem: Problem, step: Step, at: Snapshot, leaves: Tensors, moving: Sequence[str], with_statistics: bool
) -> _Pass:
    weights = as_leaves(at.weights)
    begin = as_leaves({name: at.modules.tensors[name] for name in moving})
    start = replace(at.modules, tensors={**at.modules.tensors, **begin})
    set_generators(at.generators)
    evaluated = evaluated_losses(
        step, problem, weights, leaves, start.tensors, start.attributes, graph=False, with_statistics=with_statistics
    )
    with nullcontext() if with_statistics else ConstantStatistics(), evaluated as found:
        tensors = {name: found.buffers[name] for name in at.modules.tensors}
        ends = {name: ends_of(t) for name, t in tensors.items() if t.requires_grad}
        inputs = {id(w) for w in weights.values()}
        seen = frozenset(name for name, found_ends in ends.items() if found_ends & inputs)
        cut = frozenset(name for name in seen if name in begin and id(begin[name]) not in ends[name])
        attributes = Attributes(list(problem.joint.modules()))
        modules = ModuleState(tensors=dicts.map_tensors(Tensor.detach, tensors), attributes=attributes)
        return _Pass(gradient=found.gradient, modules=modules, seen=seen, cut=cut)


def _noise(w: Tensor) -> Tensor:
    """Random numbers of the size of these weights."""
    size = w.detach().float().square().mean().sqrt()
    return (gaussian_like(w.detach().reshape(-1)).reshape(w.shape) * torch.where(size > 0, size, 1.0)).to(w.dtype)
