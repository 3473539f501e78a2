"""Cross-entropies with learned label smoothing, temperature, or a learned distribution for each example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.checks import describe_type, is_whole
from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.arguments import cast, check_between, checked_index


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

        In evaluation mode it is torch's, without smoothing.

        Args:
            z: the logits.
            target: classes, of shape (N, …), or probabilities of them, of the shape of z.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        """
        if not self.training:
            return nn.functional.cross_entropy(z, target, reduction=reduction)
        smoothing, axis = self["smoothing"], min(1, z.ndim - 1)
        if target.is_floating_point():
            smooth = torch.lerp(target, torch.full_like(target, 1 / z.shape[axis]), cast(smoothing, target))
            return nn.functional.cross_entropy(z, smooth, reduction=reduction)
        log_p = z.log_softmax(axis)
        smooth = torch.lerp(log_p, log_p.mean(axis, keepdim=True), cast(smoothing, log_p))
        return nn.functional.nll_loss(smooth, target, reduction=reduction)


class Temperature(HyperParameters):
    """A learned temperature T > 0, the logits z/T, and their cross-entropy.

    In the training loss alone, T sets how far apart the classes are pushed. In the validation loss alone, it calibrates the
    probabilities, and its hypergradient is only the direct one. Either needs two functions: one for both has T in both, as a
    part of the model, where it does little, since the model can scale its logits itself. It has one degree of freedom, on a
    log scale.

    Args:
        start: T at the start, default 1.

    Raises:
        ValueError: ``start`` is not positive.

    Source: Guo et al. 2017, On calibration of modern neural networks (arXiv 1706.04599).

    >>> hparams, z = Temperature(start=2.0), torch.tensor([[2.0, 0.0]])
    >>> hparams.scaled(z).tolist()
    [[1.0, 0.0]]
    >>> round(hparams.cross_entropy(z, torch.tensor([0])).item(), 4)
    0.3133
    """

    acts_in_evaluation = True

    def __init__(self, start: float = 1.0) -> None:
        check_between("start", start, 0)
        super().__init__({"temperature": torch.tensor(float(start))}, {"temperature": constraints.positive})

    def scaled(self, z: Tensor) -> Tensor:
        """z/T, of any shape."""
        return z / cast(self["temperature"], z)

    def cross_entropy(self, z: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        """The cross-entropy of z/T, with arguments as in ``torch.nn.functional.cross_entropy``."""
        return nn.functional.cross_entropy(self.scaled(z), target, reduction=reduction)


class SoftLabels(HyperParameters):
    """Learned label distributions q_i over K classes of n examples, and the cross-entropy −Σ_k q_ik log p_k with them.

    A wrong label can be replaced by the right one, while an example weight can only leave it out. The price is n·(K − 1)
    degrees of freedom, which need many hypersteps and a trustworthy validation set. ``hparams["label"]`` is q, of shape
    (n, K).

    Args:
        labels: the given classes, shape (n,), whole numbers. If one function is both losses, ``index`` numbers the
            validation examples too: give their labels as well, or a ``val_loss``.
        classes: K, default: one more than the largest label.
        start: the probability of the given class at the start, default 0.9; the others share the rest.

    Raises:
        TypeError: ``labels`` is no vector of whole numbers.
        ValueError: a label is not below ``classes``, or ``start`` not between 0 and 1.

    Source: Algan and Ulusoy 2020, Meta soft label generation for noisy labels (arXiv 2007.05836).

    >>> hparams = SoftLabels(torch.tensor([0, 2]), start=0.8)
    >>> hparams["label"].detach()
    tensor([[0.8000, 0.1000, 0.1000],
            [0.1000, 0.1000, 0.8000]])
    >>> z, batch = torch.zeros(1, 3), torch.tensor([1])
    >>> round(hparams.cross_entropy(z, batch).item(), 4)                                           # log 3
    1.0986
    """

    given: Tensor

    def __init__(self, labels: Tensor, classes: int | None = None, *, start: float = 0.9) -> None:
        fractions = not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex()
        if fractions or labels.ndim != 1 or not len(labels):
            raise TypeError(f"labels is {describe_type(labels)}: give the class of each example, a vector of whole numbers")
        count = int(labels.max()) + 1 if classes is None else classes
        if not (is_whole(count) and count >= 2 and int(labels.min()) >= 0 and int(labels.max()) < count):
            raise ValueError(f"labels go from {labels.min()} to {labels.max()} and classes is {classes}: give 2 or more")
        check_between("start", start, 0, 1)
        q = torch.full((len(labels), count), (1 - start) / (count - 1), device=labels.device)
        q.scatter_(1, labels[:, None].long(), float(start))
        super().__init__({"label": q}, {"label": constraints.simplex})
        self.register_buffer("given", labels.long().clone(), persistent=False)

    def cross_entropy(self, z: Tensor, index: Tensor, reduction: str = "mean") -> Tensor:
        """−Σ_k q_ik log softmax(z_i)_k of a batch; in evaluation mode the cross-entropy with the labels that were given.

        Args:
            z: logits, shape (B, K).
            index: the indices of these examples, shape (B,), whole numbers below n.
            reduction: as in torch.

        Raises:
            TypeError: ``index`` is no tensor of whole numbers.
            ValueError: there is no row of K logits for each index.
        """
        own = self["label"]
        index = checked_index("index", index, len(own))
        q = cast(own[index], z)
        if q.shape != z.shape:
            raise ValueError(
                f"z has shape {tuple(z.shape)} and index {tuple(index.shape)}: give {own.shape[1]} logits for each index"
            )
        return nn.functional.cross_entropy(z, q if self.training else self.given[index], reduction=reduction)
