"""Side losses: weights of two more losses on the layers of a classifier, one of which may be useful and one is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.classification import Classification
from tasks.task import of_classes

NAMES = ("class", "rotation", "random")
TURNS = 4  # rotations, by 0, 90, 180 and 270 degrees
KINDS = 10  # the classes of the random label


@dataclass(kw_only=True)
class SideLosses(Classification):
    """Classification with two more losses: how an image is rotated, and a label that was drawn at random.

    L_T = Σ_k w_k·L_k + ½·decay·Σ w², where L_class and L_random see the image as it is, and L_rotation sees it rotated by
    90° times the number of the example modulo 4. L_V is the cross-entropy of the class alone, so that a useless loss is
    best given no weight. Each loss has its own part of the model's output layer.

    Args:
        shares_at_start: w/3 of class, rotation and random at the start; default: a third each.
    """

    shares_at_start: Sequence[float] | None = None

    places: ClassVar[frozenset[str]] = frozenset({"loss_weights"})

    def model(self) -> nn.Module:
        return self.model_of(tuple(self.x.shape[1:]), self.classes + TURNS + KINDS).to(self.device)

    def setup(self, seed: int) -> dict[str, Tensor]:
        parts = super().setup(seed)
        if self.x.ndim != 4 or self.x.shape[2] != self.x.shape[3]:
            raise ValueError(f"task.data={self.data!r}: rotations need square images, such as digits")
        self.random = torch.randint(KINDS, self.y.shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        return parts

    def made(self, name: str, model: nn.Module) -> nn.Module:
        recipe = self.recipes[name](NAMES)
        if self.shares_at_start is not None:
            recipe["share"] = torch.tensor(list(self.shares_at_start))
        return recipe

    def predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The outputs for the images as they are, followed by those for the rotated images."""
        x, turns = self.x[batch], batch % TURNS
        turned = torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(x, turns, strict=True)])
        return model(torch.cat([x, turned]))

    def criterion(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        plain, turned = z.split(len(batch))
        of_class, _, of_random = plain.split([self.classes, TURNS, KINDS], dim=1)
        found = {
            "class": F.cross_entropy(of_class, self.y[batch]),
            "rotation": F.cross_entropy(turned[:, self.classes : self.classes + TURNS], (batch % TURNS).to(self.device)),
            "random": F.cross_entropy(of_random, self.random[batch]),
        }
        return hparams["loss_weights"].sum(found)

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model.eval()(self.x[batch])[:, : self.classes], self.y[batch])

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return of_classes(model(self.x[batch])[:, : self.classes], self.y[batch])
