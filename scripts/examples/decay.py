"""The README's first example: learn a decay for each weight while an MLP trains on 400 digits, some mislabelled."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import hoptim

torch.set_num_threads(1)  # more are slower for so small a net
torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x, order = x.float() / 16, torch.randperm(len(x))
train, val, test = order[:400], order[400:600], order[600:]
y[train[:80]] = torch.randint(10, (80,))
batches = [train[torch.randperm(400)[:50]] for _ in range(1500)]
criterion = nn.CrossEntropyLoss()


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


model = make()


def compute_loss(model, hparams, batch):
    return criterion(model(x[batch]), y[batch])


hparams = hoptim.recipes.WeightDecay(model, per="weight")
problem = hoptim.Problem(model, hparams, compute_loss)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = hoptim.BilevelOptimizer(
    optimizer, hparams.optimizer(), problem, options={"weight_decay": hparams}, val_batches=[val], every=80, warmup=375
)
for batch in batches:
    optimizer.zero_grad()
    loss = optimizer.loss(batch)
    loss.backward()
    optimizer.step()
print(hparams)

print(f"test loss: learned {criterion(model(x[test]), y[test]):.2f}", end="")
for decay in (1e-4, 1e-3, 3e-3, 1e-2):  # the same without hoptim
    model = make()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [model[0].bias, model[2].bias]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        optimizer.step()
    print(f", fixed at {decay:g} {criterion(model(x[test]), y[test]):.2f}", end="")
print()
