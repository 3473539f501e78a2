"""DistilledData: a few learned training examples that stand for many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.start import check_between
from hoptim.validation import is_whole


class DistilledData(HyperParameters):
    """Learned inputs, some for each class, on which alone a model is trained, so that it does well on the real data.

    The training loss is that of the model on ``hparams.examples()``, with some decay, so that it has a minimum; the
    validation loss is that on the real training data. An outer rate of 0.03, that of :meth:`optimizer`, served for digits.

    Args:
        classes: the number of classes K.
        shape: that of one input, such as (1, 28, 28).
        per_class: inputs for each class, default 1.
        size: the standard deviation of the random numbers that the inputs start from, default 0.1.

    Raises:
        ValueError: ``classes`` or ``per_class`` is no positive whole number, ``shape`` is empty or not of such, or ``size``
            is not positive.

    Source: Wang et al. 2018, Dataset distillation (arXiv 1811.10959); Lorraine, Vicol and Duvenaud 2019, section 5.2.

    >>> hparams = DistilledData(10, (1, 28, 28))
    >>> x, y = hparams.examples()
    >>> x.shape, y.tolist(), hparams.degrees_of_freedom
    (torch.Size([10, 1, 28, 28]), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], 7840)
    """

    labels: Tensor

    def __init__(self, classes: int, shape: Sequence[int], per_class: int = 1, *, size: float = 0.1) -> None:
        for name, count in {"classes": classes, "per_class": per_class}.items():
            if not (is_whole(count) and count >= 1):
                raise ValueError(f"{name} is {count!r}: give a whole number of at least 1")
        if not len(shape) or not all(is_whole(length) and length >= 1 for length in shape):
            raise ValueError(f"shape is {shape!r}: give that of one input, such as (1, 28, 28)")
        check_between("size", size, 0)
        super().__init__({"input": size * torch.randn(classes * per_class, *shape)})
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(per_class))

    def examples(self) -> tuple[Tensor, Tensor]:
        """The inputs, shape (K·per_class, …), and their classes."""
        return self["input"], self.labels

    def optimizer(self, lr: float | None = 0.03) -> torch.optim.Adam:
        """The outer optimizer that suits it: Adam on the inputs, at a third of their size at the start."""
        return super().optimizer(lr)
