"""What CrossValidated is good for: its test loss and cost beside fixed decays and a decay chosen on the same three folds.

    python scripts/studies/cross_validation/run.py [--sets digits diabetes wine boston fashion] [--seeds 10 11 12 ...]

Each split has 200 examples of digits to learn from (diabetes 220, wine 120, Boston housing 300, Fashion-MNIST 1,000). The
others are the test set, except that Fashion-MNIST has 5,000. An MLP with 64 hidden units, or a CNN of two layers for
Fashion-MNIST, is trained for 1,500 steps of SGD with momentum on batches of 50. The rows:

- fixed D: trained on all examples with a decay of D;
- grid: the best of five fixed decays by its mean loss on the three folds, then trained on all examples;
- learned: CrossValidated with a decay for each layer, noise before each layer, and label smoothing where there are classes;
- a unit: the same with a decay for each unit.

Costs are in plain trainings, by processor time. torchvision downloads Fashion-MNIST; Boston housing is the file
boston/boston.csv.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from sklearn.model_selection import KFold
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, by_seed, differences
from common.tables import markdown
from tasks import data, models
from tasks.loops import in_epochs, train, with_loss
from tasks.supervised import Supervised, sgd

import hoptim
from hoptim.recipes import LabelSmoothing, NoiseWidth, WeightDecay

SETS = {"digits": 200, "diabetes": 220, "wine": 120, "boston": 300, "fashion": 1000}  # examples to learn from
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
WAYS = (*(f"fixed {decay:g}" for decay in DECAYS), "grid", "learned", "a unit")
STEPS, BATCH, START = 1500, 50, 1e-2


def cnn() -> nn.Module:
    layers = nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.Conv2d(8, 16, 3, stride=2, padding=1)
    return models.convolutions(*layers, features=784)


def task_of(name: str, number: int, root: Path) -> Supervised:
    """A data set, split into the first n examples to learn from and the test set."""
    n, is_image = SETS[name], name == "fashion"
    x, y = data.fashion(root) if is_image else data.table(name, root)
    x, y = (x[:6000, None] / 255, y[:6000]) if is_image else (x, y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(number))
    x, y = x.float()[order], y[order]
    if name == "digits":
        x = x / 16
    elif not is_image:
        x = (x - x[:n].mean(0)) / x[:n].std(0)
    if y.is_floating_point():
        own = y[:n].double()
        y = ((y - own.mean()) / own.std()).float()[:, None]
    outputs = 1 if y.is_floating_point() else int(y.max()) + 1
    make: Any = cnn if is_image else lambda: nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, outputs))
    inner = partial(sgd, lr=0.01 if y.is_floating_point() or is_image else 0.1)
    nobody, everything = torch.arange(0), torch.arange(len(x))
    return Supervised(x=x, y=y, train=everything[:n], val=nobody, test=everything[n:], make=make, inner=inner)


def fixed(task: Supervised, seed: int, decay: float, examples: Tensor, held_out: Tensor) -> float:
    """Train with this decay and without hoptim's optimizer; return the loss on ``held_out``."""
    torch.manual_seed(seed)
    model = task.make()
    own = WeightDecay(model, start=decay).requires_grad_(False)
    loss = lambda batch: task.fit(model(task.x[batch]), batch) + own.penalty(model)  # noqa: E731
    train(model, with_loss(task.inner(model), loss), in_epochs(examples, BATCH, STEPS))
    return task.val_loss(model, None, held_out).item()


def grid(task: Supervised, seed: int) -> float:
    folds = [tuple(map(torch.tensor, fold)) for fold in KFold(3).split(task.train)]
    best = min(DECAYS, key=lambda decay: sum(fixed(task, seed, decay, *fold) for fold in folds))
    return fixed(task, seed, best, task.train, task.test)


def learned(task: Supervised, seed: int, per: Any) -> float:
    """Learn by ``CrossValidated``; return the test loss."""
    torch.manual_seed(seed)
    model = task.make()
    parts = {"decay": WeightDecay(model, per=per, start=START), "noise": NoiseWidth(model, start=0.05)}
    hparams = nn.ModuleDict(parts | ({"smoothing": LabelSmoothing(start=0.05)} if task.has_classes else {}))
    whole = task.train_loss
    loss = lambda model, hparams, batch: whole(model, hparams, batch)  # noqa: E731 (its parts are not shown)
    settings = {"inner": task.inner, "examples": len(task.train), "steps": STEPS, "folds": KFold(3).split(task.train)}
    found = hoptim.CrossValidated(task.make, hparams, loss, task.val_loss, **settings).fit(
        lambda model, optimizer, examples: train(model, optimizer, in_epochs(examples, BATCH, STEPS))
    )
    return task.val_loss(found.model, None, task.test).item()


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    yield from ({"set": s, "seed": n, "way": way} for s in options.sets for n in options.seeds for way in WAYS)


def run(root: Path, set: str, seed: int, way: str) -> Iterator[dict[str, float]]:
    """The test loss and the processor time of one way."""
    task, begun = task_of(set, seed, root), time.process_time()
    if way.startswith("fixed"):
        test = fixed(task, seed, float(way.split()[1]), task.train, task.test)
    else:
        test = grid(task, seed) if way == "grid" else learned(task, seed, {"learned": "tensor", "a unit": "channel"}[way])
    yield {"test": test, "seconds": time.process_time() - begun}


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Test loss, learned minus it (paired) and cost of each way, a table for each data set."""
    for name in dict.fromkeys(row["set"] for row in rows):
        lines, own = [], by_seed(rows, "test", set=name, way="learned")
        unit = mean(row["seconds"] for row in rows if row["set"] == name and row["way"].startswith("fixed"))
        for way in WAYS:
            losses, ahead = (
                by_seed(rows, "test", set=name, way=way),
                differences(own, by_seed(rows, "test", set=name, way=way)),
            )
            wins, seconds = f"{sum(d < 0 for d in ahead)} of {len(ahead)}", by_seed(rows, "seconds", set=name, way=way)
            cost = f"{mean(seconds.values()) / unit:.1f}" if seconds else ""
            lines.append([way, *(mean_and_error(list(each), ".3f") for each in (losses.values(), ahead)), wins, cost])
        yield markdown([name, "test loss", "learned minus it", "wins", "cost"], lines)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=range(10, 20), jobs=jobs, run=run, show=show,
        more={"sets": {"nargs": "+", "choices": list(SETS), "default": list(SETS), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
