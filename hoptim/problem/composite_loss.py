"""A training loss that shows its parts, L = criterion(z) + penalty, the mean of several, and one for validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hoptim.checks import describe_type
from hoptim.problem.functional import switch_to_evaluation
from hoptim.problem.loss_checks import annotate_errors, check_takes, scalar
from hoptim.problem.mixed_precision import losses_precision, lowered


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The parts of a training loss at one point: L_T = criterion(z) + penalty."""

    z: Tensor
    criterion: Callable[[Tensor], Tensor]
    penalty: Tensor | None


@dataclass(frozen=True)
class CompositeLoss:
    """A loss that also shows its parts: L(w, λ) = criterion(predict(w, λ), λ) + penalty(w, λ). ``GaussNewton`` needs them.

    Args:
        predict: z = ``predict(model, hparams, batch)``, a tensor of any shape: the model's output for the batch.
        criterion: ``criterion(z, hparams, batch) -> scalar``, convex in z for a positive semidefinite curvature.
        penalty: ``penalty(model, hparams) -> scalar``; ``None`` for none.

    Raises:
        TypeError: a part does not take these arguments; when called, ``predict`` returned no tensor, or one of integers.

    >>> loss = CompositeLoss(lambda model, hparams, x: model(x), lambda z, hparams, x: z.square().mean())
    >>> loss(torch.nn.Identity(), None, torch.tensor([3.0, 4.0]))
    tensor(12.5000)
    """

    predict: Callable[[Any, Any, Any], Tensor]
    criterion: Callable[[Tensor, Any, Any], Tensor]
    penalty: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        check_takes("predict", self.predict, "model, hparams, batch")
        check_takes("criterion", self.criterion, "z, hparams, batch")
        if self.penalty is not None:
            check_takes("penalty", self.penalty, "model, hparams")

    def __call__(self, model: Any, hparams: Any, batch: Any) -> Tensor:
        """The loss, as for any other loss function."""
        return self.total(self.parts(model, hparams, batch))

    def parts(self, model: Any, hparams: Any, batch: Any) -> LossParts:
        """z, the criterion as a function of z alone, and the penalty's value."""
        z = self.predict(model, hparams, batch)
        if not isinstance(z, Tensor):
            raise TypeError(f"predict returned {describe_type(z)}: return one tensor, such as the logits")
        if not (z.is_floating_point() or z.is_complex()):
            raise TypeError(f"predict returned a tensor of {z.dtype}: return what has a gradient, such as the logits")
        penalty = None if self.penalty is None else scalar("penalty", self.penalty(model, hparams), needs_gradient=False)

        of_the_user = lowered()

        def criterion(z: Tensor) -> Tensor:
            with losses_precision(of_the_user):  # Gauss-Newton calls it again outside the loss
                return self.criterion(z, hparams, batch)

        return LossParts(z=z, criterion=criterion, penalty=penalty)

    @staticmethod
    def total(parts: LossParts) -> Tensor:
        """The loss from its parts."""
        value = parts.criterion(parts.z)
        if not isinstance(value, Tensor):
            raise TypeError(f"criterion returned {describe_type(value)}: return a scalar tensor")
        return value if parts.penalty is None else value + parts.penalty


def evaluate_train_loss(train_loss: Callable[..., Any], model: Any, hparams: Any, batch: Any) -> Any:
    """A training loss as the validation loss: in evaluation mode, and without the penalty of a ``CompositeLoss``."""
    note = "no val_loss was given, so train_loss ran with model and hparams in evaluation mode: give a val_loss if it can't"
    with annotate_errors(note), switch_to_evaluation(model, hparams):
        if isinstance(train_loss, CompositeLoss):
            return train_loss.criterion(train_loss.predict(model, hparams, batch), hparams, batch)
        return train_loss(model, hparams, batch)


def mean_loss(found: Sequence[tuple[Tensor, LossParts | None]], shares: Tensor) -> tuple[Tensor, LossParts | None]:
    """The mean of losses by their shares, and its parts, whose z is the concatenation of theirs."""

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([share * value for share, value in zip(shares, values, strict=True)]).sum()

    loss = mean(value for value, _ in found)
    parts = [part for _, part in found if part is not None]
    if not parts:
        return loss, None
    shapes = [part.z.shape for part in parts]

    def criterion(z: Tensor) -> Tensor:
        pieces = z.split([shape.numel() for shape in shapes])
        return mean(part.criterion(piece.view(shape)) for part, piece, shape in zip(parts, pieces, shapes, strict=True))

    penalties = [part.penalty for part in parts if part.penalty is not None]
    z = torch.cat([part.z.reshape(-1) for part in parts])
    return loss, LossParts(z=z, criterion=criterion, penalty=mean(penalties) if penalties else None)
