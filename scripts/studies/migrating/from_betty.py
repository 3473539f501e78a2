"""The digits with betty beside hoptim: differences, Neumann and CG (pip install betty-ml, which needs Python < 3.11)."""

import logging

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from digits_task import EVERY, LR, OUTER_LR, STEPS, WARMUP, ridge, start, train, val, x, y
from side_by_side import compare
from torch import nn
from torch.nn import functional as F


def with_betty(options):
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf = nn.Parameter(torch.zeros(len(train)))

        def forward(self, batch):
            return self.leaf[batch].sigmoid()

    class Outer(ImplicitProblem):
        def training_step(self, batch):
            (batch,) = batch
            return F.cross_entropy(self.inner(x[batch]), y[batch])

        def configure_train_data_loader(self):
            return [(val,)]

        def configure_module(self):
            return Weights()

        def configure_optimizer(self):
            return torch.optim.Adam(self.module.parameters(), lr=OUTER_LR)

    class Inner(ImplicitProblem):
        def training_step(self, batch):
            (batch,) = batch
            losses = F.cross_entropy(self.module(x[batch]), y[batch], reduction="none")
            return (self.outer(batch) * losses).mean() + ridge(self.module.parameters())

        def configure_train_data_loader(self):
            return [(train,)]

        def configure_module(self):
            return start()

        def configure_optimizer(self):
            return torch.optim.SGD(self.module.parameters(), lr=LR)

    outer = Outer(name="outer", config=Config(retain_graph=True))
    inner = Inner(name="inner", config=Config(unroll_steps=EVERY, warmup_steps=WARMUP - 1, **options))
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    config = EngineConfig(train_iters=STEPS, strategy="cpu")
    Engine(problems=[outer, inner], config=config, dependencies=dependencies).run()
    return list(inner.module.parameters())


def neumann(step_size):
    return with_betty, {"type": "neumann", "neumann_iterations": 20, "neumann_alpha": step_size}


ROWS = {
    "darts": (with_betty, {"type": "darts"}),
    "Neumann, 20 terms, 0.5": neumann(0.5),
    "Neumann, 20 terms, 4": neumann(4.0),
    "CG, 10 products": (with_betty, {"type": "cg", "cg_iterations": 10}),
}

if __name__ == "__main__":
    logging.disable(logging.INFO)  # betty's engine logs each start
    compare("betty", ROWS)
