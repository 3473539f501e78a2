"""L_T, F = ∇_w L_T, A v and Bᵀv as one function of all tensors that the training loss reads, for tracing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hoptim.curvature.exact import DoubleBackward
from hoptim.curvature.linearization import GradientGraph
from hoptim.linalg.vectors import Layout, OptionalTensors, Tensors
from hoptim.problem.problem import At, Evaluated, Problem, as_leaves

Derivatives = tuple[Tensor, Tensor, Tensor, OptionalTensors]  # L_T, F, A v, Bᵀv


class Inputs(NamedTuple):
    """All tensors that the training loss depends on, by name, and the batch."""

    weights: Tensors
    leaves: Tensors
    frozen: Tensors  # weights that are not trained
    constant: Tensors  # hyperparameters that are not learned
    buffers: Tensors
    batch: Any

    @classmethod
    def of(cls, at: At, batch: Any) -> Inputs:
        """The tensors of ``at``, and all others that its problem holds."""
        joint, weights, leaves = at.problem.joint, at.weights, at.leaves
        frozen = {name: p.detach() for name, p in joint.model.named_parameters() if name not in weights}
        constant = {name: p.detach() for name, p in joint.hparams.named_parameters() if name not in leaves}
        return cls(weights, leaves, frozen, constant, at.buffers, batch)

    def tensors(self) -> list[Tensor]:
        """All tensors, also those in the batch, detached."""
        return [leaf.detach() for leaf in tree_leaves(self) if isinstance(leaf, Tensor)]

    def at(self, tensors: Sequence[Tensor]) -> Inputs:
        """The same with these tensors in place of ``tensors()``."""
        left = iter(tensors)
        inputs: Inputs = tree_map(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, self)
        return inputs


def by_second_pass(
    problem: Problem, inputs: Inputs, curvature: DoubleBackward, tensors: Sequence[Tensor], v: Tensor
) -> Derivatives:
    """By backward passes through the graph of F, as without compilation; ``tensors`` replace those of the inputs."""
    inputs = inputs.at(tensors)
    weights, leaves = as_leaves(inputs.weights), as_leaves(inputs.leaves)
    with _evaluated(problem, inputs._replace(weights=weights, leaves=leaves)) as (loss, parts, _):
        graph = GradientGraph(loss, weights, leaves, parts)
        found = graph.linearization(curvature.of(graph))
        return found.loss, found.value, found.A @ v, found.mixed(v)


def by_dual_numbers(problem: Problem, inputs: Inputs, layout: Layout, tensors: Sequence[Tensor], v: Tensor) -> Derivatives:
    """The same for the Hessian alone, by forward mode: the derivative of (∇_w L_T, ∇_λ L_T) along v.

    For convolutional nets a compiled product takes 0.85 of the time. For other nets it takes the same time, and a new point
    costs more; also, torch does not have forward derivatives of every operation.
    """
    inputs = inputs.at(tensors)
    weights, leaves, along = as_leaves(inputs.weights), as_leaves(inputs.leaves), layout.unflatten(v)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(w, along[name]) if name in along else w for name, w in weights.items()}
        with _evaluated(problem, inputs._replace(weights=dual, leaves=leaves)) as (loss, *_):
            slopes = torch.autograd.grad(loss, [*weights.values(), *leaves.values()], allow_unused=True)
        pairs = [(None, None) if t is None else forward_ad.unpack_dual(t) for t in slopes]
        F, Av = (layout.flatten(dict(zip(weights, part, strict=False))) for part in zip(*pairs, strict=True))
        Bv = {name: tangent for name, (_, tangent) in zip(leaves, pairs[len(weights) :], strict=True)}
        return forward_ad.unpack_dual(loss).primal.detach(), F, Av, Bv


@contextmanager
def _evaluated(problem: Problem, inputs: Inputs) -> Iterator[Evaluated]:
    """The training loss with the inputs in place of the live tensors."""
    weights, leaves = inputs.weights | inputs.frozen, inputs.leaves | inputs.constant
    with (
        torch.enable_grad(),
        problem.at(weights, leaves, inputs.buffers) as at,
        at.loss("train_loss", inputs.batch) as found,
    ):
        yield found
