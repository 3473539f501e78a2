"""200 digits: decays, noise widths and label smoothing learned over three folds, then one training on all of them."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.distributions.constraints import positive, unit_interval
from torch.nn import functional as F

import hoptim

torch.manual_seed(0)
torch.set_num_threads(1)  # more are slower for so small a net
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x))
x, y, x_test, y_test = x[order[:200]], y[order[:200]], x[order[200:]], y[order[200:]]


def make():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def inner(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_loss(model, hparams, batch):
    hidden = model[:2](x[batch] + hparams["noise"][0] * torch.randn(len(batch), 64))
    scores = model[2](hidden + hparams["noise"][1] * torch.randn(len(batch), 64))
    labels = torch.lerp(F.one_hot(y[batch], 10).float(), torch.tensor(0.1), hparams["smoothing"])
    return F.cross_entropy(scores, labels) + sum(
        hparams["decay"][i] / 2 * model[2 * i].weight.square().sum() for i in (0, 1)
    )


def val_loss(model, hparams, batch):
    return F.cross_entropy(model(x[batch]), y[batch])


def train(model, optimizer, examples):
    for _ in range(375):
        for batch in examples[torch.randperm(len(examples))].split(50):
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()


values = {"decay": torch.full((2,), 0.01), "noise": torch.full((2,), 0.1), "smoothing": torch.tensor(0.02)}
hparams = hoptim.HyperParameters(values, {"decay": positive, "noise": unit_interval, "smoothing": unit_interval})
settings = {"inner": inner, "examples": 200, "steps": lambda n: 375 * -(-n // 50), "folds": StratifiedKFold(3).split(x, y)}
found = hoptim.CrossValidated(make, hparams, train_loss, val_loss, **settings).fit(train)
print(f"learned, in {found.cost:.1f} trainings: test cross-entropy {F.cross_entropy(found.model(x_test), y_test):.3f}")
for decay in (0.001, 0.01, 0.1):  # the same training with a fixed decay alone
    fixed = nn.ParameterDict({"decay": torch.full((2,), decay), "noise": torch.zeros(2), "smoothing": torch.tensor(0.0)})
    problem = hoptim.Problem(make(), fixed, train_loss, val_loss)
    outer = torch.optim.SGD(fixed.parameters())
    plain = hoptim.BilevelOptimizer(inner(problem.model), outer, problem, val_batches=[order], every=None)
    train(problem.model, plain, torch.arange(200))
    print(f"fixed decay {decay:g}: test cross-entropy {F.cross_entropy(problem.model(x_test), y_test):.3f}")
