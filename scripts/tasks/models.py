"""The models of all tasks. Those of scripts/train.py are functions of the shape of an input and the number of classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn

Shape = Sequence[int]


def every_weight(name: str, weight: nn.Parameter) -> bool:
    """For ``include`` of a weight decay: all weights, biases and norms too."""
    return True


def linear(shape: Shape, classes: int) -> nn.Module:
    """Logistic regression; 7,850 weights on MNIST, 30,730 on CIFAR-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(shape), classes))


def mlp(shape: Shape, classes: int, hidden: Sequence[int] | None = None) -> nn.Module:
    """An MLP with ReLU; by default a hidden layer as wide as the input: 623,290 weights on MNIST, 9,470,986 on CIFAR-10."""
    widths = [prod(shape), *(hidden or [prod(shape)])]
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


def cnn(shape: Shape, classes: int, channels: Sequence[int] = (16, 32)) -> nn.Module:
    """3×3 convolutions with ReLU, each of which halves the size, and a linear layer."""
    layers = [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise([shape[0], *channels])]
    sides = [-(-size // 2 ** len(layers)) for size in shape[1:]]
    return convolutions(*layers, features=channels[-1] * prod(sides), classes=classes)


def lenet(shape: Shape, classes: int) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max-pooling; 61,706 weights on MNIST (padded), 62,006 on CIFAR-10."""
    padding = (32 - shape[1]) // 2
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes),
    )  # fmt: skip


def alexnet(shape: Shape, classes: int) -> nn.Module:
    """AlexNet for images of 32×32 (Krizhevsky et al. 2012, smaller), without dropout; 23,272,266 weights on CIFAR-10."""
    return nn.Sequential(
        nn.Conv2d(shape[0], 64, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, classes),
    )  # fmt: skip


def resnet(shape: Shape, classes: int, depth: int = 44, width: int = 16) -> nn.Module:
    """ResNet of depth 6n + 2 for small images (He et al. 2016, section 4.2), with BatchNorm; 0.66 M weights at 44."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth={depth}: give 6n + 2, such as 8, 20 or 44")
    widths = [width, width, 2 * width, 4 * width]
    blocks: list[nn.Module] = []
    for stage in range(1, 4):
        for block in range(depth // 6):
            first = widths[stage - 1] if block == 0 else widths[stage]
            blocks.append(Block(first, widths[stage], 2 if stage > 1 and block == 0 else 1))
    stem = (nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def resnet18(shape: Shape, classes: int) -> nn.Module:
    """torchvision's ResNet-18 with a first layer for small images; 11.2 M weights."""
    from torchvision.models import resnet18 as of_torchvision

    model = of_torchvision(num_classes=classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def convolutions(
    *layers: nn.Conv2d, features: int, classes: int = 10, normed: bool = False, pooled: bool = False
) -> nn.Module:
    """Convolutions with ReLU, each of them perhaps with BatchNorm and a pooling that halves the size, and a linear layer."""
    parts: list[nn.Module] = []
    for layer in layers:
        norm = [nn.BatchNorm2d(layer.out_channels)] if normed else []
        parts += [layer, *norm, nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(features, classes))


class Reader(nn.Module):
    """An LSTM that predicts the next letter of ``data.LETTERS``."""

    def __init__(self, letters: int = 27) -> None:
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(letters, 12), nn.LSTM(12, 32, batch_first=True)
        self.out = nn.Linear(32, letters)

    def forward(self, letters: Tensor) -> Tensor:
        return self.out(self.rnn(self.embedding(letters))[0]).flatten(0, 1)


class Block(nn.Module):
    """relu(f(x) + shortcut(x)); f has two convolutions. The shortcut has no weights: it strides and pads with zeros."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.stride, self.more = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return (self.residual(x) + shortcut).relu()
