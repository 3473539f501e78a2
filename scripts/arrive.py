"""What does learning bring in one ordinary training? Decays on four data sets, from a start 30 times too low and too high.

    python scripts/arrive.py --data ~/data                  # run what runs/arrive lacks, then the tables and the picture
    python scripts/arrive.py --saved                        # the tables of scripts/arrive.json; nothing runs
    python scripts/arrive.py --save                         # run all, write that file and scripts/arrive.png

A training learns its decays with ``hparams.optimizer()`` in some 14 hypersteps, or with Adam at 0.05 on each decay by itself
in four times as many. Beside it are trainings with a fixed decay, also on the validation examples. The first weights and the
order of the batches are the same on one seed. The value called good, of which the starts are a thirtieth and thirty times,
was chosen on seeds 0 and 1, the number of hypersteps on housing, seeds 310 to 317.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common.batches import shuffled
from common.means import mean_and_error
from common.records import five_digits, read_records, write_records, write_whole
from common.tables import table, wide_console
from learning_tasks import data
from learning_tasks.tasks import Reader, adam, mlp, sgd
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import hoptim
from hoptim.recipes import WeightDecay

HERE = Path(__file__).parent
FIXED = (1e-3, 3e-3, 1e-2, 3e-2)
STARTS = {"low": 1 / 30, "high": 30.0}
PERS = {"global": "one for all", "channel": "one a unit", "weight": "one a weight"}
ALONE, LEVELS = "Adam 0.05", "optimizer()"
OUTER: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    ALONE: lambda hparams: torch.optim.Adam(hparams.parameters(), lr=0.05),
    LEVELS: lambda hparams: hparams.optimizer(),
}
SPACING = {ALONE: 1, LEVELS: 4}  # times as many steps between hypersteps: a level's are long, and weights follow late
WARMUP = 0.25


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A data set, and how its model is trained; its learning rate falls linearly to zero.

    Attributes:
        title: its name in the tables.
        read: reads x and y and splits them, from the folder of the data and with a generator.
        make: makes a model.
        criterion: of the model's output and y.
        inner: makes the optimizer of a model.
        good: the best fixed decay, roughly.
        steps: of the training.
        every: inner steps between hypersteps of Adam at 0.05.
        size: of a batch.
    """

    title: str
    read: Callable[[Path, torch.Generator], tuple[Tensor, Tensor, Sequence[Tensor]]]
    make: Callable[[], nn.Module]
    criterion: Callable[[Tensor, Tensor], Tensor]
    inner: Callable[[nn.Module], torch.optim.Optimizer]
    good: float
    steps: int
    every: int
    size: int = 50


def garments(sizes: Sequence[int], root: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Fashion-MNIST, 14×14 pixels."""
    x, y = data.fashion(root)
    return x, y, torch.randperm(len(x), generator=generator)[: sum(sizes)].split(list(sizes))


def letters(root: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Rows of 12 letters of Moby-Dick and the letters that follow them. The parts follow each other in the text."""
    text, width, sizes = data.novel(root), 13, (500, 20, 250, 30, 2000)
    begin = int(torch.randint(len(text) - sum(sizes) * width, (), generator=generator))
    rows = text[begin : begin + sum(sizes) * width].view(-1, width)
    train, _, val, _, test = torch.arange(len(rows)).split(list(sizes))
    return rows[:, :-1], rows[:, 1:], (train, val, test)


def housing(root: Path, generator: torch.Generator) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Boston housing."""
    x, y = data.boston(root)
    parts = torch.randperm(len(x), generator=generator).split([200, 100, len(x) - 300])
    return data.standardised(x, parts[0]), data.standardised(y, parts[0]), parts


def cnn() -> nn.Module:
    first = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*first, nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))


def entropy_of_letters(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y.flatten())


SETS = {
    "mlp": DataSet(
        title="Fashion-MNIST, MLP", read=partial(garments, (1000, 500, 4000)), make=partial(mlp, 196, 64, 10),
        criterion=F.cross_entropy, inner=sgd, good=3e-3, steps=1500, every=20,
    ),
    "cnn": DataSet(
        title="Fashion-MNIST, CNN", read=partial(garments, (500, 500, 4000)), make=cnn,
        criterion=F.cross_entropy, inner=sgd, good=1e-2, steps=600, every=9,
    ),
    "lstm": DataSet(
        title="letters of Moby-Dick, LSTM", read=letters, make=Reader,
        criterion=entropy_of_letters, inner=adam, good=1e-3, steps=1000, every=14, size=32,
    ),
    "table": DataSet(
        title="Boston housing, MLP", read=housing, make=partial(mlp, 13, 64, 1),
        criterion=F.mse_loss, inner=partial(sgd, lr=0.03), good=1e-2, steps=1500, every=20,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training.

    Attributes:
        set: the data set's name.
        seed: of the split, the first weights and the batches.
        how: ``"fixed"``, ``"joined"`` (fixed, trained on the validation examples too), or the outer optimizer.
        start: the decay at the start.
        per: what has a decay of its own.
    """

    set: str
    seed: int
    how: str
    start: float
    per: str = "global"


def jobs(name: str, seed: int) -> list[Job]:
    """All trainings on one data set and seed."""
    good = SETS[name].good
    fixed = [Job(set=name, seed=seed, how=how, start=value) for how in ("fixed", "joined") for value in FIXED]
    starts = [good * factor for factor in STARTS.values()]
    return fixed + [
        Job(set=name, seed=seed, how=how, start=start, per=per) for start in starts for per in PERS for how in OUTER
    ]


def run(job: Job, root: Path) -> dict[str, Any]:
    """Train and test: the job, its losses, the geometric mean of the last decays, what was said, and processor time."""
    one = SETS[job.set]
    x, y, (train, val, test) = one.read(root, torch.Generator().manual_seed(1000 + job.seed))
    torch.manual_seed(job.seed)
    model = one.make()
    hparams = WeightDecay(model, per=job.per, start=job.start)

    def plain(model: Any, _: Any, batch: Tensor) -> Tensor:
        return one.criterion(model(x[batch]), y[batch])

    loss = hoptim.CompositeLoss(
        lambda model, _, batch: model(x[batch]),
        lambda z, _, batch: one.criterion(z, y[batch]),
        lambda model, hparams: hparams.penalty(model),
    )
    learns = job.how in OUTER
    begun = time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = hoptim.BilevelOptimizer(
            one.inner(model), OUTER[job.how if learns else ALONE](hparams), hoptim.Problem(model, hparams, loss, plain),
            val_batches=[val], every=one.every * SPACING[job.how] if learns else None, warmup=int(WARMUP * one.steps),
        )  # fmt: skip
        _loop(one, optimizer, torch.cat([train, val]) if job.how == "joined" else train)
    with torch.no_grad():
        losses = {name: float(plain(model, None, part)) for name, part in (("test", test), ("val", val))}
    decay = float(torch.cat([leaf.detach().flatten() for leaf in hparams.parameters()]).mean().exp())
    words = " | ".join(dict.fromkeys(str(one.message).splitlines()[0][:120] for one in said))
    return {**asdict(job), **losses, "decay": decay, "said": words, "seconds": time.process_time() - begun}


def _loop(one: DataSet, optimizer: Any, examples: Tensor) -> None:
    first = [group["lr"] for group in optimizer.param_groups]
    for step, batch in enumerate(shuffled(examples, one.size, one.steps)):
        for group, lr in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = lr * (1 - step / one.steps)
        optimizer.zero_grad()
        optimizer.loss(batch).backward()
        optimizer.step()


def studied(names: Sequence[str], seeds: Sequence[int], path: Path, root: Path) -> list[dict[str, Any]]:
    """Run what the file lacks, and return all of its rows. It is written after each seed of a data set."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    done = {Job(**{key: row[key] for key in Job.__dataclass_fields__}) for row in rows}
    for seed in seeds:
        for name in names:
            rows += [run(job, root) for job in jobs(name, seed) if job not in done]
            write_whole(path, json.dumps(rows))
            print(f"{name}, seed {seed}", flush=True)
    return rows


def losses(rows: Iterable[dict[str, Any]], **where: Any) -> dict[int, float]:
    """The lowest test loss of the rows that have these values, for each seed."""
    found: dict[int, float] = {}
    for row in rows:
        if all(_same(row[key], value) for key, value in where.items()):
            found[row["seed"]] = min(found.get(row["seed"], float("inf")), row["test"])
    return found


def _same(found: Any, value: Any) -> bool:
    """Whether they are equal, numbers to the five digits of the saved rows."""
    return found == value if isinstance(value, str) else math.isclose(found, value, rel_tol=1e-4)


def against_best(rows: Sequence[dict[str, Any]], name: str, **where: Any) -> list[float]:
    """For each seed, by how many per cent the test loss is above that of the best fixed value."""
    best, own = losses(rows, set=name, how="fixed"), losses(rows, set=name, **where)
    return [100 * (own[seed] / best[seed] - 1) for seed in own]


def report(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the test losses of the fixed values, and the change of those that learn against the best of them."""
    names = list(dict.fromkeys(row["set"] for row in rows))
    fixed = table("Test loss with a fixed decay", "", *(f"{value:g}" for value in FIXED), "best", "best, on validation too")
    for name in names:
        each = [mean(losses(rows, set=name, how="fixed", start=value).values()) for value in FIXED]
        best = [mean(losses(rows, set=name, how=how).values()) for how in ("fixed", "joined")]
        fixed.add_row(SETS[name].title, *(f"{value:.3f}" for value in [*each, *best]))
    console.print(fixed)
    for words, factor in STARTS.items():
        heads = [f"{label}: {how}" for label in PERS.values() for how in OUTER]
        learned = table(f"Start 30 times too {words}: test loss against the best fixed value, %", "", *heads)
        for name in names:
            start = SETS[name].good * factor
            places = [{"per": per, "how": how, "start": start} for per in PERS for how in OUTER]
            learned.add_row(SETS[name].title, *(mean_and_error(against_best(rows, name, **p), "+.1f") for p in places))
        console.print(learned)
    silent = [row for row in rows if row["how"] in OUTER and row["start"] > max(FIXED) and not row["said"]]
    stuck = [row for row in silent if row["test"] > 1.5 * losses(rows, set=row["set"], how="fixed")[row["seed"]]]
    console.print(f"Trainings from too high that end 50 % above the best fixed value and said nothing: {len(stuck)}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The test loss against the start, for fixed decays and for those that learn; one panel for each data set."""
    from common.pictures import plt, save

    names = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [mean(losses(rows, set=name, how="fixed", start=value).values()) for value in FIXED]
        axis.plot(FIXED, points, "o-", color="grey", label="fixed")
        for number, (how, style) in enumerate((how, style) for how, style in zip(OUTER, (":", "-"), strict=True)):
            for per, label in PERS.items():
                starts = [SETS[name].good * factor for factor in STARTS.values()]
                ends = [mean(losses(rows, set=name, how=how, per=per, start=start).values()) for start in starts]
                color = f"C{list(PERS).index(per)}"
                axis.plot(starts, ends, style, marker="^s"[number], color=color, label=f"{label}, {how}")
        lowest = mean(losses(rows, set=name, how="fixed").values())
        axis.set(xscale="log", title=SETS[name].title, xlabel="decay at the start", ylim=(0.85 * lowest, 2 * lowest))
        axis.grid(alpha=0.2)
    axes[0][0].set(ylabel="test loss")
    axes[0][-1].legend(frameon=False, fontsize=7)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
    parser.add_argument("--out", type=Path, default=Path("runs/arrive"), help="the folder of the rows; default: runs/arrive")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[300, 301, 302])
    parser.add_argument("--saved", action="store_true", help="run nothing: print the tables of scripts/arrive.json")
    parser.add_argument("--save", action="store_true", help="write scripts/arrive.json and scripts/arrive.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.saved:
        report(read_records(HERE / "arrive.json"), wide_console())
        return
    options.out.mkdir(parents=True, exist_ok=True)
    rows = studied(options.sets, options.seeds, options.out / "rows.json", options.data)
    report(rows, wide_console())
    draw(rows, options.out / "arrive.png")
    if options.save:
        write_records(HERE / "arrive.json", five_digits(rows), torch=torch.__version__)
        draw(rows, HERE / "arrive.png")


if __name__ == "__main__":
    main()
