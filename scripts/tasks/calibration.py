"""Calibration: a temperature in the validation loss alone, so that the training itself stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tasks.classification import Classification


@dataclass(kw_only=True)
class Calibration(Classification):
    """Classification whose logits are divided by the temperature where the model is used, not where it trains.

    L_T = mean cross-entropy(z, y) + the penalties; L_V = mean cross-entropy(z/T, y). So the hypergradient of T is the
    direct one, ∂L_V/∂T, and T follows the model.
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
        """Of the calibrated probabilities: the cross-entropy, and how far the mean confidence is from the accuracy."""
        z, y = hparams["temperature"].scaled(model(self.x[batch])), self.y[batch]
        accuracy, confidence = (z.argmax(1) == y).to(z.dtype).mean(), z.softmax(1).amax(1).mean()
        return {"loss": F.cross_entropy(z, y), "accuracy": accuracy, "overconfidence": confidence - accuracy}
