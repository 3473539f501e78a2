"""The task of every script in this folder: learn a weight for each of 500 digits, 40 % of which have a wrong label.

A linear model is trained on these digits by full-batch gradient descent, and every 20 steps the weights move down the loss
of 200 digits with right labels. All scripts have the same start of the model, the same steps and the same Adam for the
weights, so two libraries that compute the same hypergradient end at the same model. The scripts print the loss on the other
1,097 digits.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

LR, OUTER_LR = 0.5, 0.3
STEPS, WARMUP, EVERY = 600, 100, 20  # the first hyperstep follows step 100, the last one step 600

torch.set_default_dtype(torch.float64)  # so that two libraries can be compared to many digits
torch.set_num_threads(1)  # more are slower for so small a model
torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(x))
x, y = x[order].double() / 16, y[order]
train, val, test = torch.arange(500), torch.arange(500, 700), torch.arange(700, len(x))
y[train] = (y[train] + (torch.rand(500) < 0.4)) % 10  # a wrong label is the next digit


def start() -> nn.Module:
    """The model, with the same weights each time."""
    torch.manual_seed(1)
    return nn.Linear(64, 10)


def ridge(weights: Any) -> Tensor:
    """A fixed penalty, which makes the training loss strongly convex."""
    return 0.005 * sum(weight.square().sum() for weight in weights)


@torch.no_grad()
def test_loss(weights: list[Tensor]) -> float:
    """The cross-entropy on the test digits."""
    weight, bias = weights
    return float(F.cross_entropy(F.linear(x[test], weight, bias), y[test]))


def plain() -> list[Tensor]:
    """The same training without learning: each digit keeps its first weight."""
    model = start()
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        inner.zero_grad()
        (0.5 * F.cross_entropy(model(x[train]), y[train]) + ridge(model.parameters())).backward()
        inner.step()
    return list(model.parameters())


if __name__ == "__main__":
    print(f"without learned weights: test loss {test_loss(plain()):.6f}")
