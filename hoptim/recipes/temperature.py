"""Temperature: a learned temperature that divides logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between, check_floats


class Temperature(HyperParameters):
    """A learned temperature T > 0, the logits z/T, and their cross-entropy.

    In the training loss, T sets how far apart the classes are pushed. In the validation loss alone, it calibrates the
    probabilities, and its hypergradient is only the direct one. It has one degree of freedom, on a log scale.

    Args:
        start: T at the start, default 1.

    Raises:
        ValueError: ``start`` is not positive.
        TypeError: when called, the logits are no tensor of floating-point numbers.

    Source: Guo et al. 2017, On calibration of modern neural networks (arXiv 1706.04599).

    >>> hparams, z = Temperature(start=2.0), torch.tensor([[2.0, 0.0]])
    >>> hparams.scaled(z).tolist()
    [[1.0, 0.0]]
    >>> round(hparams.cross_entropy(z, torch.tensor([0])).item(), 4)
    0.3133
    """

    def __init__(self, start: float = 1.0) -> None:
        check_between("start", start, 0)
        super().__init__({"temperature": torch.tensor(float(start))}, {"temperature": constraints.positive})

    def scaled(self, z: Tensor) -> Tensor:
        """z/T, of any shape."""
        check_floats("z", z)
        return z / self["temperature"].to(z.dtype)

    def cross_entropy(self, z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The cross-entropy of z/T, with arguments as in ``torch.nn.functional.cross_entropy``."""
        return nn.functional.cross_entropy(self.scaled(z), target, reduction=reduction)
