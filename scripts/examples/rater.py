"""Rate examples that nobody trained on: a rater learns from one noisy set of digits, and filters the next, in seconds.

    python scripts/examples/rater.py --out rater.png

Four labels in ten are wrong among 700 digits, on which a small network trains while a rater learns what their weights should
be, so that the loss on 100 digits with right labels is low. It sees the pixels, the label, and the loss by a model of the
100. Then it rates 600 others, as noisy as those, and a new network trains on the half that it keeps.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import Rater


def make():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def fit(model, optimizer, loss, examples, steps=300):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(examples[torch.randint(len(examples), (50,))]).backward()
        optimizer.step()
    return model


def draw(path, x, y, true, ratings):
    """The digits with the lowest and the highest ratings, with their labels; red where they are wrong."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    order = ratings.argsort()
    figure, axes = plt.subplots(2, 12, figsize=(11, 2.6), layout="constrained")
    for row, (words, shown) in zip(axes, (("lowest", order[:12]), ("highest", order.flip(0)[:12])), strict=True):
        row[0].set_ylabel(f"{words}\nratings")
        for i, axis in zip(shown.tolist(), row, strict=True):
            axis.imshow(x[i].reshape(8, 8), cmap="gray_r")
            axis.set_title(f"“{int(y[i])}”", fontsize=9, color="black" if y[i] == true[i] else "#c23b22")
            axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rater.png"), help="the picture; default: rater.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    x, true = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x))
    x, true = x[order].float() / 8 - 1, true[order]
    first, clean, others, test = torch.arange(1797).split([700, 100, 600, 397])
    noisy = torch.cat([first, others])
    wrong = noisy[torch.rand(len(noisy)) < 0.4]
    y = true.clone()
    y[wrong] = (y[wrong] + 1) % 10

    def trained(examples):
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return fit(model, optimizer, lambda batch: F.cross_entropy(model(x[batch]), y[batch]), examples)

    losses = F.cross_entropy(trained(clean)(x), y, reduction="none").detach()
    features = torch.cat([x, F.one_hot(y, 10), losses.clamp(max=6)[:, None]], dim=1)

    def compute_loss(model, rater, batch):
        return rater.mean(F.cross_entropy(model(x[batch]), y[batch], reduction="none"), features[batch])

    model, rater = make(), Rater(nn.Sequential(nn.Linear(75, 32), nn.ReLU(), nn.Linear(32, 1)))
    problem = hoptim.Problem(model, rater, compute_loss)
    inner = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hoptim.BilevelOptimizer(
        inner, rater.optimizer(), problem, val_batches=[clean], train_batches=[first], every=2, warmup=75
    )
    fit(model, optimizer, optimizer.loss, first)

    ratings = torch.cat(list(rater.rate(features[others].split(100))))  # in pieces, as from a stream
    kept = others[rater.keep(ratings, share=0.5)]
    right = y == true
    print(f"of the next {len(others)} digits {right[others].float().mean():.0%} have the right label")
    print(f"of the half that the rater keeps {right[kept].float().mean():.0%}")
    for words, examples in (("all", others), ("the kept half", kept), ("the 100 right ones", clean)):
        accuracy = (trained(examples)(x[test]).argmax(1) == true[test]).float().mean()
        print(f"trained on {words}: test accuracy {accuracy:.3f}")
    draw(options.out, x[others], y[others], true[others], ratings)
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
