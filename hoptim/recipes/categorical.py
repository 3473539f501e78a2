"""Categorical: a learned choice between options, by a relaxation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between, checked_names, weighted_sum

Relaxation = Literal["softmax", "gumbel"]


class Categorical(HyperParameters):
    """A learned choice between K options, such as activations or data sources, with the probabilities p.

    The results f_k of the options are mixed, Σ_k a_k·f_k, with weights by one of two relaxations:

    - ``"softmax"``: a = p, each option weighted by its probability;
    - ``"gumbel"``: a = onehot(k) with k drawn from p; its derivative, which would be 0, is replaced by that of
      softmax((log p + Gumbel noise)/τ). It tries one option at a time, as the final model does, so give many hypersteps.

    Evaluation has no noise: ``training=False`` gives a = p for both. ``hparams["probability"]`` is p, of shape (K,).

    Args:
        options: the names of the options, two or more; K − 1 degrees of freedom.
        relaxation: one of these two, default ``"softmax"``.
        temperature: τ of ``"gumbel"``, default 1; an attribute, which a loop may lower.

    Raises:
        TypeError: ``options`` is no list of names; when called, a result is no tensor of floating-point numbers.
        ValueError: there are fewer than two options, one is given twice, ``relaxation`` is none of these or ``temperature``
            is not positive; when called, the result of an option is missing, or shapes differ.

    Source: Liu, Simonyan and Yang 2019, DARTS (arXiv 1806.09055); Jang, Gu and Poole 2017 (arXiv 1611.01144).

    >>> choice = Categorical(["relu", "tanh"])
    >>> x = torch.tensor([-1.0, 2.0])
    >>> choice.mix({"relu": x.relu(), "tanh": x.tanh()}).detach()
    tensor([-0.3808,  1.4820])
    >>> choice["probability"] = torch.tensor([0.1, 0.9])
    >>> choice.harden()                                                # the choice, and the probability of all others
    ('tanh', 0.1...)
    """

    def __init__(self, options: Sequence[str], *, relaxation: Relaxation = "softmax", temperature: float = 1.0) -> None:
        self.options = tuple(checked_names("options", options))
        if relaxation not in ("softmax", "gumbel"):
            raise ValueError(f"relaxation is {relaxation!r}: give 'softmax' or 'gumbel'")
        check_between("temperature", temperature, 0)
        even = torch.full((len(self.options),), 1 / len(self.options))
        super().__init__({"probability": even}, {"probability": constraints.simplex})
        self.relaxation, self.temperature = relaxation, temperature

    def weights(self, training: bool = True) -> Tensor:
        """a, of shape (K,), in the order of the options."""
        p = self["probability"]
        if self.relaxation == "softmax" or not training:
            return p
        return nn.functional.gumbel_softmax(p.log(), tau=self.temperature, hard=True)

    def mix(self, found: Mapping[str, Tensor], training: bool = True) -> Tensor:
        """Σ_k a_k·f_k of the options' results by name, all of the same shape."""
        return weighted_sum("found", found, self.options, self.weights(training))

    def harden(self) -> tuple[str, float]:
        """The most probable option, and the probability of all others: how far the relaxed choice is from it."""
        p = self["probability"].detach()
        best = int(p.argmax())
        return self.options[best], float(1 - p[best])
