"""What CrossValidated is good for: its test loss and cost beside fixed decays and a decay chosen on the same three folds.

    python scripts/examples/cross_validated_study.py [digits diabetes wine boston fashion] [--splits 10 11 12 ...]

Each split has 200 examples of digits to learn from (diabetes 220, wine 120, Boston housing 300, Fashion-MNIST 1,000). The
others are the test set, except that Fashion-MNIST has 5,000. An MLP with 64 hidden units, or a CNN of two layers for
Fashion-MNIST, is trained for 1,500 steps of SGD with momentum on batches of 50. The rows:

- fixed D: trained on all examples with a decay of D;
- grid: the best of five fixed decays by its mean loss on the three folds, then trained on all examples;
- learned: CrossValidated with a decay for each layer, noise before each layer, and label smoothing where there are classes;
- a unit: the same with a decay for each unit.

Their start was chosen on splits 0 to 2 of digits and diabetes, the number of hypersteps on 0 to 3 of all but Fashion-MNIST.
Costs are in plain trainings, by processor time. torchvision downloads Fashion-MNIST; Boston housing is the file
boston/boston.csv.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.model_selection import KFold
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

sys.path.insert(0, str(Path(__file__).parents[1]))
from common.means import mean_and_error
from fidelity_problems import boston

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay


def load_fashion(root):
    """6,000 images, as numbers from 0 to 1 in rows of 784, and their classes."""
    data = FashionMNIST(root, download=True)
    return data.data[:6000].flatten(1) / 255, data.targets[:6000]


def of_sklearn(load):
    return lambda _: tuple(map(torch.tensor, load(return_X_y=True)))


SETS = {  # how to read it, how many examples there are to learn from, and what its features are divided by
    "digits": (of_sklearn(load_digits), 200, 16),
    "diabetes": (of_sklearn(load_diabetes), 220, None),  # None: each feature is standardised
    "wine": (of_sklearn(load_wine), 120, None),
    "boston": (boston.read, 300, None),
    "fashion": (load_fashion, 1000, 1),
}
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
STEPS, BATCH, START = 1500, 50, 1e-2


class Split:
    """A data set, split into the first n examples to learn from and the test set, and how its model is trained."""

    def __init__(self, name, number, root):
        load, self.n, scale = SETS[name]
        x, y = load(root)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
        x, y, self.has_classes = x.float()[order], y[order], not y.is_floating_point()
        self.x = x / scale if scale else (x - x[: self.n].mean(0)) / x[: self.n].std(0)
        own = y[: self.n].double()
        self.y = y if self.has_classes else ((y - own.mean()) / own.std()).float()[:, None]
        self.outputs, self.number = (int(y.max()) + 1 if self.has_classes else 1), number
        self.lr = 0.1 if self.has_classes and name != "fashion" else 0.01
        self.is_image = name == "fashion"

    def make(self):
        if self.is_image:
            return nn.Sequential(
                nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.ReLU(),
                nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(784, self.outputs),
            )  # fmt: skip
        return nn.Sequential(nn.Linear(self.x.shape[1], 64), nn.ReLU(), nn.Linear(64, self.outputs))

    def inner(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9)

    def val_loss(self, model, hparams, batch):
        z = model(self.x[batch])
        return F.cross_entropy(z, self.y[batch]) if self.has_classes else F.mse_loss(z, self.y[batch])

    def train_loss(self, model, hparams, batch):
        z = hparams["noise"].call(model, self.x[batch])
        fit = hparams["smoothing"].cross_entropy(z, self.y[batch]) if self.has_classes else F.mse_loss(z, self.y[batch])
        return fit + hparams["decay"].penalty(model)

    def train(self, model, optimizer, examples):
        steps = 0
        while steps < STEPS:
            for batch in examples[torch.randperm(len(examples))].split(BATCH)[: STEPS - steps]:
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()
                steps += 1

    def fixed(self, decay, examples, held_out):
        """Train with this decay and without hoptim's optimizer; return the loss on ``held_out``."""
        torch.manual_seed(self.number)
        model = self.make()
        penalty, optimizer = WeightDecay(model, start=decay).requires_grad_(False), self.inner(model)
        optimizer.loss = lambda batch: self.val_loss(model, None, batch) + penalty.penalty(model)
        self.train(model, optimizer, examples)
        return self.val_loss(model, None, held_out).item()

    def learned(self, test, per="tensor"):
        """Learn by ``CrossValidated``; return the test loss."""
        torch.manual_seed(self.number)
        model = self.make()
        parts = {"decay": WeightDecay(model, per=per, start=START), "noise": NoiseWidth(model, start=0.05)}
        parts |= {"smoothing": LabelSmoothing(start=0.05)} if self.has_classes else {}
        hparams, folds = nn.ModuleDict(parts), KFold(3).split(self.x[: self.n])
        settings = {"inner": self.inner, "examples": self.n, "steps": STEPS, "folds": folds}
        found = hoptim.CrossValidated(self.make, hparams, self.train_loss, self.val_loss, **settings).fit(self.train)
        return self.val_loss(found.model, None, test).item()


def rows(name, number, root):
    """The test loss and the processor time of each row."""
    split, found = Split(name, number, root), {}
    everything, test = torch.arange(split.n), torch.arange(split.n, len(split.x))
    for decay in DECAYS:
        begun = time.process_time()
        loss = split.fixed(decay, everything, test)
        found[f"fixed {decay:g}"] = loss, time.process_time() - begun
    begun = time.process_time()
    folds = [tuple(map(torch.tensor, fold)) for fold in KFold(3).split(everything)]
    best = min(DECAYS, key=lambda decay: sum(split.fixed(decay, *fold) for fold in folds))
    found["grid"] = split.fixed(best, everything, test), time.process_time() - begun
    for row, per in (("learned", "tensor"), ("a unit", "channel")):
        begun = time.process_time()
        found[row] = split.learned(test, per), time.process_time() - begun
    return found


def study(name, splits, root):
    everything = torch.arange(SETS[name][1])
    Split(name, 0, root).fixed(START, everything, everything)  # so that no row pays for what torch loads at first
    found = [rows(name, number, root) for number in splits]
    unit = statistics.mean(one[f"fixed {decay:g}"][1] for one in found for decay in DECAYS)
    print(f"{name}, splits {', '.join(map(str, splits))}: test loss, learned minus it (paired), cost in plain trainings")
    for row in found[0]:
        losses, costs = ([one[row][part] for one in found] for part in (0, 1))
        ahead = [one["learned"][0] - one[row][0] for one in found]
        wins = f"{sum(d < 0 for d in ahead)} of {len(ahead)}"
        loss, difference = (f"{mean_and_error(values, '.4f'):>17}" for values in (losses, ahead))
        print(f"  {row:12} {loss}  {difference} {wins:>9}  {statistics.mean(costs) / unit:5.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SETS), metavar="set", help=", ".join(SETS))
    parser.add_argument("--splits", nargs="+", type=int, default=list(range(10, 20)))
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets")
    given = parser.parse_args()
    torch.set_num_threads(1)  # more are slower for so small a net
    for name in given.names:
        study(name, given.splits, given.data)
