"""200 digits: decays, noise widths and label smoothing learned over three folds, then one training on all of them."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay

torch.manual_seed(0)
torch.set_num_threads(1)  # more are slower for so small a net
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x))
x, y, x_test, y_test = x[order[:200]], y[order[:200]], x[order[200:]], y[order[200:]]


def make():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def inner(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def compute_loss(model, hparams, batch):
    scores = hparams["noise"].call(model, x[batch])
    return hparams["smoothing"].cross_entropy(scores, y[batch]) + hparams["decay"].penalty(model)


def train(model, optimizer, examples):
    for _ in range(375):
        for batch in examples[torch.randperm(len(examples))].split(50):
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()


def recipe(decay, rest):
    decay, noise = WeightDecay(make(), start=decay), NoiseWidth(make(), start=rest)
    return nn.ModuleDict({"decay": decay, "noise": noise, "smoothing": LabelSmoothing(start=rest)})


hparams = recipe(decay=0.01, rest=0.05)
settings = {"inner": inner, "examples": 200, "steps": lambda n: 375 * -(-n // 50)}
found = hoptim.CrossValidated(make, hparams, compute_loss, **settings).fit(train)
print(f"learned, in {found.cost:.1f} trainings: test cross-entropy {F.cross_entropy(found.model(x_test), y_test):.3f}")
for decay in (0.001, 0.01, 0.1):  # the same training with a fixed decay alone
    problem = hoptim.Problem(make(), recipe(decay, rest=1e-6), compute_loss)
    unused = torch.optim.SGD(problem.hparams.parameters())
    plain = hoptim.BilevelOptimizer(inner(problem.model), unused, problem, val_batches=[order], every=None)
    train(problem.model, plain, torch.arange(200))
    print(f"fixed decay {decay:g}: test cross-entropy {F.cross_entropy(problem.model(x_test), y_test):.3f}")
