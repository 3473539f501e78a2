"""Learn ten images, one for each class, so that a linear model trained on them alone reads digits; with a picture of them.

    python scripts/examples/distilled_digits.py [--out runs/distilled.png]

The ten images are hyperparameters: the model is trained on them, and the validation loss is its loss on 1,000 real digits.
The test set has 797. Beside it: the same training on ten real digits (mean of 20 draws), on the means of the classes, and on
all 1,000 digits. The weight decay was chosen on another split.
"""

import argparse
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import DistilledData

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def digits(seed):
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x.float()[order] / 16, y[order]


DECAY = 0.02
X, Y = digits(seed=1)
REAL, TEST = torch.arange(1000), torch.arange(1000, len(X))


def make():
    return nn.Linear(64, 10)


def inner(model):
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=DECAY)


def train_loss(model, hparams, batch):
    x, y = hparams.examples()
    return F.cross_entropy(model(x), y) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def val_loss(model, hparams, batch):
    return F.cross_entropy(model(X[batch]), Y[batch])


def distilled(hypersteps):
    """The learned images, and how many training steps it took to learn them."""
    model, hparams = make(), DistilledData(10, (64,))
    outer = torch.optim.Adam(hparams.parameters(), lr=0.03)
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    plain = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)  # the decay is in the loss, where F sees it
    method = hoptim.Implicit(hoptim.CG(terms=20))
    optimizer = hoptim.BilevelOptimizer(
        plain, outer, problem, val_batches=[REAL], hypergradient=method, every=10, warmup=100
    )
    while optimizer.hyper_steps < hypersteps:
        optimizer.zero_grad()
        optimizer.loss(None).backward()
        optimizer.step()
    return hparams["input"].detach(), optimizer.inner_steps


def accuracy(x, y):
    """The test accuracy of a new model that is trained on these examples alone."""
    torch.manual_seed(1)
    model = make()
    optimizer = inner(model)
    for _ in range(500):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(X[TEST]).argmax(1) == Y[TEST]).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hypersteps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("runs/distilled.png"))
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, steps = distilled(given.hypersteps)
    classes = torch.arange(10)
    means = torch.stack([X[REAL][Y[REAL] == k].mean(0) for k in range(10)])
    drawn = []
    for seed in range(20):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        drawn.append(torch.stack([order[Y[order] == k][0] for k in range(10)]))
    print(f"test accuracy, trained on ten learned images     {accuracy(images, classes):.3f}  ({steps} steps to learn them)")
    print(f"on ten real ones, mean of 20 draws               {sum(accuracy(X[i], classes) for i in drawn) / 20:.3f}")
    print(f"on the means of the classes                      {accuracy(means, classes):.3f}")
    print(f"on all 1,000 real ones                           {accuracy(X[REAL], Y[REAL]):.3f}")
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.4), layout="constrained")
    for k in range(10):
        for row, shown in enumerate((images, means)):
            limit = shown[k].abs().max()
            axes[row, k].imshow(shown[k].reshape(8, 8), cmap="RdBu_r", vmin=-limit, vmax=limit)
            axes[row, k].set(xticks=[], yticks=[])
    axes[0, 0].set_ylabel("learned")
    axes[1, 0].set_ylabel("mean")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110)
    print(f"-> {given.out}")
