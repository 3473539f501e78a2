"""LossWeights: learned weights for the losses of several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import checked_names, weighted_sum


class LossWeights(HyperParameters):
    """Learned weights w_k of the losses of K tasks, and the weighted sum Σ_k w_k L_k, where w_k > 0 and Σ_k w_k = K.

    All weights are 1 at the start. Their sum is fixed, since the size of the whole loss is a matter of the learning rate.
    Their natural value is ``hparams["share"]`` = w/K, of shape (K,), in the order of the names. The validation loss should
    be what counts in the end: the loss of the one task that matters, or a sum with fixed weights.

    Args:
        names: the names of the tasks, two or more; there are K − 1 degrees of freedom.

    Raises:
        TypeError: ``names`` is no list of names; when called, a loss is no tensor of floating-point numbers.
        ValueError: there are fewer than two, or one is given twice; when called, a loss is missing, there is one more, or
            shapes differ.

    Source: Caruana 1997, Multitask learning; weights by implicit differentiation: Navon et al. 2021 (arXiv 2007.02693).

    >>> hparams = LossWeights(["depth", "normals"])
    >>> hparams["share"] = torch.tensor([0.75, 0.25])
    >>> hparams.sum({"depth": torch.tensor(1.0), "normals": torch.tensor(2.0)}).item()           # 1.5·1 + 0.5·2
    2.5
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(checked_names("names", names))
        even = torch.full((len(self.names),), 1 / len(self.names))
        super().__init__({"share": even}, {"share": constraints.simplex})

    def sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Σ_k w_k L_k of the losses by name, which all have the same shape."""
        return weighted_sum("losses", losses, self.names, len(self.names) * self["share"])
