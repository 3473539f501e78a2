"""The digits with higher beside hoptim: 20 steps unrolled (pip install higher)."""

import higher
import torch
from digits_task import LR, OUTER_LR, STEPS, WARMUP, ridge, start, train, val, x, y
from side_by_side import compare
from torch.nn import functional as F


def with_higher(steps):
    model, leaf = start(), torch.zeros(len(train), requires_grad=True)
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    outer = torch.optim.Adam([leaf], lr=OUTER_LR)
    for step in range(steps, STEPS + 1, steps):
        with higher.innerloop_ctx(model, inner) as (fmodel, diffopt):
            for _ in range(steps):
                losses = F.cross_entropy(fmodel(x[train]), y[train], reduction="none")
                diffopt.step((leaf.sigmoid() * losses).mean() + ridge(fmodel.parameters()))
            if step >= WARMUP:
                outer.zero_grad()
                F.cross_entropy(fmodel(x[val]), y[val]).backward()
                outer.step()
            model.load_state_dict(fmodel.state_dict())
    return list(model.parameters())


ROWS = {"20 steps unrolled": (with_higher, 20)}

if __name__ == "__main__":
    compare("higher", ROWS)
