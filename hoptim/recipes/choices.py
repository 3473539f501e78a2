"""Learned choices: one of several options, and which features, units or layers to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.arguments import check_between, check_count, checked_names, weighted_sum

Relaxation = Literal["softmax", "gumbel"]


class Categorical(HyperParameters):
    """A learned choice between K options, such as activations or data sources, with the probabilities p.

    The results f_k of the options are mixed, Σ_k a_k·f_k, with weights by one of two relaxations:

    - ``"softmax"``: a = p, each option weighted by its probability;
    - ``"gumbel"``: a = onehot(k) with k drawn from p; its derivative, which would be 0, is replaced by that of
      softmax((log p + Gumbel noise)/τ). It tries one option at a time, as the final model does, so give many hypersteps.

    Evaluation has no noise: in evaluation mode, or with ``training=False``, a = p for both. ``hparams["probability"]`` is
    p, of shape (K,).

    Args:
        options: the names of the options, two or more; K − 1 degrees of freedom.
        relaxation: one of these two, default ``"softmax"``.
        temperature: τ of ``"gumbel"``, default 1; an attribute, which a loop may lower.

    Raises:
        ValueError: there are fewer than two options, one is given twice, ``relaxation`` is none of these or ``temperature``
            is not positive; when called, the result of an option is missing, or there is one more.

    Source: Liu, Simonyan and Yang 2019, DARTS (arXiv 1806.09055); Jang, Gu and Poole 2017 (arXiv 1611.01144).

    >>> choice = Categorical(["relu", "tanh"])
    >>> x = torch.tensor([-1.0, 2.0])
    >>> choice.mix({"relu": x.relu(), "tanh": x.tanh()}).detach()
    tensor([-0.3808,  1.4820])
    >>> choice["probability"] = torch.tensor([0.1, 0.9])
    >>> choice.harden()                                                # the choice, and the probability of all others
    ('tanh', 0.1...)
    """

    acts_in_evaluation = True

    def __init__(self, options: Sequence[str], *, relaxation: Relaxation = "softmax", temperature: float = 1.0) -> None:
        self.options = checked_names("options", options)
        if relaxation not in ("softmax", "gumbel"):
            raise ValueError(f"relaxation is {relaxation!r}: give 'softmax' or 'gumbel'")
        check_between("temperature", temperature, 0)
        even = torch.full((len(self.options),), 1 / len(self.options))
        super().__init__({"probability": even}, {"probability": constraints.simplex})
        self.relaxation, self.temperature = relaxation, temperature

    def weights(self, training: bool | None = None) -> Tensor:
        """a, of shape (K,), in the order of the options; without ``training=`` this module's mode says whether to draw."""
        p = self["probability"]
        if self.relaxation == "softmax" or not (self.training if training is None else training):
            return p
        return nn.functional.gumbel_softmax(p.log(), tau=self.temperature, hard=True)

    def mix(self, found: Mapping[str, Tensor], training: bool | None = None) -> Tensor:
        """Σ_k a_k·f_k of the options' results by name, all of the same shape."""
        return weighted_sum("found", found, self.options, self.weights(training))

    def harden(self) -> tuple[str, float]:
        """The most probable option, and the probability of all others: how far the relaxed choice is from it."""
        p = self["probability"].detach()
        best = int(p.argmax())
        return self.options[best], float(1 - p[best])


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

    acts_in_evaluation = True

    def __init__(self, n: int, *, start: float = 0.8) -> None:
        check_count("n", n, "the number of gates")
        check_between("start", start, 0, 1)
        super().__init__({"openness": torch.full((n,), float(start))}, {"openness": constraints.unit_interval})

    def values(self, training: bool | None = None) -> Tensor:
        """z, of shape (n,), drawn anew at each call while training; without ``training=`` this module's mode says so."""
        s = self["openness"]
        if self.training if training is None else training:
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
