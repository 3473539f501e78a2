"""The same meta-training on sinusoids in learn2learn, higher, TorchOpt and hoptim: loops to compare, for who comes from one.

    python scripts/studies/few_shot/loops.py

All begin at the same weights and see the same tasks. It prints how far apart their weights end after 50 meta-steps, in
float64, and the CPU seconds of each. How to install the libraries, says peers.py; those that are not there are left out.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from studies.few_shot.peers import library

import hoptim
from hoptim.recipes import Initialization

META_STEPS, TASKS, SHOTS, STEPS, LR = 50, 25, 10, 5, 0.01


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def sample(seed):
    """A batch of sinusoids: inputs and targets to train on, inputs and targets to judge by."""
    draw = torch.Generator().manual_seed(seed)
    height, phase, x = (torch.rand(TASKS, n, 1, generator=draw) for n in (1, 1, 2 * SHOTS))
    x = 10 * x - 5
    y = (0.1 + 4.9 * height) * (x - torch.pi * phase).sin()
    return x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]


def with_learn2learn():
    l2l = library("learn2learn")
    model = network()
    maml = l2l.algorithms.MAML(model, lr=LR)
    outer = torch.optim.Adam(maml.parameters(), lr=1e-3)
    for number in range(META_STEPS):
        outer.zero_grad()
        for x, y, x_val, y_val in zip(*sample(number), strict=True):
            learner = maml.clone()
            for _ in range(STEPS):
                learner.adapt(F.mse_loss(learner(x), y))
            (F.mse_loss(learner(x_val), y_val) / TASKS).backward()
        outer.step()
    return model


def with_higher():
    higher = library("higher")
    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    outer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(META_STEPS):
        outer.zero_grad()
        for x, y, x_val, y_val in zip(*sample(number), strict=True):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fmodel, diffopt):
                for _ in range(STEPS):
                    diffopt.step(F.mse_loss(fmodel(x), y))
                (F.mse_loss(fmodel(x_val), y_val) / TASKS).backward()
        outer.step()
    return model


def with_torchopt():
    torchopt = library("torchopt")
    model = network()
    inner = torchopt.MetaSGD(model, lr=LR)
    outer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for number in range(META_STEPS):
        outer.zero_grad()
        net = torchopt.extract_state_dict(model, by="reference")
        state = torchopt.extract_state_dict(inner, by="reference")
        for x, y, x_val, y_val in zip(*sample(number), strict=True):
            for _ in range(STEPS):
                inner.step(F.mse_loss(model(x), y))
            (F.mse_loss(model(x_val), y_val) / TASKS).backward()
            torchopt.recover_state_dict(model, net)
            torchopt.recover_state_dict(inner, state)
        outer.step()
    return model


def with_hoptim():
    def loss(model, hparams, batch):
        x, y = batch
        return F.mse_loss(model(x), y)

    model = network()
    inner = torch.optim.SGD(model.parameters(), lr=LR)
    initial = Initialization(model)
    outer = torch.optim.Adam(initial.parameters(), lr=1e-3)
    problem, maml = hoptim.Problem(model, initial, loss), hoptim.PerTask(STEPS)
    for number in range(META_STEPS):
        x, y, x_val, y_val = sample(number)
        result = hoptim.hypergradient(problem, (x, y), (x_val, y_val), maml, inner=inner)
        hoptim.outer_step(problem, outer, result.grads)
    initial.write(model)
    return model


WAYS: dict[str, Callable[[], Any]] = {
    "hoptim": with_hoptim,
    "learn2learn": with_learn2learn,
    "higher": with_higher,
    "TorchOpt": with_torchopt,
}


def main() -> None:
    warnings.simplefilter("ignore")  # TorchOpt and learn2learn use names that torch has deprecated
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    weights: dict[str, Any] = {}
    for name, way in WAYS.items():
        try:
            way()  # what is done once is left out of the time
        except ImportError as error:
            print(f"{name}: left out. {error}")
            continue
        begun = time.process_time()
        model = way()
        seconds = time.process_time() - begun
        weights[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        apart = (weights[name] - weights["hoptim"]).norm() / weights["hoptim"].norm()
        print(f"{name}: {seconds:.1f} s, differs by {apart:.0e}")


if __name__ == "__main__":
    main()
