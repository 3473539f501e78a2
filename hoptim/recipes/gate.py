"""Gate: learned gates, open, closed or in between, that select features, units or layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between, check_count

LOW, HIGH, SHARPNESS = -0.1, 1.1, 2 / 3  # γ, ζ and β of the source


class Gate(HyperParameters):
    """n learned gates z in [0, 1] that multiply features, units or layers, in the hard concrete relaxation.

        z = clamp(s·(ζ − γ) + γ, 0, 1),    s = sigmoid((logit u + log α)/β) while training, sigmoid(log α) else,

    with u uniform on (0, 1), γ = −0.1, ζ = 1.1, β = 2/3. So a gate is exactly 0 or 1 with some probability, and has a
    derivative in between. The validation loss may charge a small price for :meth:`count`, the expected number of open gates.
    There are n degrees of freedom; ``hparams["openness"]`` = sigmoid(log α).

    Args:
        n: how many gates there are.
        start: sigmoid(log α) at the start, default 0.8.

    Raises:
        ValueError: ``n`` is no positive whole number, or ``start`` is not between 0 and 1.

    Source: Louizos, Welling and Kingma 2018, Learning sparse neural networks through L0 regularization (arXiv 1712.01312).

    >>> gate = Gate(3)
    >>> gate["openness"] = torch.tensor([0.01, 0.5, 0.99])
    >>> gate.values(training=False).detach()
    tensor([0.0000, 0.5000, 1.0000])
    >>> gate.harden()                                                       # which are open, and how far off the farthest is
    (tensor([False, False,  True]), 0.5)
    """

    def __init__(self, n: int, *, start: float = 0.8) -> None:
        check_count("n", n, "the number of gates")
        check_between("start", start, 0, 1)
        super().__init__({"openness": torch.full((n,), float(start))}, {"openness": constraints.unit_interval})

    def values(self, training: bool = True) -> Tensor:
        """z, of shape (n,); while training it is drawn anew at each call."""
        s = self["openness"]
        if training:
            u = torch.rand_like(s).clamp(min=torch.finfo(s.dtype).tiny)
            s = torch.sigmoid((torch.logit(u) + torch.logit(s)) / SHARPNESS)
        return (s * (HIGH - LOW) + LOW).clamp(0, 1)

    def count(self) -> Tensor:
        """The expected number of gates that are not closed while training, Σ sigmoid(log α − β·log(−γ/ζ))."""
        closed = SHARPNESS * torch.log(torch.tensor(-LOW / HIGH))
        return torch.sigmoid(torch.logit(self["openness"]) - closed).sum()

    def harden(self) -> tuple[Tensor, float]:
        """Which gates are more than half open, and the largest distance of a gate from the nearer of 0 and 1."""
        z = self.values(training=False).detach()
        return z > 0.5, float((z - (z > 0.5).to(z.dtype)).abs().max())
