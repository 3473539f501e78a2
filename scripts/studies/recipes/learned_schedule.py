"""Learn a learning-rate schedule through whole trainings, beside fixed rates and cosine schedules.

    python scripts/studies/recipes/learned_schedule.py [--seeds 3 4 5]

An MLP with 64 hidden units is trained for 200 steps of SGD with momentum on batches of 100; there are 600 training, 200
validation and 997 test digits. The schedule has five knots and starts at a rate of 0.01, ten times too low. Each of its 15
moves differentiates through a whole training (`Replay`). Beside it is the best of six rates by the validation loss, fixed or
with a cosine schedule. A seed sets the split, the weights and the batches; settings were chosen on seeds 0 and 1.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.tables import markdown
from tasks import data
from tasks.loops import train, with_loss

import hoptim
from hoptim.recipes import Schedule

STEPS, MOVES, RATES = 200, 15, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def rows(seed):
    """The test loss of each way, and its cost in plain trainings."""
    torch.manual_seed(seed)
    x, y = data.table("digits")
    order = torch.randperm(len(x))
    x, y, val, test = x.float()[order] / 16, y[order], torch.arange(600, 800), torch.arange(800, len(x))
    start = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    batches = [torch.randperm(600)[:100] for _ in range(STEPS)]

    def loss(model, hparams, batch):
        return F.cross_entropy(model(x[batch]), y[batch])

    def trained(rate):
        """The validation and the test loss after a training with the learning rate ``rate(t)`` at step t."""
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        scheduler = LambdaLR(optimizer, rate)
        optimizer = with_loss(optimizer, lambda batch: loss(model, None, batch))
        train(model, optimizer, batches, after=lambda _: scheduler.step())
        with torch.no_grad():
            return loss(model, None, val).item(), loss(model, None, test).item()

    begun, found = time.process_time(), {}
    fixed = {rate: trained(lambda _, rate=rate: rate) for rate in RATES}
    unit = (time.process_time() - begun) / len(RATES)
    cosine = {r: trained(lambda t, r=r: r * (1 + math.cos(math.pi * min(t / STEPS, 1))) / 2) for r in RATES}
    found["fixed, best of six"] = min(fixed.values())[1], len(RATES)
    found["cosine, best of six"] = min(cosine.values())[1], len(RATES)
    begun = time.process_time()
    model, schedule = copy.deepcopy(start), Schedule(STEPS, start=0.01)
    problem, outer = hoptim.Problem(model, schedule, loss), torch.optim.Adam(schedule.parameters(), lr=0.3)
    inner = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    replay = hoptim.Replay(batches, options=lambda hparams, t: {"lr": hparams.at(t)})
    for _ in range(MOVES):
        hoptim.outer_step(problem, outer, hoptim.hypergradient(problem, None, val, replay, inner=inner).grads)
    found["learned"] = trained(lambda t: schedule.at(t).item())[1], (time.process_time() - begun) / unit
    found["fixed 0.01, the start"] = fixed[0.01][1], 1
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 7])
    torch.set_num_threads(1)
    found = [rows(seed) for seed in parser.parse_args().seeds]
    lines = []
    for name in found[0]:
        ahead = [one[name][0] - one["cosine, best of six"][0] for one in found]
        losses, cost = [one[name][0] for one in found], mean(one[name][1] for one in found)
        lines.append([name, mean_and_error(losses), mean_and_error(ahead, "+.4f"), f"{cost:.1f}"])
    print(markdown(["", "test loss", "less the best cosine", "cost in plain trainings"], lines))
