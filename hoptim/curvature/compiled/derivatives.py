"""L_T, F = ∇_w L_T, A v and Bᵀv as one function of all tensors that the training loss reads, for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from hoptim.curvature.exact import DoubleBackward
from hoptim.curvature.linearization import GradientGraph
from hoptim.linalg.vectors import OptionalTensors, Tensors
from hoptim.problem.problem import At, Problem, as_leaves

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


def derivatives(
    problem: Problem, inputs: Inputs, curvature: DoubleBackward, tensors: Sequence[Tensor], v: Tensor
) -> Derivatives:
    """By backward passes through the graph of F, as without compilation; ``tensors`` replace those of the inputs."""
    inputs = inputs.at(tensors)
    weights, leaves = as_leaves(inputs.weights), as_leaves(inputs.leaves)
    with (
        torch.enable_grad(),
        problem.at(weights | inputs.frozen, leaves | inputs.constant, inputs.buffers) as at,
        at.loss("train_loss", inputs.batch) as (loss, parts, _),
    ):
        graph = GradientGraph(loss, weights, leaves, parts)
        found = graph.linearization(curvature.of(graph))
        return found.loss, found.value, found.A @ v, found.mixed(v)
