"""Learn a learning-rate schedule through whole trainings, beside fixed rates and cosine schedules; with a picture.

    python scripts/examples/learned_schedule.py [--out runs/schedule.png] [--seeds 3 4 5]

An MLP with 64 hidden units is trained for 200 steps of SGD with momentum on batches of 100; there are 600 training, 200
validation and 997 test digits. The schedule has five knots and starts at a rate of 0.01, ten times too low. Each of its 15
moves differentiates through a whole training (`Replay`). Beside it is the best of six rates by the validation loss, fixed or
with a cosine schedule. A seed sets the split, the weights and the batches; settings were chosen on seeds 0 and 1.
"""

import argparse
import copy
import math
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import hoptim
from hoptim.recipes import Schedule

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STEPS, MOVES, RATES = 200, 15, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Task:
    """A split of the digits, the model's first weights, and the batches of a training."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(x))
        self.x, self.y = x.float()[order] / 16, y[order]
        self.val, self.test = torch.arange(600, 800), torch.arange(800, len(x))
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.batches = [torch.randperm(600)[:100] for _ in range(STEPS)]

    def loss(self, model, hparams, batch):
        return F.cross_entropy(model(self.x[batch]), self.y[batch])

    def trained(self, rate):
        """The validation and the test loss after a training with the learning rate ``rate(t)`` at step t."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        scheduler = LambdaLR(optimizer, rate)
        for batch in self.batches:
            optimizer.zero_grad()
            self.loss(model, None, batch).backward()
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            return self.loss(model, None, self.val).item(), self.loss(model, None, self.test).item()

    def learned(self):
        """The learned schedule."""
        model, schedule = copy.deepcopy(self.model), Schedule(STEPS, start=0.01)
        problem = hoptim.Problem(model, schedule, self.loss, self.loss)
        inner, outer = (
            torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
            torch.optim.Adam(schedule.parameters(), lr=0.3),
        )
        replay = hoptim.Replay(self.batches, options=lambda hparams, t: {"lr": hparams.at(t)})
        for _ in range(MOVES):
            result = hoptim.hypergradient(problem, None, self.val, replay, inner=inner)
            hoptim.outer_step(problem, outer, result.grads)
        return schedule


def cosine(rate):
    return lambda t: rate * (1 + math.cos(math.pi * min(t / STEPS, 1))) / 2


def rows(seed):
    """The test loss and the cost of each way, and the learned schedule."""
    task, found = Task(seed), {}
    begun = time.process_time()
    fixed = {rate: task.trained(lambda _, rate=rate: rate) for rate in RATES}
    unit = (time.process_time() - begun) / len(RATES)
    bent = {rate: task.trained(cosine(rate)) for rate in RATES}
    for name, losses in (("fixed, best of six", fixed), ("cosine, best of six", bent)):
        found[name] = min(losses.values())[1], len(RATES)
    begun = time.process_time()
    schedule = task.learned()
    found["learned"] = task.trained(lambda t: schedule.at(t).item())[1], (time.process_time() - begun) / unit
    found["fixed 0.01, the start"] = fixed[0.01][1], 1
    return found, [schedule.at(t).item() for t in range(STEPS)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 7])
    parser.add_argument("--out", type=Path, default=Path("runs/schedule.png"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [rows(seed) for seed in given.seeds]
    print(f"seeds {given.seeds}: test loss, minus that of the best cosine (paired), cost in plain trainings")
    for name in found[0][0]:
        losses = [one[name][0] for one, _ in found]
        ahead = [one[name][0] - one["cosine, best of six"][0] for one, _ in found]
        spread = statistics.stdev(ahead) / math.sqrt(len(ahead)) if len(ahead) > 1 else float("nan")
        cost = statistics.mean(one[name][1] for one, _ in found)
        print(f"  {name:24} {statistics.mean(losses):.4f}  {statistics.mean(ahead):+.4f} ± {spread:.4f}  {cost:6.1f}")
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for seed, (_, curve) in zip(given.seeds, found, strict=True):
        axis.plot(curve, label=f"seed {seed}")
    axis.axhline(0.01, color="grey", linestyle="--", label="start")
    axis.set(xlabel="step", ylabel="learning rate", yscale="log", title=f"learned in {MOVES} moves")
    axis.legend(frameon=False)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110)
    print(f"-> {given.out}")
