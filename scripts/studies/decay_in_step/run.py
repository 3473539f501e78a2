"""Does the optimizer's own decay, learned for each weight in its step, end better than what is free, fixed, or in the loss?

    python scripts/studies/decay_in_step/run.py --data data    # run what runs/decay_in_step lacks, then tables and picture
    python scripts/studies/decay_in_step/run.py --saved        # the tables of the page; nothing runs

Each training is from the same first weights, and fixed and learned ones of a seed see the same batches. The numbers of the
optimizers are those of everyday scripts. Learned decays start at the optimizer's own number, 0.01 for AdamW, or at 0.1, and
take 30 hypersteps in the last three quarters. A fixed training is also read as what is free makes of it: at its best
validation loss (early stopping), at its best temperature on the validation examples, and trained on these as well (joined).
Seeds 0 to 2, 400 and 401 were for choosing; the page has others.
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
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, by_seed
from common.tables import markdown
from tasks import data, models
from tasks.loops import in_epochs, train, with_loss
from tasks.supervised import Supervised

import hoptim
from hoptim.recipes import WeightDecay

DECOUPLED = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
COUPLED = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LEARNED = {  # where, per, start
    "in the loss, one a weight": ("loss", "weight", 1e-3),
    "in the step, one a tensor": ("step", "tensor", None),
    "in the step, one a weight": ("step", "weight", None),
    "in the step, one a weight, from a better start": ("step", "weight", "better"),
}
HYPERSTEPS, WARMUP = 30, 0.25


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A data set, a model and its optimizer.

    Attributes:
        title: its name in the tables.
        task: reads and splits it, from the folder of the data and with a generator.
        steps: of the training, whose learning rate falls linearly to zero.
        better: a start of learned decays that is less low than the optimizer's own.
        fixed: the fixed decays.
        size: of a batch.
    """

    title: str
    task: Callable[[Path, torch.Generator], Supervised]
    steps: int = 2000
    better: float = 0.1
    fixed: Sequence[float] = DECOUPLED
    size: int = 50


def adamw(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def mlp() -> nn.Module:
    return models.mlp((784,), 10, [256, 256])


def cnn() -> nn.Module:
    layers = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
    return models.convolutions(*layers, features=400, normed=True, pooled=True)


def garments(
    count: int, validation: int, root: Path, generator: torch.Generator, make: Any = mlp, inner: Any = adamw
) -> Supervised:
    """Fashion-MNIST: examples from its training images, and all of its test images."""
    (x, y), (x_test, y_test) = data.fashion(root), data.fashion(root, train=False)
    train, val = torch.randperm(len(x), generator=generator)[: count + validation].split([count, validation])
    x = torch.cat([x[train], x[val], x_test])[:, None].float().div(255).sub(0.286).div(0.353)
    parts = torch.arange(len(x)).split([count, validation, len(x_test)])
    return Supervised(
        x=x, y=torch.cat([y[train], y[val], y_test]), train=parts[0], val=parts[1], test=parts[2], make=make, inner=inner
    )


def letters(root: Path, generator: torch.Generator) -> Supervised:
    """Rows of 12 letters of Moby-Dick and the letters that follow them. The parts follow each other in the text."""
    text, width, sizes = data.novel(root), 13, (500, 20, 250, 30, 2000)
    begin = int(torch.randint(len(text) - sum(sizes) * width, (), generator=generator))
    rows = text[begin : begin + sum(sizes) * width].view(-1, width)
    train, _, val, _, test = torch.arange(len(rows)).split(list(sizes))
    inner = partial(adamw, lr=0.01)
    return Supervised(x=rows[:, :-1], y=rows[:, 1:], train=train, val=val, test=test, make=models.Reader, inner=inner)


SETTINGS = {
    "1000": Setting(title="1,000 + 500 garments", task=partial(garments, 1000, 500)),
    "2000": Setting(title="2,000 + 1,000 garments", task=partial(garments, 2000, 1000)),
    "5000": Setting(title="5,000 + 1,000 garments", task=partial(garments, 5000, 1000)),
    "20000": Setting(title="20,000 + 2,000 garments", task=partial(garments, 20000, 2000), steps=5000),
    "cnn": Setting(title="2,000 + 1,000, CNN", task=partial(garments, 2000, 1000, make=cnn), steps=1200),
    "lstm": Setting(title="letters, LSTM", task=letters, steps=1000, size=32),
    "sgd": Setting(title="2,000 + 1,000, SGD", task=partial(garments, 2000, 1000, inner=sgd), better=1e-3, fixed=COUPLED),
}


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """All trainings: fixed decays by number, joined ones too, and learned ones by their name in ``LEARNED``."""
    for seed in options.seeds:
        for name in options.settings:
            fixed = [f"{how} {decay:g}" for how in ("fixed", "joined") for decay in SETTINGS[name].fixed]
            yield from ({"setting": name, "seed": seed, "how": how} for how in [*fixed, *LEARNED])


def run(root: Path, setting: str, seed: int, how: str) -> Iterator[dict[str, Any]]:
    """Train and test: test losses and error, the geometric mean of the last decays, what was said, and processor time."""
    one = SETTINGS[setting]
    task = one.task(root, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    model = task.make()
    hparams, stopping = hoptim.HyperParameters({}), Stopping(task, model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        inner = task.inner(model)
        if how in LEARNED:
            hparams, optimizer = learning(one, task, model, inner, how)
        else:
            optimizer = fixed(task, model, inner, float(how.split()[1]))
        examples = torch.cat([task.train, task.val]) if how.startswith("joined") else task.train
        torch.manual_seed(seed)
        begun = time.process_time()
        after = stopping.look if how.startswith("fixed") else None
        train(model, optimizer, in_epochs(examples, one.size, one.steps), falling=one.steps, after=after)
        seconds = time.process_time() - begun - stopping.seconds
    z_val, z, y = outputs(task, model, task.val), outputs(task, model, task.test), task.y[task.test].flatten()
    temperature = 1.0 if how.startswith("joined") else best_temperature(z_val, task.y[task.val].flatten())
    losses = {"test": F.cross_entropy(z, y), "tempered": F.cross_entropy(z / temperature, y)}
    figures = {name: float(loss) for name, loss in losses.items()} | {"stopped": stopping.test, "seconds": seconds}
    error = float((z.argmax(-1) != y).float().mean())
    decay = [leaf.detach().flatten() for leaf in hparams.parameters()]
    words = " | ".join(dict.fromkeys(str(one.message).splitlines()[0][:120] for one in said))
    yield {**figures, "error": error, "decay": float(torch.cat(decay).mean().exp()) if decay else None, "said": words}


def fixed(task: Supervised, model: nn.Module, inner: torch.optim.Optimizer, decay: float) -> Any:
    """The optimizer with a decay of its matrices, as a script with parameter groups has it."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    options = {key: value for key, value in inner.param_groups[0].items() if key not in ("params", "decoupled_weight_decay")}
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    made = type(inner)([options | group for group in groups], lr=options["lr"])
    return with_loss(made, lambda batch: task.fit(model(task.x[batch]), batch))


def learning(one: Setting, task: Supervised, model: nn.Module, inner: torch.optim.Optimizer, how: str) -> tuple[Any, Any]:
    """The decays that are learned, and the wrapped optimizer."""
    where, per, start = LEARNED[how]
    hparams = WeightDecay(model, per=per, start=one.better if start == "better" else start)
    in_loss = where == "loss"
    for group in inner.param_groups if in_loss else ():
        group["weight_decay"] = 0.0

    def train_loss(model: Any, hparams: Any, batch: Tensor) -> Tensor:
        loss = task.fit(model(task.x[batch]), batch)
        return loss + hparams.penalty(model) if in_loss else loss

    problem = hoptim.Problem(model, hparams, train_loss, task.val_loss)
    warmup = int(WARMUP * one.steps)
    optimizer = hoptim.BilevelOptimizer(
        inner, hparams.optimizer(), problem, val_batches=[task.val], warmup=warmup,
        every=(one.steps - warmup) // HYPERSTEPS, options=None if in_loss else {"weight_decay": hparams},
    )  # fmt: skip
    return hparams, optimizer


@torch.no_grad()
def outputs(task: Supervised, model: nn.Module, part: Tensor) -> Tensor:
    """The logits, in evaluation mode."""
    model.eval()
    return torch.cat([model(task.x[batch]) for batch in part.split(1000)])


class Stopping:
    """The test loss where the validation loss was lowest, at a look every 50 steps, and the time that looks took."""

    def __init__(self, task: Supervised, model: nn.Module) -> None:
        self.task, self.model, self.lowest, self.seconds = task, model, float("inf"), 0.0
        self.test: float | None = None

    def look(self, step: int) -> None:
        if step % 50:
            return
        begun = time.process_time()
        val = self._loss(self.task.val)
        if val < self.lowest:
            self.lowest, self.test = val, self._loss(self.task.test)
        self.seconds += time.process_time() - begun

    def _loss(self, part: Tensor) -> float:
        return float(F.cross_entropy(outputs(self.task, self.model, part), self.task.y[part].flatten()))


def best_temperature(z: Tensor, y: Tensor) -> float:
    """The temperature of logits with the lowest cross-entropy."""
    found = torch.logspace(-1, 1.5, 251)
    return float(found[torch.stack([F.cross_entropy(z / t, y) for t in found]).argmin()])


def best_of(rows: Sequence[Row], name: str, how: str, figure: str = "test") -> dict[int, float]:
    """The figure of the fixed decay whose mean test loss over the seeds is lowest, for each seed."""
    ways = [f"{how} {decay:g}" for decay in SETTINGS[name].fixed]
    best = min(ways, key=lambda way: mean(by_seed(rows, "test", setting=name, how=way).values()))
    return by_seed(rows, figure, setting=name, how=best)


def columns_of(rows: Sequence[Row], name: str) -> dict[str, tuple[dict[int, float], dict[int, float], str]]:
    """The test losses, errors and processor time of all that is compared, by its name."""
    plain = f"fixed {SETTINGS[name].fixed[0]:g}"
    figures = partial(by_seed, rows, setting=name)
    cost = mean(figures("seconds", how=plain).values())
    errors = figures("error", how=plain)
    found = {
        "the script's own": (figures("test", how=plain), errors, "1"),
        "the script's own, stopped early": (figures("stopped", how=plain), {}, "1"),
        "the script's own, best temperature": (figures("tempered", how=plain), errors, "1"),
        "best fixed of six": (best_of(rows, name, "fixed"), best_of(rows, name, "fixed", "error"), "6"),
        "best fixed, best temperature": (
            best_of(rows, name, "fixed", "tempered"),
            best_of(rows, name, "fixed", "error"),
            "6",
        ),
        "best fixed, trained on validation too": (
            best_of(rows, name, "joined"),
            best_of(rows, name, "joined", "error"),
            "6",
        ),
    }
    for way in LEARNED:
        seconds = mean(figures("seconds", how=way).values()) / cost
        found[way] = (figures("test", how=way), figures("error", how=way), f"{seconds:.1f}")
    return found


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Tables of the test loss, of its paired change against the best fixed decay, of the test error, and of the cost."""
    names = list(dict.fromkeys(row["setting"] for row in rows))
    titles, columns = [SETTINGS[name].title for name in names], [columns_of(rows, name) for name in names]
    best = [best_of(rows, name, "fixed") for name in names]
    tables: dict[str, Callable[[str, int], str]] = {
        "test loss": lambda way, n: mean_and_error(list(columns[n][way][0].values())),
        "test loss against the best of six fixed decays, %": lambda way, n: mean_and_error(
            [100 * (loss / best[n][seed] - 1) for seed, loss in columns[n][way][0].items()], "+.1f"
        ),
        "test error, %": lambda way, n: mean_and_error([100 * error for error in columns[n][way][1].values()], ".1f"),
        "plain trainings": lambda way, n: columns[n][way][2],
    }
    for title, cell in tables.items():
        lines = [[way, *(cell(way, n) for n in range(len(names)))] for way in columns[0]]
        yield markdown([title, *titles], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The change of the test loss against the best fixed decay, seed by seed: a panel for each setting."""
    from common.pictures import plt, save

    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = plt.subplots(
        1, len(names), figsize=(2.6 * len(names), 4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, name in zip(axes[0], names, strict=True):
        best, columns = best_of(rows, name, "fixed"), columns_of(rows, name)
        shown = [way for way in columns if way not in ("the script's own", "best fixed of six")]
        for place, way in enumerate(shown):
            change = [100 * (loss / best[seed] - 1) for seed, loss in columns[way][0].items()]
            color = "C0" if way in LEARNED else "grey"
            axis.plot(change, [place] * len(change), "o", color=color, alpha=0.5, markersize=4)
            axis.plot([mean(change)], [place], "|", color=color, markersize=18)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=SETTINGS[name].title, yticks=range(len(shown)), yticklabels=shown)
        axis.title.set_fontsize(8)
        axis.grid(alpha=0.2, axis="x")
    axes[0][0].invert_yaxis()
    figure.supxlabel("test loss against the best of six fixed decays, %")
    save(figure, folder / "decay_in_step.png")


if __name__ == "__main__":
    Study(
        file=__file__, seeds=range(700, 710), jobs=jobs, run=run, show=show, draw=draw,
        more={"settings": {"nargs": "+", "choices": list(SETTINGS), "default": list(SETTINGS), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
