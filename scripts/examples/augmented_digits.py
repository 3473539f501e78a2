"""Learn which changes of images help, and how large they should be: seven magnitudes, on five splits of the digits.

    python scripts/examples/augmented_digits.py [--seeds 10 11 ...]

The magnitudes are learned with 200 training and 200 validation digits; then a new net is trained on all 400 with them.
Beside it are nets trained on all 400 without changes, and with all changes at the same magnitude. The test set has 1,397
digits. A CNN of two layers is trained for 1,200 steps of SGD with momentum on batches of 50. Settings were chosen on seeds
0 and 1.
"""

import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import Augmentation

STEPS, BATCH = 1200, 50
TRAIN, VAL, BOTH, TEST = torch.arange(200), torch.arange(200, 400), torch.arange(400), torch.arange(400, 1797)


def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def inner(model):
    return torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)


def train(model, optimizer, examples):
    for _ in range(STEPS * BATCH // len(examples)):
        for batch in examples[torch.randperm(len(examples))].split(BATCH):
            optimizer.zero_grad()
            optimizer.loss(batch).backward()
            optimizer.step()


def rows(seed):
    """The test loss, accuracy and cost of each row, and what was learned."""
    torch.manual_seed(seed)
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(x))
    x, y, found = x.float()[order].reshape(-1, 1, 8, 8) / 16, y[order], {}

    def val_loss(model, hparams, batch):
        return F.cross_entropy(model(x[batch]), y[batch])

    # The loss shows its parts, for Gauss-Newton: on the exact Hessian the hypergradient had the wrong sign at five terms.
    train_loss = hoptim.CompositeLoss(
        lambda model, hparams, batch: model(hparams.augment(x[batch])),
        lambda z, _, batch: F.cross_entropy(z, y[batch]),
        lambda model, _: 5e-4 * sum(p.square().sum() for p in model.parameters()),
    )

    def measured(name, model, begun):
        with torch.no_grad():
            z = model(x[TEST])
        right = (z.argmax(1) == y[TEST]).float().mean().item()
        found[name] = F.cross_entropy(z, y[TEST]).item(), right, time.process_time() - begun

    for name, start in (("no changes", 1e-6), ("all at 0.1", 0.1), ("all at 0.2", 0.2)):
        begun, problem = time.process_time(), hoptim.Problem(make(), Augmentation(start=start), train_loss, val_loss)
        measured(name, hoptim.retrain(problem, make, train, BOTH, inner=inner), begun)
    begun, model, changes = time.process_time(), make(), Augmentation(start=0.1)
    problem, outer = hoptim.Problem(model, changes, train_loss, val_loss), torch.optim.Adam(changes.parameters(), lr=0.05)
    optimizer = hoptim.BilevelOptimizer(inner(model), outer, problem, val_batches=[VAL], every=10, warmup=STEPS // 4)
    train(model, optimizer, TRAIN)
    measured("learned", hoptim.retrain(problem, make, train, BOTH, inner=inner), begun)
    return found, {name: changes[name].item() for name in changes}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10, 15)))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [rows(seed) for seed in given.seeds]
    unit = statistics.mean(one["all at 0.1"][2] for one, _ in found)
    print(f"seeds {given.seeds}: test loss, learned minus it (paired), accuracy, cost in trainings with changes")
    for name in found[0][0]:
        ahead = [one["learned"][0] - one[name][0] for one, _ in found]
        spread = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else float("nan")
        loss, right, cost = (statistics.mean(one[name][part] for one, _ in found) for part in range(3))
        print(f"  {name:12} {loss:.4f}  {statistics.mean(ahead):+.4f} ± {spread:.4f}  {right:.4f}  {cost / unit:4.1f}")
    means = {name: statistics.mean(learned[name] for _, learned in found) for name in found[0][1]}
    print("learned magnitudes, means:", ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
