"""LabelSmoothing: a learned label smoothing, and the cross-entropy with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import cast, check_between, check_floats


class LabelSmoothing(HyperParameters):
    """A learned label smoothing ε in (0, 1), and its cross-entropy (1 − ε)·(−log p_y) + ε/K · Σ_k (−log p_k).

    A target may be a class y, or a distribution q over the K classes, for which −Σ_k q_k log p_k stands for −log p_y. It
    equals ``torch.nn.functional.cross_entropy(..., label_smoothing=ε)``, which takes ε as a plain number and so has no
    derivative in it.

    Args:
        start: ε at the start.

    Raises:
        ValueError: ``start`` is not between 0 and 1.

    Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7.

    >>> hparams = LabelSmoothing(start=0.1)
    >>> z, y = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    >>> [round(x.item(), 4) for x in (hparams.cross_entropy(z, y), nn.functional.cross_entropy(z, y, label_smoothing=0.1))]
    [0.3365, 0.3365]
    """

    def __init__(self, start: float = 0.05) -> None:
        check_between("start", start, 0, 1)
        super().__init__({"smoothing": torch.tensor(float(start))}, {"smoothing": constraints.unit_interval})

    def cross_entropy(self, z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of logits z, of shape (N, K, …) or (K,); all arguments are those of torch's function.

        Args:
            z: the logits.
            target: classes, of shape (N, …), or probabilities of them, of the shape of z.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        """
        check_floats("z", z)
        smoothing = self["smoothing"]
        if target.is_floating_point():
            classes = z.shape[min(1, z.ndim - 1)]
            smooth = torch.lerp(target, torch.full_like(target, 1 / classes), cast(smoothing, target))
            return nn.functional.cross_entropy(z, smooth, reduction=reduction)
        axis = min(1, z.ndim - 1)
        log_p = z.log_softmax(axis)
        smooth = torch.lerp(log_p, log_p.mean(axis, keepdim=True), cast(smoothing, log_p))
        return nn.functional.nll_loss(smooth, target, reduction=reduction)
