"""A search over models: a net whose blocks are mixtures of operations, and then the net with the chosen operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from tasks.classification import Classification
from tasks.task import of_classes

OPERATIONS = ("3x3", "5x5", "skip")
ACTIVATIONS = {"relu": F.relu, "tanh": F.tanh, "gelu": F.gelu}
OPTIONS = {"block_0": OPERATIONS, "block_1": OPERATIONS, "block_2": OPERATIONS, "activation": tuple(ACTIVATIONS)}
COLDEST = 0.1  # the temperature of a Gumbel relaxation at the end, over that at the start


class Supernet(nn.Module):
    """A first layer, three blocks x ↦ Σ_k a_k·operation_k(x), each followed by an activation, and a linear layer.

    A block whose choice is fixed has only that operation, without weights for the others.
    """

    def __init__(self, channels: int, classes: int, width: int, fixed: Mapping[str, str]) -> None:
        super().__init__()
        self.fixed = dict(fixed)
        self.first = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.last = nn.Linear(width, classes)
        for name in OPTIONS:
            if name != "activation":
                kept = [self.fixed[name]] if name in self.fixed else OPERATIONS
                self.add_module(name, nn.ModuleDict({one: operation(one, width) for one in kept}))

    def forward(self, x: Tensor, choices: Any) -> Tensor:
        x = self.activated(self.first(x), choices)
        for name in OPTIONS:
            if name != "activation":
                found = {one: layer(x) for one, layer in getattr(self, name).items()}
                x = self.activated(self.mixed(name, found, choices), choices)
        return self.last(x.mean((2, 3)))

    def mixed(self, name: str, found: Mapping[str, Tensor], choices: Any) -> Tensor:
        """The results of the options, mixed by the choice of this name, or the result of its fixed option."""
        return found[self.fixed[name]] if name in self.fixed else choices[name].mix(found, self.training)

    def activated(self, x: Tensor, choices: Any) -> Tensor:
        kept = [self.fixed["activation"]] if "activation" in self.fixed else list(ACTIVATIONS)
        return self.mixed("activation", {one: ACTIVATIONS[one](x) for one in kept}, choices)


def operation(name: str, width: int) -> nn.Module:
    """A convolution that keeps the shape; the identity for ``skip``."""
    return nn.Identity() if name == "skip" else nn.Conv2d(width, width, int(name[0]), padding="same")


@dataclass(kw_only=True)
class Search(Classification):
    """Classification by a :class:`Supernet` whose choices are learned. The final model has the most probable options.

    L_T = cross-entropy(supernet(x), y) + ½·decay·Σ w², with the random draws of a Gumbel relaxation; L_V has none. The
    training lowers the temperature of a relaxation to a tenth of its start, by the same factor in each row of figures.

    Args:
        width: channels of each block.
        fixed: choices that are not learned, by name, such as ``{block_0: 3x3}``.
    """

    width: int = 16
    fixed: Mapping[str, str] = field(default_factory=dict)

    places: ClassVar[frozenset[str]] = frozenset({"categorical"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, option in self.fixed.items():
            if option not in OPTIONS.get(name, ()):
                known = "; ".join(f"{one}: {', '.join(options)}" for one, options in OPTIONS.items())
                raise ValueError(f"task.fixed has {name}: {option}, which is none of its choices: {known}")

    def model(self) -> nn.Module:
        return Supernet(self.x.shape[1], self.classes, self.width, self.fixed).to(self.device)

    def final_model(self, hparams: nn.Module) -> nn.Module:
        """A new net with the most probable options alone."""
        chosen = {name: choice.harden()[0] for name, choice in hparams["categorical"].items()}
        return Supernet(self.x.shape[1], self.classes, self.width, chosen | dict(self.fixed)).to(self.device)

    def made(self, name: str, model: nn.Module) -> nn.Module:
        return nn.ModuleDict({choice: self.recipes[name](options) for choice, options in OPTIONS.items()})

    def progress(self, hparams: nn.Module, share: float) -> None:
        for choice in hparams.modules():
            if isinstance(choice, hoptim.recipes.Categorical):
                choice.temperature = self.recipes["categorical"].keywords.get("temperature", 1.0) * COLDEST**share

    def predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return model(self.x[batch], hparams["categorical"])

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model.eval()(self.x[batch], hparams["categorical"]), self.y[batch])

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return of_classes(model(self.x[batch], hparams["categorical"]), self.y[batch])
