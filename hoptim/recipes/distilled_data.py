"""DistilledData: a few learned training examples that replace many real ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between, check_count
from hoptim.validation import is_whole


class DistilledData(HyperParameters):
    """Learned inputs, a few for each class, such that a model trained on them alone does well on the real data.

    The training loss is the model's loss on ``hparams.examples()``, with some decay, so that it has a minimum; the
    validation loss is its loss on the real training data. An outer rate of 0.03, that of :meth:`optimizer`, worked for
    digits.

    Args:
        classes: the number of classes K.
        shape: the shape of one input, such as (1, 28, 28).
        per_class: inputs for each class, default 1.
        size: the standard deviation of the random numbers that the inputs start from, default 0.1.

    Raises:
        TypeError: ``shape`` is no tuple.
        ValueError: ``classes`` or ``per_class`` is no positive whole number, ``shape`` is empty or has a length that is
            none, or ``size`` is not positive.

    Source: Wang et al. 2018, Dataset distillation (arXiv 1811.10959); Lorraine, Vicol and Duvenaud 2019, section 5.2.

    >>> hparams = DistilledData(10, (1, 28, 28))
    >>> x, y = hparams.examples()
    >>> x.shape, y.tolist(), hparams.degrees_of_freedom
    (torch.Size([10, 1, 28, 28]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 7840)
    """

    labels: Tensor
    outer_rate = 0.03  # a third of the size that the inputs start from

    def __init__(self, classes: int, shape: Sequence[int], per_class: int = 1, *, size: float = 0.1) -> None:
        check_count("classes", classes)
        check_count("per_class", per_class)
        if isinstance(shape, str) or not isinstance(shape, Sequence):
            raise TypeError(f"shape is {shape!r}: give that of one input as a tuple, such as (1, 28, 28) or (5,)")
        if not len(shape) or not all(is_whole(length) and length >= 1 for length in shape):
            raise ValueError(f"shape is {shape!r}: give that of one input, such as (1, 28, 28)")
        check_between("size", size, 0)
        super().__init__({"input": size * torch.randn(classes * per_class, *shape)})
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(per_class))

    def examples(self) -> tuple[Tensor, Tensor]:
        """The inputs, shape (K·per_class, …), and their classes."""
        return self["input"], self.labels
