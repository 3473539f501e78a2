"""What does learning bring in one ordinary training? Decays on four data sets, from a start 30 times too low and too high.

    python scripts/studies/one_training/run.py --data ~/data    # run what runs/one_training lacks, then tables and picture
    python scripts/studies/one_training/run.py --saved          # the tables of the page; nothing runs

A training learns its decays with ``hparams.optimizer()`` in some 14 hypersteps, or with Adam at 0.05 on each decay by itself
in four times as many. Beside it are trainings with a fixed decay, also on the validation examples. The first weights and the
order of the batches are the same on one seed. The value called good, of which the starts are a thirtieth and thirty times,
was chosen on seeds 0 and 1, the number of hypersteps on housing, seeds 310 to 317.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, by_seed
from common.tables import markdown
from tasks import data, models
from tasks.loops import shuffled, train, with_loss
from tasks.supervised import Supervised, sgd

import hoptim
from hoptim.recipes import WeightDecay

FIXED = (1e-3, 3e-3, 1e-2, 3e-2)
STARTS = {"low": 1 / 30, "high": 30.0}
PERS = {"global": "one for all", "channel": "one a unit", "weight": "one a weight"}
OUTER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam 0.05": lambda hparams: torch.optim.Adam(hparams.parameters(), lr=0.05),
    "optimizer()": lambda hparams: hparams.optimizer(),
}
SPACING = {
    "Adam 0.05": 1,
    "optimizer()": 4,
}  # times as many steps between hypersteps: a level's are long, and weights follow late
WARMUP = 0.25


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set, and how long its model is trained; its learning rate falls linearly to zero.

    Attributes:
        title: its name in the tables.
        task: reads and splits it, from the folder of the data and with a generator.
        good: the best fixed decay, roughly.
        steps: of the training.
        every: inner steps between hypersteps of Adam at 0.05.
        size: of a batch.
    """

    title: str
    task: Callable[[Path, torch.Generator], Supervised]
    good: float
    steps: int
    every: int
    size: int = 50


def split(order: Tensor, *sizes: int) -> dict[str, Tensor]:
    return dict(zip(("train", "val", "test"), order[: sum(sizes)].split(list(sizes)), strict=True))


def garments(count: int, make: Callable[[], nn.Module], root: Path, generator: torch.Generator) -> Supervised:
    """Fashion-MNIST, 14×14 pixels."""
    x, y = data.small_fashion(root)
    parts = split(torch.randperm(len(x), generator=generator), count, 500, 4000)
    return Supervised(x=x, y=y, **parts, make=make, inner=sgd)


def letters(root: Path, generator: torch.Generator) -> Supervised:
    """Rows of 12 letters of Moby-Dick and the letters that follow them. The parts follow each other in the text."""
    text, width, sizes = data.novel(root), 13, (500, 20, 250, 30, 2000)
    begin = int(torch.randint(len(text) - sum(sizes) * width, (), generator=generator))
    rows = text[begin : begin + sum(sizes) * width].view(-1, width)
    train, _, val, _, test = torch.arange(len(rows)).split(list(sizes))
    inner = lambda model: torch.optim.Adam(model.parameters(), lr=0.01)  # noqa: E731
    return Supervised(x=rows[:, :-1], y=rows[:, 1:], train=train, val=val, test=test, make=models.Reader, inner=inner)


def housing(root: Path, generator: torch.Generator) -> Supervised:
    """Boston housing."""
    x, y = data.table("boston", root)
    parts = split(torch.randperm(len(x), generator=generator), 200, 100, len(x) - 300)
    x, y = (data.standardised(part, parts["train"]) for part in (x.float(), y.float()[:, None]))
    return Supervised(x=x, y=y, **parts, make=partial(models.mlp, (13,), 1, [64]), inner=partial(sgd, lr=0.03))


def cnn() -> nn.Module:
    return models.convolutions(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3), features=64, pooled=True)


SETS = {
    "mlp": DataSet(
        title="Fashion-MNIST, MLP", task=partial(garments, 1000, partial(models.mlp, (196,), 10, [64])),
        good=3e-3, steps=1500, every=20,
    ),
    "cnn": DataSet(title="Fashion-MNIST, CNN", task=partial(garments, 500, cnn), good=1e-2, steps=600, every=9),
    "lstm": DataSet(title="letters of Moby-Dick, LSTM", task=letters, good=1e-3, steps=1000, every=14, size=32),
    "table": DataSet(title="Boston housing, MLP", task=housing, good=1e-2, steps=1500, every=20),
}  # fmt: skip


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """All trainings: ``how`` is "fixed", "joined" (fixed, on the validation examples too), or the outer optimizer."""
    for seed in options.seeds:
        for name in options.sets:
            fixed = [(how, value, "global") for how in ("fixed", "joined") for value in FIXED]
            starts = [SETS[name].good * factor for factor in STARTS.values()]
            learned = [(how, start, per) for start in starts for per in PERS for how in OUTER]
            yield from ({"set": name, "seed": seed, "how": h, "start": s, "per": p} for h, s, p in fixed + learned)


def run(root: Path, set: str, seed: int, how: str, start: float, per: str) -> Iterator[dict[str, Any]]:
    """Train and test: the losses, the geometric mean of the last decays, what was said, and processor time."""
    one = SETS[set]
    task = one.task(root, torch.Generator().manual_seed(1000 + seed))
    torch.manual_seed(seed)
    model = task.make()
    hparams: Any = WeightDecay(model, per=per, start=start)
    loss = hoptim.CompositeLoss(task.predict, task.criterion, lambda model, hparams: hparams.penalty(model))
    begun = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if how in OUTER:
            problem = hoptim.Problem(model, hparams, loss, task.val_loss)
            learning = {"val_batches": [task.val], "every": one.every * SPACING[how], "warmup": int(WARMUP * one.steps)}
            optimizer = hoptim.BilevelOptimizer(task.inner(model), OUTER[how](hparams), problem, **learning)
        else:
            hparams.requires_grad_(False)
            optimizer = with_loss(task.inner(model), lambda batch: loss(model, hparams, batch))
        examples = torch.cat([task.train, task.val]) if how == "joined" else task.train
        train(model, optimizer, shuffled(examples, one.size, one.steps), falling=one.steps)
    with torch.no_grad():
        losses = {name: float(task.val_loss(model, None, part)) for name, part in (("test", task.test), ("val", task.val))}
    decay = float(torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()]).mean().exp())
    words = " | ".join(dict.fromkeys(str(one.message).splitlines()[0][:120] for one in said))
    yield {**losses, "decay": decay, "said": words, "seconds": time.process_time() - begun}


def against_best(rows: Sequence[Row], name: str, how: str, per: str, words: str) -> list[float]:
    """For each seed, by how many per cent the test loss is above that of the best fixed value, from a low or high start."""
    best, good = by_seed(rows, "test", set=name, how="fixed"), SETS[name].good
    own = by_seed([row for row in rows if (row["start"] < good) == (words == "low")], "test", set=name, how=how, per=per)
    return [100 * (own[seed] / best[seed] - 1) for seed in own]


def show(rows: Sequence[Row]) -> Iterator[str]:
    """The test losses of the fixed values, and the change of those that learn against the best of them."""
    names, lines = list(dict.fromkeys(row["set"] for row in rows)), []
    for name in names:
        each = [mean(by_seed(rows, "test", set=name, how="fixed", start=value).values()) for value in FIXED]
        best = [mean(by_seed(rows, "test", set=name, how=how).values()) for how in ("fixed", "joined")]
        lines.append([SETS[name].title, *(f"{value:.3f}" for value in [*each, *best])])
    yield markdown(["fixed decay", *map(str, FIXED), "best", "best, on validation too"], lines)
    for words in STARTS:
        lines = [
            [
                SETS[name].title,
                *(mean_and_error(against_best(rows, name, how, per, words), "+.1f") for per in PERS for how in OUTER),
            ]
            for name in names
        ]
        yield markdown([f"start 30 times too {words}", *(f"{one}: {how}" for one in PERS.values() for how in OUTER)], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The test loss against the start, for fixed decays and for those that learn; one panel for each data set."""
    from common.pictures import plt, save

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [mean(by_seed(rows, "test", set=name, how="fixed", start=value).values()) for value in FIXED]
        axis.plot(FIXED, points, "o-", color="grey", label="fixed")
        lowest, good = mean(by_seed(rows, "test", set=name, how="fixed").values()), SETS[name].good
        for how, style in zip(OUTER, ("^:", "s-"), strict=True):
            for number, (per, label) in enumerate(PERS.items()):
                ends = [lowest * (1 + mean(against_best(rows, name, how, per, words)) / 100) for words in STARTS]
                starts = [good * factor for factor in STARTS.values()]
                axis.plot(starts, ends, style, color=f"C{number}", label=f"{label}, {how}")
        axis.set(xscale="log", title=SETS[name].title, xlabel="decay at the start", ylim=(0.85 * lowest, 2 * lowest))
        axis.grid(alpha=0.2)
    axes[0][0].set(ylabel="test loss")
    axes[0][-1].legend(frameon=False, fontsize=7)
    save(figure, folder / "one_training.png")


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(300, 301, 302), jobs=jobs, run=run, show=show, draw=draw,
        more={"sets": {"nargs": "+", "choices": list(SETS), "default": list(SETS), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
