"""The digits with hoptim, which is compared with each of the other libraries."""

import torch
from digits_task import EVERY, LR, OUTER_LR, STEPS, WARMUP, ridge, start, test_loss, train, val, x, y
from torch.distributions.constraints import unit_interval
from torch.nn import functional as F

import hoptim


def with_hoptim(method):
    def train_loss(model, hparams, batch):
        losses = F.cross_entropy(model(x[batch]), y[batch], reduction="none")
        return (hparams["weight"][batch] * losses).mean() + ridge(model.parameters())

    def val_loss(model, hparams, batch):
        return F.cross_entropy(model(x[batch]), y[batch])

    model, hparams = start(), hoptim.HyperParameters({"weight": torch.full((len(train),), 0.5)}, {"weight": unit_interval})
    optimizer = hoptim.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR),
        torch.optim.Adam(hparams.parameters(), lr=OUTER_LR),
        hoptim.Problem(model, hparams, train_loss, val_loss),
        val_batches=[val],
        hypergradient=method,
        every=EVERY,
        warmup=WARMUP,
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        optimizer.loss(train).backward()
        optimizer.step()
    return list(model.parameters())


METHODS = {  # the methods of the other libraries, as hoptim's
    "darts": hoptim.Implicit(hoptim.Identity()),
    "Neumann, 20 terms, 0.5": hoptim.Implicit(hoptim.Neumann(terms=20, step_size=0.5), curvature=hoptim.Exact()),
    "Neumann, 20 terms, 4": hoptim.Implicit(hoptim.Neumann(terms=20, step_size=4.0), curvature=hoptim.Exact()),  # diverges
    "CG, 10 products": hoptim.Implicit(hoptim.CG(terms=10, tolerance=0.0), curvature=hoptim.Exact()),
    "20 steps unrolled": hoptim.Unrolled(20),
}

if __name__ == "__main__":
    for name, method in {"by default": hoptim.Implicit(), **METHODS}.items():
        print(f"{name}: test loss {test_loss(with_hoptim(method)):.6f}")
