"""SoftLabels: a learned distribution over the classes for each training example."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between, check_floats, checked_index
from hoptim.validation import describe_type, is_whole


class SoftLabels(HyperParameters):
    """Learned label distributions q_i over K classes of n examples, and the cross-entropy −Σ_k q_ik log p_k with them.

    A wrong label can be replaced by the right one, while an example weight can only leave it out. The price is n·(K − 1)
    degrees of freedom, which need many hypersteps and a trustworthy validation set. ``hparams["label"]`` is q, of shape
    (n, K).

    Args:
        labels: the given classes, shape (n,), whole numbers.
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

    def cross_entropy(self, z: Tensor, index: Tensor, reduction: str = "mean") -> Tensor:
        """−Σ_k q_ik log softmax(z_i)_k of a batch.

        Args:
            z: logits, shape (B, K).
            index: the indices of these examples, shape (B,), whole numbers below n.
            reduction: as in torch.

        Raises:
            TypeError: ``z`` is no tensor of floating-point numbers, or ``index`` none of whole ones.
            ValueError: there is no row of K logits for each index.
        """
        check_floats("z", z)
        own = self["label"]
        q = own[checked_index("index", index, len(own))].to(z.dtype)
        if q.shape != z.shape:
            raise ValueError(
                f"z has shape {tuple(z.shape)} and index {tuple(index.shape)}: give {own.shape[1]} logits for each index"
            )
        return nn.functional.cross_entropy(z, q, reduction=reduction)
