"""The digits with TorchOpt beside hoptim: implicit differentiation, and unrolled steps (pip install torchopt)."""

import torch
import torchopt
from digits_task import EVERY, LR, OUTER_LR, STEPS, WARMUP, ridge, start, train, val, x, y
from side_by_side import compare
from torch.nn import functional as F
from torchopt.linear_solve import solve_cg, solve_inv
from torchopt.nn import ImplicitMetaGradientModule


def with_torchopt(linear_solve):
    class Inner(ImplicitMetaGradientModule, linear_solve=linear_solve):
        def __init__(self, leaf):
            super().__init__()
            self.leaf = leaf
            self.net = start()

        def objective(self):
            losses = F.cross_entropy(self.net(x[train]), y[train], reduction="none")
            return (self.leaf.sigmoid() * losses).mean() + ridge(self.net.parameters())

        def solve(self):
            params = tuple(self.parameters())
            optimizer = torchopt.SGD(params, lr=LR)
            with torch.enable_grad():
                for _ in range(EVERY):
                    optimizer.zero_grad()
                    self.objective().backward(inputs=params)
                    optimizer.step()
            return self

    leaf = torch.zeros(len(train), requires_grad=True)
    inner, outer = Inner(leaf), torch.optim.Adam([leaf], lr=OUTER_LR)
    for step in range(EVERY, STEPS + 1, EVERY):
        for p in inner.parameters():
            p.detach_().requires_grad_()
        solved = inner.solve()
        if step >= WARMUP:
            outer.zero_grad()
            F.cross_entropy(solved.net(x[val]), y[val]).backward()
            outer.step()
    return list(inner.net.parameters())


def unrolled_with_torchopt(steps):
    model, leaf = start(), torch.zeros(len(train), requires_grad=True)
    inner, outer = torchopt.MetaSGD(model, lr=LR), torch.optim.Adam([leaf], lr=OUTER_LR)
    for step in range(1, STEPS + 1):
        losses = F.cross_entropy(model(x[train]), y[train], reduction="none")
        inner.step((leaf.sigmoid() * losses).mean() + ridge(model.parameters()))
        if step % steps == 0:
            if step >= WARMUP:
                outer.zero_grad()
                F.cross_entropy(model(x[val]), y[val]).backward()
                outer.step()
            torchopt.stop_gradient(model)
            torchopt.stop_gradient(inner)
    return list(model.parameters())


ROWS = {
    "Neumann, 20 terms, 0.5": (with_torchopt, solve_inv(ns=True, maxiter=20, alpha=0.5)),
    "Neumann, 20 terms, 4": (with_torchopt, solve_inv(ns=True, maxiter=20, alpha=4.0)),
    "CG, 10 products": (with_torchopt, solve_cg(maxiter=10, rtol=0.0)),
    "20 steps unrolled": (unrolled_with_torchopt, 20),
}

if __name__ == "__main__":
    compare("torchopt", ROWS)
