"""Which training examples are wrong, and which ones made a prediction? Influence on pictures of clothes, in a minute.

    python scripts/examples/influence.py --data data --out influence.png

A small network learns 1,000 images of Fashion-MNIST, of which 100 have a wrong label. Its decisions on 500 others are
explained by the examples that helped and hurt most, and wrong labels are looked for by the influence of each example on the
mean loss of the 500, and on its own loss.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

import hoptim

SHOWN = 6  # examples that helped, and that hurt, for each prediction


def losses(model, hparams, batch):
    """The loss of each example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train_loss(model, hparams, batch):
    return losses(model, hparams, batch).mean() + 0.5e-3 * sum(p.square().sum() for p in model.parameters())


def trained(x, y, epochs=30):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            train_loss(model, None, (x[index], y[index])).backward()
            optimizer.step()
    return model


def draw(path, x, titles):
    """A row for each prediction: the image, then those that helped, then those that hurt."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows, columns = len(x), len(x[0])
    figure, axes = plt.subplots(rows, columns, figsize=(1.05 * columns, 1.5 * rows), layout="constrained", squeeze=False)
    for images, words, line in zip(x, titles, axes, strict=True):
        for image, (title, colour), axis in zip(images, words, line, strict=True):
            axis.imshow(image[0], cmap="gray_r")
            axis.set_title(title, fontsize=7, color=colour)
            axis.axis("off")
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="where Fashion-MNIST is, or goes; default: data")
    parser.add_argument("--out", type=Path, default=Path("influence.png"), help="the picture; default: influence.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    found = FashionMNIST(options.data, download=True)
    names = found.classes
    index = torch.randperm(len(found.data))[:1500]
    x, y = (found.data[index, None] / 255 - 0.286) / 0.353, found.targets[index]
    (x, x_val), (y, y_val) = x.split([1000, 500]), y.split([1000, 500])
    wrong = torch.arange(1000) < 100
    y[wrong] = (y[wrong] + torch.randint(1, 10, (100,))) % 10
    model = trained(x, y)

    problem = hoptim.Problem(model, None, train_loss, losses)  # no hyperparameters, and a validation loss for each image
    with torch.no_grad():
        z = model(x_val)
    queries = F.cross_entropy(z, y_val, reduction="none").topk(3).indices  # the worst three decisions
    explained = hoptim.influence(problem, losses, (x, y), (x_val[queries], y_val[queries]))
    print(f"the solve ended {explained.solution.status.name}: {explained.solution.detail}")
    images, titles = [], []
    for query, scores in zip(queries, explained.scores, strict=True):
        helped, hurt = scores.argsort()[:SHOWN], scores.argsort(descending=True)[:SHOWN]
        images.append(torch.cat([x_val[query][None], x[helped], x[hurt]]))
        first = (f"{names[y_val[query]]},\ntaken for {names[z[query].argmax()]}", "black")
        titles.append([first])
        for word, colour, shown in (("helped:", "#1f5fb4", helped), ("hurt:", "#d9722b", hurt)):
            titles[-1] += [(f"{word}\n{names[y[i]]}{' (wrong)' * bool(wrong[i])}", colour) for i in shown]
    draw(options.out, images, titles)

    mean_loss = hoptim.Problem(model, None, train_loss, lambda *given: losses(*given).mean())
    on_validation = hoptim.influence(mean_loss, losses, (x, y), (x_val, y_val)).scores
    pieces = list(zip(x.split(100), y.split(100), strict=True))
    on_itself = hoptim.self_influence(problem, losses, (x, y), examples=pieces).scores
    with torch.no_grad():
        by_loss = losses(model, None, (x, y))
    ways = {"validation loss": on_validation, "influence on itself": -on_itself, "its own loss": by_loss}
    for way, scores in ways.items():
        print(f"of the 100 highest by {way}, {int(wrong[scores.topk(100).indices].sum())} have wrong labels")
    print(f"-> {options.out}")


if __name__ == "__main__":
    main()
