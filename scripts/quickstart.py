"""Digits with 40 % wrong training labels: learn the weight of every training example, and compare with and without."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F

import hoptim

torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x))
train, val, test = order[:600], order[600:800], order[800:]
wrong = torch.rand(600) < 0.4
y[train[wrong]] = torch.randint(10, (int(wrong.sum()),))


def train_loss(model, hparams, batch):
    losses = F.cross_entropy(model(x[train][batch]), y[train][batch], reduction="none")
    return (hparams["example_weight"][batch] * losses).mean()


def val_loss(model, hparams, batch):
    return F.cross_entropy(model(x[batch]), y[batch])


def run(every):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)

    hparams = hoptim.HyperParameters(
        {"example_weight": torch.full((600,), 0.5)}, {"example_weight": constraints.unit_interval}
    )
    problem = hoptim.Problem(model, hparams, train_loss, val_loss)
    outer = torch.optim.Adam(hparams.parameters(), lr=0.1)
    optimizer = hoptim.BilevelOptimizer(inner, outer, problem, val_batches=[val], every=every, warmup=60)

    for _ in range(200):
        for batch in torch.randperm(600).split(100):
            optimizer.zero_grad()
            loss = optimizer.loss(batch)  # was: criterion(model(x), y)
            loss.backward()
            optimizer.step()
    return model, hparams


for name, every in (("without", None), ("with", 10)):
    model, hparams = run(every)
    figures = [f"{part} loss {val_loss(model, hparams, index):.3f}" for part, index in (("val", val), ("test", test))]
    print(name, *figures, f"test accuracy {(model(x[test]).argmax(1) == y[test]).float().mean():.3f}", sep="  ")
weights = hparams["example_weight"].detach()
print(f"mean weight of right labels {weights[~wrong].mean():.2f}, of wrong ones {weights[wrong].mean():.2f}")
