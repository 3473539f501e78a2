"""What a forward pass writes without a derivative, though later losses read it: found by trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import as_leaves
from hoptim.linalg import trees
from hoptim.linalg.lanczos import gaussian
from hoptim.linalg.vectors import Tree
from hoptim.methods.trajectory import Snapshot, Step, evaluated_losses
from hoptim.problem.problem import ModuleState, Problem, set_generators

REACH = 1e-2  # how far the weights are moved, relative to their size, to see what depends on them


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """The gradient of a step's losses, what they have written, and the names of buffers that have a graph to the weights."""

    gradient: Tree
    modules: ModuleState
    seen: frozenset[str]


def unseen_writes(
    problem: Problem, step: Step, at: Snapshot, leaves: Tree, val_loss: Callable[[Snapshot], Any]
) -> list[str]:
    """The buffers and attributes by which weights act on later losses, but not in autograd's graph.

    Such are a running mean under ``no_grad``, or a hidden state that is detached. They are found by a step from other
    weights: what it writes differently depends on the weights; and if the next losses differ with it, they read it.

    Args:
        problem: the problem.
        step: an inner step.
        at: the snapshot before it.
        leaves: the hyperparameters.
        val_loss: the validation loss at a snapshot.
    """
    here = _passed(problem, step, at, leaves)
    elsewhere = replace(at, weights={name: w + REACH * _noise(w) for name, w in at.weights.items()})
    there = _passed(problem, step, elsewhere, leaves)
    before, after = here.modules, there.modules
    written = [name for name, t in after.tensors.items() if t.is_floating_point() and name not in here.seen]
    buffers = [name for name in written if not trees.is_same(after.tensors[name], before.tensors[name])]
    own = [name.partition(".")[2] for name in buffers] + before.attributes.differing(after.attributes)
    names = sorted({name for names in problem.ranks.gathered(own) for name in names})
    if not names:
        return []
    changed = ModuleState({**before.tensors, **{name: after.tensors[name] for name in buffers}}, after.attributes)
    one, other = (replace(at, modules=modules) for modules in (before, changed))
    gradients = [_passed(problem, step, place, leaves).gradient for place in (one, other)]
    is_read = any(not trees.is_same(g, gradients[1].get(name)) for name, g in gradients[0].items())
    if not is_read and trees.is_same(val_loss(one), val_loss(other)):
        return []
    return names


def _passed(problem: Problem, step: Step, at: Snapshot, leaves: Tree) -> _Pass:
    weights = as_leaves(at.weights)

    def inside() -> _Pass:
        with evaluated_losses(problem, step.losses, weights, leaves, at.modules, graph=False) as found:
            tensors = {name: found.tensors[name] for name in at.modules.tensors}
            seen = frozenset(name for name, t in tensors.items() if t.requires_grad)
            modules = ModuleState(trees.map_tree(Tensor.detach, tensors), found.attributes())
            return _Pass(gradient=found.gradient, modules=modules, seen=seen)

    set_generators(at.generators)
    with problem.differentiable_statistics():
        return problem.call(weights, leaves, inside)


def _noise(w: Tensor) -> Tensor:
    """Random numbers of the size of these weights."""
    size = w.detach().float().square().mean().sqrt()
    return (gaussian(w.detach().reshape(-1)).reshape(w.shape) * torch.where(size > 0, size, 1.0)).to(w.dtype)
