"""DomainWeights: a learned mixture of the sources that training data come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_losses, checked_index, checked_names
from hoptim.validation import describe_type, is_finite


class DomainWeights(HyperParameters):
    """A learned mixture p of K data sources, p_d > 0 and Σ_d p_d = 1, and its loss Σ_d p_d·(mean loss on source d).

    A batch of B examples, drawn from the whole data set, estimates this loss by

        (1/B) Σ_i p_{d_i}/q_{d_i} · ℓ_i,

    where ℓ_i is the loss of example i, d_i its source, and q_d the share of source d in the data. At the start p = q, so
    that it is the plain mean. ``hparams["mixture"]`` is p, of shape (K,), in the order of the names. A later training can
    draw from the sources by p instead.

    Args:
        sizes: how many examples each source has, or its share, by name; two sources or more, K − 1 degrees of freedom.

    Raises:
        TypeError: ``sizes`` is no dict by names; when called, ``source`` is no tensor of whole numbers.
        ValueError: there are fewer than two sources, a size is not positive, or one is lost after those before it, as 1 is
            after 10⁶ in float32 (then name the small one first); when called, shapes differ.

    Source: Xie et al. 2023, DoReMi (arXiv 2305.10429), who move p by another rule.

    >>> hparams = DomainWeights({"web": 900, "books": 100})
    >>> hparams["mixture"].detach()
    tensor([0.9000, 0.1000])
    >>> losses, source = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    >>> round(hparams.mean(losses, source).item(), 4)
    2.0
    >>> hparams["mixture"] = torch.tensor([0.8, 0.2])
    >>> round(hparams.mean(losses, source).item(), 4)                                # (0.8/0.9·1 + 0.2/0.1·3)/2
    3.4444
    """

    shares: Tensor

    def __init__(self, sizes: Mapping[str, float]) -> None:
        if not isinstance(sizes, Mapping):
            raise TypeError(f"sizes is {describe_type(sizes)}: give a dict of the number of examples of each source")
        if strangers := [name for name in sizes if not isinstance(name, str)]:
            raise TypeError(f"sizes has the name {strangers[0]!r}, {describe_type(strangers[0])}: name each source by a str")
        self.names = tuple(checked_names("sizes", list(sizes)))
        if wrong := [name for name, size in sizes.items() if not (is_finite(size) and size > 0)]:
            raise ValueError(f"the size of {wrong[0]!r} is {sizes[wrong[0]]!r}: give the number of its examples")
        counts = torch.tensor([float(sizes[name]) for name in self.names])
        super().__init__({"mixture": counts / counts.sum()}, {"mixture": constraints.simplex})
        self.register_buffer("shares", self["mixture"].detach())

    def mean(self, losses: Tensor, source: Tensor) -> Tensor:
        """(1/B) Σ_i p_{d_i}/q_{d_i} · ℓ_i, for the training loss.

        Args:
            losses: the loss of each of the B examples, shape (B,), as ``reduction="none"`` gives them.
            source: the source of each example, shape (B,), as its number in the order of the names.
        """
        source = checked_index("source", source, len(self.names))
        check_losses(losses, "source", source)
        return ((self["mixture"] / self.shares)[source].to(losses.dtype) * losses).mean()
