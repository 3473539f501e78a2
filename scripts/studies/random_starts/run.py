"""Final test losses from a hundred random learning rates, momenta and weight decays: kept as drawn, or learned.

    python scripts/studies/random_starts/run.py [--starts 100] [--out runs/random_starts.png]

This is figure 1 of Clarke, Oldewage and Hernández-Lobato 2022 (arXiv 2110.10461) on another data set, diabetes: 265 patients
for training, 88 for validation, 89 for testing. An MLP with 50 hidden units is trained for 1,000 steps of SGD with momentum
on batches of 64. The learning rate is drawn from 1e-5 to 0.3 and the decay from 1e-6 to 0.1, both on a log scale, the
momentum from 0.05 to 0.95. When they are learned, all three move every 10 steps, by differentiation through the last 10.
Each start has the same weights and batches in both cases.

It prints quartiles, and the test loss of the best of n starts by the validation loss; the picture has it against cost, too.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import constraints
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tasks import data

import hoptim

STEPS, BATCH = 1000, 64
TRAIN, VAL, TEST = torch.arange(265), torch.arange(265, 353), torch.arange(353, 442)
ORDER = torch.randperm(442, generator=torch.Generator().manual_seed(0))
X, Y = (part.float()[ORDER].reshape(442, -1) for part in data.table("diabetes"))
X, Y = ((part - part[:265].mean(0)) / part[:265].std(0) for part in (X, Y))


def loss(model, hparams, batch):
    return F.mse_loss(model(X[batch]), Y[batch])


def trained(start, seed, learn, steps):
    """The validation loss, test loss and processor time of a training that starts from these hyperparameters."""
    torch.manual_seed(seed)
    begun, model = time.process_time(), nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))
    inner = optimizer = torch.optim.SGD(model.parameters(), **start)
    if learn:
        kinds = {"lr": constraints.positive, "momentum": constraints.unit_interval, "weight_decay": constraints.positive}
        hparams = hoptim.HyperParameters({name: torch.tensor(value) for name, value in start.items()}, kinds)
        names = {name: name for name in start}
        problem, outer = hoptim.Problem(model, hparams, loss), torch.optim.Adam(hparams.parameters(), lr=0.1)
        settings = {"val_batches": [VAL], "options": names, "hypergradient": hoptim.Unrolled(10), "every": 10}
        optimizer = hoptim.BilevelOptimizer(inner, outer, problem, **settings)
    for step in range(steps):
        if step % 4 == 0:
            parts = TRAIN[torch.randperm(len(TRAIN))].split(BATCH)
        optimizer.zero_grad()
        (optimizer.loss(parts[step % 4]) if learn else loss(model, None, parts[step % 4])).backward()
        optimizer.step()
    with torch.no_grad():
        return loss(model, None, VAL).item(), loss(model, None, TEST).item(), time.process_time() - begun


def best_of(found, n, draws=2000):
    """The mean test loss of the best of n starts by the validation loss, over random draws of n starts."""
    val, test = (np.nan_to_num(np.array([one[part] for one in found]), nan=1e9) for part in (0, 1))
    picks = np.random.default_rng(0).integers(len(found), size=(draws, n))
    return float(np.mean(test[picks[np.arange(draws), val[picks].argmin(1)]]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="of the starts; settings were chosen on seed 0")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training; default: {STEPS}")
    parser.add_argument("--out", type=Path, default=Path("runs/random_starts.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    draw = np.random.default_rng(given.seed)
    starts = [
        {
            "lr": float(np.exp(draw.uniform(np.log(1e-5), np.log(0.3)))),
            "momentum": float(draw.uniform(0.05, 0.95)),
            "weight_decay": float(np.exp(draw.uniform(np.log(1e-6), np.log(0.1)))),
        }
        for _ in range(given.starts)
    ]
    rows = {
        name: [trained(start, seed, learn, given.steps) for seed, start in enumerate(starts)]
        for name, learn in (("kept", False), ("learned", True))
    }
    cost = sum(one[2] for one in rows["learned"]) / sum(one[2] for one in rows["kept"])
    print(f"{given.starts} starts; a training with learning costs {cost:.1f} plain ones; mean squared error on the test set")
    print("            quartiles                best of 1, 3, 10 starts by the validation loss")
    for name, found in rows.items():
        quartiles = np.nanpercentile([one[1] for one in found], (25, 50, 75))
        best = [best_of(found, n) for n in (1, 3, 10)]
        print(f"  {name:8}", *(f"{value:.3f}" for value in quartiles), "      ", *(f"{value:.3f}" for value in best))
    from common.pictures import plt, save

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, found in rows.items():
        losses = np.sort(np.nan_to_num([one[1] for one in found], nan=np.inf))
        left.step(losses, np.arange(1, len(losses) + 1) / len(losses), label=name)
        counts = np.arange(1, 31)
        right.plot(counts * (cost if name == "learned" else 1), [best_of(found, n) for n in counts], label=name)
    left.set(xlabel="test loss", ylabel="share of the starts", xlim=(0.4, 1.5), title="final test losses")
    right.set(xlabel="cost in plain trainings", ylabel="test loss", xscale="log", title="best of n by the validation loss")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    save(figure, given.out)
    print(f"-> {given.out}")
