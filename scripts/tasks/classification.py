"""Classification with any of hoptim's recipes, on images or tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.problem.sharding import whole
from tasks import data as sets
from tasks import models
from tasks.task import Task, of_classes

OF_LOGITS = ("label_smoothing", "temperature", "soft_labels")
OF_LAYERS = ("noise_width", "dropout")
OF_EXAMPLES = ("example_weights", "domain_weights", "rater")
OF_INPUTS = ("distilled_data", "augmentation", "augmentation_net", "gate")
PENALTIES = ("weight_decay", "prior_scale")
OF_STEPS = ("step",)
ONE_OF = (OF_LOGITS, OF_LAYERS, OF_EXAMPLES)


@dataclass(kw_only=True)
class Classification(Task):
    """A classifier trained by cross-entropy, with any of hoptim's recipes in its training loss.

    L_T = mean cross-entropy(model(changed x), y) + the penalties + ½·decay·Σ w²; L_V is the cross-entropy alone.

    Args:
        data: mnist, fashion_mnist, cifar10, digits, iris, wine or breast_cancer.
        model_of: ``model_of(shape, classes)`` makes a model, such as those of tasks/models.py.
        train: how many training examples there are.
        val: how many validation examples there are.
        test: how many test examples there are; default: all that are left.
        root: the folder of torchvision's data sets.
        balanced: whether each class has the same number of training examples.
        recipes: functions that make the recipes, by name; conf/hoptim/recipe has one for each. A recipe that is null is
            left out, so that a baseline can do without a recipe of the experiment.
        decay: a fixed weight decay of all weights, beside the recipes.
        gate_price: the price of an open gate in the validation loss.
        wrong_labels: the share of wrong labels in the training part. A list splits that part into as many sources, each
            with its own share, for domain_weights.
        join: train on the training and the validation part together; validation figures then mean nothing.
        device: the device of the data, the model and the recipes, such as cuda.
    """

    data: str
    model_of: Callable[[Sequence[int], int], nn.Module]
    train: int
    val: int
    test: int | None = None
    root: str = "data"
    balanced: bool = False
    recipes: Mapping[str, Callable[..., nn.Module] | None] = field(default_factory=dict)
    decay: float = 0.0
    gate_price: float = 0.0
    wrong_labels: Any = 0.0
    join: bool = False
    device: str = "cpu"

    places: ClassVar[frozenset[str]] = frozenset((*OF_LOGITS, *OF_LAYERS, *OF_EXAMPLES, *OF_INPUTS, *PENALTIES, *OF_STEPS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.recipes = {name: make for name, make in self.recipes.items() if make is not None}
        if strangers := sorted(set(self.recipes) - self.places):
            known = ", ".join(sorted(self.places))
            raise ValueError(f"recipe {strangers[0]!r} has no place in this task: give some of {known}")
        if not self.recipes:
            raise ValueError(
                "there is no recipe: give hoptim/recipe=[weight_decay], say, which learn=false keeps at its start"
            )
        if self.gate_price and "gate" not in self.recipes:
            raise ValueError(f"gate_price={self.gate_price}: there is no gate to pay for; give 0, or hoptim/recipe=[gate]")
        for group in ONE_OF:
            if len(both := [name for name in group if name in self.recipes]) > 1:
                raise ValueError(f"the recipes {both[0]} and {both[1]} have the same place in the loss: give one of them")

    def setup(self, seed: int) -> dict[str, Tensor]:
        """Draw the examples, number them in the order train, val, test, and standardise by the training part."""
        found = sets.read(self.data, self.root)
        drawn = sets.split(found, self.train, self.val, self.test, seed, self.balanced)
        numbers = torch.arange(sum(map(len, drawn.values()))).split([len(part) for part in drawn.values()])
        parts, used = dict(zip(drawn, numbers, strict=True)), torch.cat(list(drawn.values()))
        self.x = sets.standardised(found.x[used].float() / found.scale, parts["train"])
        self.y, self.classes = found.y[used], int(found.y.max()) + 1
        shares = [self.wrong_labels] if isinstance(self.wrong_labels, (int, float)) else list(self.wrong_labels)
        self.source = torch.arange(len(self.y)) % len(shares)
        for number, share in enumerate(shares):
            own = parts["train"][self.source[parts["train"]] == number]
            self.y = sets.with_wrong_labels(self.y, own, share, self.classes, seed)
        if self.join:
            parts["train"] = torch.cat([parts["train"], parts["val"]])
        self.x, self.y, self.source = (tensor.to(self.device) for tensor in (self.x, self.y, self.source))
        self.shares, self.parts = shares, parts
        return parts

    def model(self) -> nn.Module:
        return self.model_of(tuple(self.x.shape[1:]), self.classes).to(self.device)

    def hparams(self, model: nn.Module) -> nn.Module:
        return nn.ModuleDict({name: self.made(name, model) for name in self.recipes}).to(self.device)

    def made(self, name: str, model: nn.Module) -> nn.Module:
        """A recipe, made from the parts of this task that it needs."""
        make, val, shape = self.recipes[name], self.parts["val"], tuple(self.x.shape[1:])
        learning = self.train + self.val
        if name == "prior_scale":
            return make(model, len(self.parts["train"]))
        if name in (*PENALTIES, *OF_LAYERS):
            return make(model)
        if name == "example_weights":
            return make(learning, trusted=val)
        if name == "soft_labels":
            return make(self.y[:learning], self.classes)
        if name == "domain_weights":
            names = [f"{number}: {share:.0%} wrong" for number, share in enumerate(self.shares)]
            return make(dict(zip(names, self.source[self.parts["train"]].bincount().tolist(), strict=True)))
        if name == "distilled_data":
            return make(self.classes, shape)
        if name == "rater":
            return make(models.mlp((self.features(val).shape[1],), 1, [32]))
        return make(shape[0]) if name in ("augmentation_net", "gate") else make()

    @property
    def train_loss(self) -> hoptim.CompositeLoss:
        return hoptim.CompositeLoss(self.predict, self.criterion, self.penalty)

    def predict(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """The logits of a training batch."""
        x = hparams["distilled_data"].examples()[0] if "distilled_data" in self.recipes else self.x[batch]
        if "augmentation" in self.recipes:
            x = hparams["augmentation"].augment(x)
        if "augmentation_net" in self.recipes:
            x = hparams["augmentation_net"](x)
        x = self.gated(x, hparams, training=True)
        for name in OF_LAYERS:
            if name in self.recipes:
                return hparams[name].call(model, x)
        return model(x)

    def criterion(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        """The loss of the logits."""
        if "distilled_data" in self.recipes:
            return F.cross_entropy(z, hparams["distilled_data"].examples()[1])
        losses = self.losses(z, hparams, batch)
        if "example_weights" in self.recipes:
            return hparams["example_weights"].mean(losses, batch)
        if "domain_weights" in self.recipes:
            return self.mixed(losses, hparams["domain_weights"], batch)
        if "rater" in self.recipes:
            return hparams["rater"].mean(losses, self.features(batch))
        return losses.mean()

    def features(self, batch: Tensor) -> Tensor:
        """What a rater sees of each example: its input and its class."""
        return torch.cat([self.x[batch].flatten(1), F.one_hot(self.y[batch], self.classes)], dim=1)

    def mixed(self, losses: Tensor, mixture: Any, batch: Tensor) -> Tensor:
        """The mean weighted by source; validation examples, which a retraining adds, have the weight 1."""
        own = batch < self.train
        if not own.any():
            return losses.mean()
        found = mixture.mean(losses[own], self.source[batch[own]])
        return (own.sum() * found + losses[~own].sum()) / len(batch)

    def losses(self, z: Tensor, hparams: Any, batch: Tensor) -> Tensor:
        """The loss of each example."""
        if "soft_labels" in self.recipes:
            return hparams["soft_labels"].cross_entropy(z, batch, reduction="none")
        for name in ("label_smoothing", "temperature"):
            if name in self.recipes:
                return hparams[name].cross_entropy(z, self.y[batch], reduction="none")
        return F.cross_entropy(z, self.y[batch], reduction="none")

    def penalty(self, model: Any, hparams: Any) -> Tensor:
        """The learned penalties, and the fixed one."""
        learned = sum(hparams[name].penalty(model) for name in PENALTIES if name in self.recipes)
        return learned + self.decay / 2 * sum(whole(weight.square().sum()) for weight in model.parameters())

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        """Cross-entropy without the recipes that act in training. Gates belong to the model; open ones have a price."""
        loss = F.cross_entropy(model.eval()(self.gated(self.x[batch], hparams, training=False)), self.y[batch])
        return loss + self.gate_price * hparams["gate"].count() if self.gate_price else loss

    def gated(self, x: Tensor, hparams: Any, training: bool) -> Tensor:
        """The inputs, with each feature or channel multiplied by its gate."""
        if "gate" not in self.recipes:
            return x
        return x * hparams["gate"].values(training).reshape(-1, *[1] * (x.ndim - 2))

    def figures(self, model: nn.Module, hparams: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        """Cross-entropy and accuracy, and how many gates are open."""
        found = of_classes(model(self.gated(self.x[batch], hparams, training=False)), self.y[batch])
        return found | {"open": hparams["gate"].harden()[0].sum()} if "gate" in self.recipes else found

    def draw(self, problem: hoptim.Problem, folder: Path) -> list[Path]:
        """Pictures of the learned examples, of images before and after the learned changes, and of the gates."""
        from tasks import pictures

        return [
            drawn(self, problem.hparams[name], folder / f"{name}.png")
            for name, drawn in pictures.OF_RECIPES.items()
            if name in self.recipes
        ]
