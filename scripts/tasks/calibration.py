"""Calibration: a temperature in the validation loss alone, which leaves the training as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tasks.classification import Classification


@dataclass(kw_only=True)
class Calibration(Classification):
    """Classification whose logits are divided by a learned temperature T in the validation loss, not in the training loss.

    L_T = mean cross-entropy(z, y) + the penalties; L_V = mean cross-entropy(z/T, y). So the hypergradient of T is only the
    direct one, ∂L_V/∂T.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if "temperature" not in self.recipes:
            raise ValueError("there is no temperature to learn: give hoptim/recipe=[temperature]")

    def losses(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(z, self.y[batch], reduction="none")

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return hparams["temperature"].cross_entropy(model.eval()(self.x[batch]), self.y[batch])

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        """The cross-entropy of the calibrated probabilities, the accuracy, and the mean confidence minus the accuracy."""
        z, y = hparams["temperature"].scaled(model(self.x[batch])), self.y[batch]
        accuracy, confidence = (z.argmax(1) == y).to(z.dtype).mean(), z.softmax(1).amax(1).mean()
        return {"loss": F.cross_entropy(z, y), "accuracy": accuracy, "overconfidence": confidence - accuracy}
