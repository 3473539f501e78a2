"""The digits with hypertorch beside hoptim (pip install git+https://github.com/prolearner/hypertorch)."""

import hypergrad
import torch
from digits_task import EVERY, LR, OUTER_LR, STEPS, WARMUP, ridge, start, train, val, x, y
from side_by_side import compare
from torch.nn import functional as F


def with_hypertorch(solve):
    def train_loss(params, hparams):
        losses = F.cross_entropy(F.linear(x[train], *params), y[train], reduction="none")
        return (hparams[0].sigmoid() * losses).mean() + ridge(params)

    def val_loss(params, hparams):
        return F.cross_entropy(F.linear(x[val], *params), y[val])

    params, leaf = list(start().parameters()), torch.zeros(len(train), requires_grad=True)
    inner = hypergrad.GradientDescent(train_loss, LR)
    outer = torch.optim.Adam([leaf], lr=OUTER_LR)
    for step in range(EVERY, STEPS + 1, EVERY):
        history = [params]
        for _ in range(EVERY):
            params = [p.detach().requires_grad_() for p in inner(params, [leaf], create_graph=False)]
            history.append(params)
        if step >= WARMUP:
            outer.zero_grad()
            solve(history, [leaf], inner, val_loss)
            outer.step()
    return params


def cg(history, hparams, inner, val_loss):
    hypergrad.CG(history[-1], hparams, 10, inner, val_loss, tol=0.0)


def neumann(history, hparams, inner, val_loss):
    hypergrad.fixed_point(history[-1], hparams, 21, inner, val_loss, tol=0.0)


def reverse(history, hparams, inner, val_loss):
    hypergrad.reverse(history, hparams, [inner] * EVERY, val_loss)


ROWS = {
    "Neumann, 20 terms, 0.5": (with_hypertorch, neumann),
    "CG, 10 products": (with_hypertorch, cg),
    "20 steps unrolled": (with_hypertorch, reverse),
}

if __name__ == "__main__":
    compare("hypertorch", ROWS)
