"""Learned training data: random changes of images, a network that changes them, and examples themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from hoptim.problem.hyperparameters import HyperParameters
from hoptim.recipes.arguments import check_between, check_count

Change = Literal["rotation", "shift", "scale", "shear", "brightness", "contrast", "noise"]
AFFINE = ("rotation", "shift", "scale", "shear")


class Augmentation(HyperParameters):
    """Learned magnitudes m > 0 of random changes of images, drawn anew for each image and differentiable in m.

    With u uniform on (−1, 1) for each image and change, and ξ normal for each pixel:

    - ``"rotation"``: by m·u radians; ``"shift"``: by m·u of half the width and of half the height, each with its own u;
    - ``"scale"``: by exp(m·u); ``"shear"``: by m·u along the rows;
    - ``"brightness"``: x + m·u; ``"contrast"``: x̄ + exp(m·u)·(x − x̄), with the image's mean x̄; ``"noise"``: x + m·ξ.

    The first four move pixels, with bilinear interpolation and zeros from outside. The validation loss sees images as they
    are, so that it learns which changes help: a magnitude that hurts goes towards 0, where nothing is changed.

    Args:
        changes: the names of the changes, each once; default: all of them.
        start: m of each at the start, default 0.1.

    Raises:
        ValueError: a change is none of these or given twice, there is none, or ``start`` is not positive; when called, the
            images are not of shape (B, C, H, W).

    Source: Benton et al. 2020, Learning invariances in neural networks (arXiv 2010.11882), who learn m by the training loss.

    >>> _ = torch.manual_seed(0)
    >>> hparams = Augmentation(["rotation", "noise"], start=0.2)
    >>> list(hparams), hparams.degrees_of_freedom
    (['rotation', 'noise'], 2)
    >>> hparams.augment(torch.rand(8, 1, 28, 28)).shape
    torch.Size([8, 1, 28, 28])
    """

    def __init__(self, changes: Sequence[Change] = get_args(Change), *, start: float = 0.1) -> None:
        if strangers := [change for change in changes if change not in get_args(Change)]:
            raise ValueError(f"changes has {strangers[0]!r}: give some of {', '.join(get_args(Change))}")
        if not changes or len(set(changes)) < len(changes):
            raise ValueError(f"changes is {list(changes)}: give one or more, each once")
        check_between("start", start, 0)
        values: dict[str, Tensor] = {change: torch.tensor(float(start)) for change in changes}
        super().__init__(values, dict.fromkeys(values, constraints.positive))

    def augment(self, x: Tensor) -> Tensor:
        """The images, shape (B, C, H, W), each changed; in evaluation mode as they are."""
        if not self.training:
            return x
        if x.ndim != 4:
            raise ValueError(f"the images have shape {tuple(x.shape)}: give (B, C, H, W)")
        if any(change in self for change in AFFINE):
            grid = F.affine_grid(self._matrices(x), list(x.shape), align_corners=False)
            x = F.grid_sample(x, grid, align_corners=False)
        if "contrast" in self:
            mean = x.mean(dim=(1, 2, 3), keepdim=True)
            x = mean + self._drawn("contrast", x).exp()[:, None, None, None] * (x - mean)
        if "brightness" in self:
            x = x + self._drawn("brightness", x)[:, None, None, None]
        if "noise" in self:
            x = x + self["noise"].to(x.dtype) * torch.randn_like(x)
        return x

    def _drawn(self, change: str, x: Tensor) -> Tensor:
        """m·u for each image; 0 without this change."""
        if change not in self:
            return x.new_zeros(len(x))
        return self[change].to(x.dtype) * (2 * torch.rand(len(x), dtype=x.dtype, device=x.device) - 1)

    def _matrices(self, x: Tensor) -> Tensor:
        """The affine map of each image, shape (B, 2, 3), from places in the new image to places in the old one."""
        angle, size, shear = self._drawn("rotation", x), self._drawn("scale", x).exp(), self._drawn("shear", x)
        cos, sin, right, down = angle.cos(), angle.sin(), self._drawn("shift", x), self._drawn("shift", x)
        tall = x.shape[2] / x.shape[3]  # the map has places from −1 to 1 along each axis, whatever its length
        first = torch.stack([size * cos, tall * size * (shear * cos - sin), right], dim=1)
        second = torch.stack([size * sin / tall, size * (shear * sin + cos), down], dim=1)
        return torch.stack([first, second], dim=1)


class AugmentationNet(nn.Module):
    """A small convolutional network x ↦ x + f(x, ξ) from an image and noise to a changed image, whose weights are learned.

    Its last layer starts at 0, so that at first it leaves images as they are. The network itself is ``hparams``: the
    loss has ``model(hparams(x))``, which is ``model(x)`` in evaluation mode. It has thousands of degrees of freedom, so
    keep the validation set large.

    Args:
        channels: C of the images, shape (B, C, H, W).
        hidden: channels of its two hidden layers, default 16.

    Raises:
        ValueError: ``channels`` or ``hidden`` is no positive whole number.

    Source: Lorraine, Vicol and Duvenaud 2019 (arXiv 1911.02590), section 5.3.

    >>> net, x = AugmentationNet(3), torch.rand(2, 3, 8, 8)
    >>> torch.equal(net(x), x), net.degrees_of_freedom
    (True, 3635)
    """

    def __init__(self, channels: int, hidden: int = 16) -> None:
        check_count("channels", channels)
        check_count("hidden", hidden)
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, hidden, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1), nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )  # fmt: skip
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The changed images, of the same shape; in evaluation mode as they are."""
        if not self.training:
            return x
        return x + self.layers(torch.cat([x, torch.randn_like(x)], dim=1))

    def optimizer(self, lr: float = 0.01) -> torch.optim.Adam:
        """The outer optimizer for it: Adam on its weights."""
        return torch.optim.Adam(self.parameters(), lr=lr)

    @property
    def degrees_of_freedom(self) -> int:
        """How many weights it has."""
        return sum(p.numel() for p in self.parameters())


class DistilledData(HyperParameters):
    """Learned inputs, a few for each class, such that a model trained on them alone does well on the real data.

    The training loss is the model's loss on ``hparams.examples()``, with some decay, so that it has a minimum. The
    validation loss is another function, the loss on the real training data: as one function it would be that of the learned
    examples. An outer rate of 0.03, that of :meth:`optimizer`, worked for digits.

    Args:
        classes: the number of classes K.
        shape: the shape of one input, such as (1, 28, 28).
        per_class: inputs for each class, default 1.
        size: the standard deviation of the random numbers that the inputs start from, default 0.1.

    Raises:
        ValueError: ``classes`` or ``per_class`` is no positive whole number, or ``size`` is not positive.

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
        check_between("size", size, 0)
        super().__init__({"input": size * torch.randn(classes * per_class, *shape)})
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(per_class))

    def examples(self) -> tuple[Tensor, Tensor]:
        """The inputs, shape (K·per_class, …), and their classes."""
        return self["input"], self.labels
