"""The validation loss at a point, and its first derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from hoptim.curvature.linearization import check_dense
from hoptim.linalg import dicts
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.problem.composite_loss import evaluate_train_loss
from hoptim.problem.live import LiveAt
from hoptim.problem.problem import At, Problem
from hoptim.problem.sharded_passes import ShardedPasses


@dataclass(frozen=True, kw_only=True)
class Validation:
    """L_V, g = ∂L_V/∂w and ∂L_V/∂λ; all with a leading axis of R if L_V is a vector of R losses.

    ``g`` has zeros for a weight that L_V does not depend on, ``direct`` has ``None`` for such a hyperparameter.
    ``by_buffer`` is ∂L_V/∂b of the buffers that were asked for, as far as L_V depends on them.
    """

    loss: Tensor
    g: Tensors
    direct: OptionalTensors
    by_buffer: Tensors = field(default_factory=dict)


def validate(at: At, batch: Any, buffers: Mapping[str, Tensor] = MappingProxyType({})) -> Validation:
    """L_V and its derivatives in weights, hyperparameters and these of the buffers, by one backward pass for each loss."""
    if isinstance(at, LiveAt):
        return _validate_live(at, batch)
    with at.loss("val_loss", batch) as (loss, *_):
        losses = loss.unbind() if loss.ndim else (loss,)
        inputs = [*at.weights.values(), *at.leaves.values(), *buffers.values()]
        passes = at.passes(loss)
        rows = [_gradients(at, one, inputs, passes, retain_graph=loss.ndim > 0) for one in losses]
    columns = iter([_stacked(column, loss.ndim) for column in zip(*rows, strict=True)])
    by_weight, by_leaf, by_buffer = ({name: next(columns) for name in tree} for tree in (at.weights, at.leaves, buffers))
    _check_touched(at.problem, by_weight, by_leaf)
    g = dicts.filled(by_weight, dicts.expanded(at.weights if passes is None else at.shards, loss.shape))
    loss, g, direct = _over_ranks(at, loss.detach(), g, by_leaf, is_on_shards=passes is not None)
    return Validation(loss=loss, g=g, direct=direct, by_buffer=dicts.present(by_buffer))


def _validate_live(at: LiveAt, batch: Any) -> Validation:
    """The same for a sharded model that runs as it trains: a forward and a backward pass for each loss."""
    own, by_weight, by_leaf = at.gradients("val_loss", batch)
    _check_touched(at.problem, by_weight, by_leaf)
    g = dicts.filled(by_weight, dicts.expanded(at.weights, own.shape))
    loss, g, direct = _over_ranks(at, own, g, by_leaf, is_on_shards=True)
    return Validation(loss=loss, g=g, direct=direct)


def _gradients(at: At, loss: Tensor, inputs: Sequence[Tensor], passes: ShardedPasses | None, *, retain_graph: bool) -> Any:
    """∂loss/∂inputs, of which the weights come first; shards of the mean for them if a pass gives these."""
    with nullcontext(Tensors()) if passes is None else passes.passing() as taken:
        found = torch.autograd.grad(loss, inputs, allow_unused=True, retain_graph=retain_graph)
    if passes is None:
        return found
    shards = passes.shards(dict(zip(at.weights, found, strict=False)), taken)
    return [*(shards.get(name) for name in at.weights), *found[len(at.weights) :]]


def _over_ranks(
    at: At, loss: Tensor, g: Tensors, direct: OptionalTensors, *, is_on_shards: bool
) -> tuple[Tensor, Tensors, OptionalTensors]:
    """The means over the ranks, by one all-reduce; g on shards where the weights are sharded."""
    like, ranks = dicts.expanded(at.leaves, loss.shape), at.problem.ranks
    if at.sharding is not None:
        at.sharding.check_losses(loss)
        space = at.sharding.vectors(Layout.of(at.weights))
        if not is_on_shards:
            g = space.shards.unflatten(space.mean(space.whole.flatten(g, loss.shape)))
        loss, direct = ranks.mean_with_loss(loss, direct, like)
        return loss, g, direct
    loss, found = ranks.mean_with_loss(
        loss,
        {**g, **{f"l:{name}": t for name, t in direct.items()}},
        {**g, **{f"l:{name}": t for name, t in like.items()}},
    )
    return loss, dicts.present({name: found[name] for name in g}), {name: found[f"l:{name}"] for name in direct}


def _stacked(column: Sequence[Tensor | None], several: int) -> Tensor | None:
    """Stack a tensor's gradients of several losses, with zeros for missing ones; ``None`` if all are missing."""
    like = next((t for t in column if t is not None), None)
    if like is None or like.is_sparse:
        return like
    return torch.stack([torch.zeros_like(like) if t is None else t for t in column]) if several else like


def _check_touched(problem: Problem, by_weight: OptionalTensors, by_leaf: OptionalTensors) -> None:
    """Raise ``ValueError`` if L_V depends on no weight or hyperparameter, and warn if it depends on no weight."""
    check_dense(by_weight)
    _warn_of_direct(problem, by_leaf)
    if dicts.present(by_weight):
        return
    if not dicts.present(by_leaf):
        raise ValueError(
            "the validation loss touches none of the weights and hyperparameters: compute it with the model it is given"
        )
    warnings.warn(
        "the validation loss touches none of the weights: the hypergradient is its direct term alone. Is it computed "
        "with the model it is given?",
        stacklevel=2,
    )


def _warn_of_direct(problem: Problem, by_leaf: OptionalTensors) -> None:
    """Warn once if train_loss, as the validation loss, depends on hyperparameters that are no part of the model."""
    if getattr(problem.val_loss, "func", None) is not evaluate_train_loss or "direct" in problem.checked:
        return
    problem.checked.add("direct")
    kept = [one for one in problem.hparams.named_modules() if getattr(one[1], "acts_in_evaluation", False)]
    of_model = {name for prefix, part in kept for name, _ in part.named_parameters(prefix)}
    if found := [name for name in dicts.present(by_leaf) if name not in of_model]:
        warnings.warn(
            f"no val_loss was given, and train_loss depends on {found[0]!r} in evaluation mode too: a hyperstep would lower "
            "a penalty by itself. Add what is for training `if hparams.training`, or give a val_loss. If it is part of "
            "the model, set acts_in_evaluation = True on its module",
            stacklevel=2,
        )
