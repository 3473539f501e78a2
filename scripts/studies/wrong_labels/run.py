"""Nine ways to train on wrong labels: half of 5,000 images have a wrong label, and 1,000 more have right ones.

    python scripts/studies/wrong_labels/run.py [--models linear mlp cnn] [--noises class-dependent symmetric] [--seeds 2 3]
    python scripts/studies/wrong_labels/run.py --tune 0 1     # choose the settings again
    python scripts/studies/wrong_labels/run.py --saved        # the tables of the page; nothing runs

The images are from Fashion-MNIST. A wrong label is any other class (symmetric) or the next class (class-dependent). The
ways:

- all: cross-entropy on the 5,000; all, stopped: the same, with the weights of the step that has the lowest loss on the
  1,000;
- clean: on the 1,000 alone; all + clean: on all 6,000;
- GCE: the loss (1 − p^q)/q of Zhang and Sabuncu 2018 (arXiv 1805.07836) instead of cross-entropy, on all 6,000;
- filter: a model trained on the 1,000 removes those of the 5,000 whose label it finds unlikely; then train on the rest;
- hoptim, the run: on the 5,000, while a weight for each of them is learned with the 1,000 as validation data; since they
  start at half their largest weight and count relative to that, the rate is half that of the others, and the decay twice;
- hoptim, retrained: hoptim.retrain on all 6,000 with the learned weights; the 1,000 have the largest weight;
- oracle: on those of the 6,000 that have the right label.

Each training takes the same number of steps. Weight decay, q and the filter's threshold are chosen for each way and metric,
on other seeds and on 10,000 training images that these seeds do not draw, and are in settings.json; scores are on the test
set. Costs are in trainings on all 6,000, by processor time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error, standard_error
from common.study import Row, Study, by_seed, differences
from common.tables import markdown
from tasks import data, models
from tasks.loops import in_epochs, train, with_loss
from tasks.supervised import sgd

import hoptim

NOISY, CLEAN, BATCH, STEPS = 5000, 1000, 100, 800
EVERY, DRAWN, OUTER = 10, 1000, 0.3  # steps between hypersteps, training examples of a hyperstep, and Adam's outer rate
NOISES = ("class-dependent", "symmetric")
METRICS = {"accuracy": max, "cross-entropy": min}
DECAYS = (1e-3, 1e-2, 3e-2, 1e-1)
OWN = {"GCE": (0.5, 0.7, 0.9), "filter": (0.03, 0.1, 0.3, 0.5)}  # q, and the lowest probability of a label that is kept
WAYS = ("all", "all, stopped", "clean", "all + clean", "GCE", "filter", "hoptim, the run", "hoptim, retrained", "oracle")
SETTINGS = Path(__file__).with_name("settings.json")


def cnn() -> nn.Module:
    return models.convolutions(nn.Conv2d(1, 8, 4, stride=3), nn.Conv2d(8, 16, 3, stride=2), features=256)


MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # and the rate of momentum SGD
    "linear": (partial(models.linear, (784,), 10), 0.05),
    "mlp": (partial(models.mlp, (784,), 10, [64]), 0.05),
    "cnn": (cnn, 0.1),
}


class Labels:
    """The images and wrong labels that a seed draws, and the trainings on them."""

    def __init__(self, root: Path, noise: str, model: str, seed: int, tuning: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        sets = (data.fashion(root, train=part) for part in (True, False))
        (x, y), test = (((x[:, None] / 255 - 0.286) / 0.353, y) for x, y in sets)
        order = torch.randperm(len(x), generator=draw)
        own, others = order[: NOISY + CLEAN], order[NOISY + CLEAN :][: len(test[1])]
        self.x, self.y, self.test = x[own], y[own], (x[others], y[others]) if tuning else test
        self.everything = torch.arange(NOISY + CLEAN)
        self.noisy, self.clean = self.everything[:NOISY], self.everything[NOISY:]
        self.wrong = torch.rand(NOISY, generator=draw) < 0.5
        shift = torch.randint(1, 10, (NOISY,), generator=draw) if noise == "symmetric" else 1
        self.y[:NOISY] = (self.y[:NOISY] + self.wrong * shift) % 10
        self.seed, (self.make, self.rate) = seed, MODELS[model]
        self.problem: Any = None  # what was learned, after :meth:`learn`
        self.likely: Any = None  # the probabilities of the noisy labels by a model of the clean ones, after :meth:`judge`

    def inner(self, decay: float, counts: int = 1) -> Callable[[nn.Module], torch.optim.Optimizer]:
        """The optimizer for examples that count up to so many times: the same steps as at ``counts=1`` if they do."""
        return partial(sgd, lr=self.rate / counts, weight_decay=decay * counts)

    def train(self, model: nn.Module, optimizer: Any, examples: Tensor, look: Callable[[int], None] | None = None) -> None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

        def after(step: int) -> None:
            schedule.step()
            if look is not None:
                look(step)

        train(model, optimizer, in_epochs(examples, BATCH, STEPS), after=after)

    def plain(self, decay: float, examples: Tensor, loss: Any = F.cross_entropy, stop: bool = False) -> nn.Module:
        """Train with this loss of logits and labels; with ``stop`` return the best weights of those of each 20th step."""
        torch.manual_seed(self.seed)
        model, lowest, best = self.make(), math.inf, {}
        optimizer = with_loss(self.inner(decay)(model), lambda batch: loss(model(self.x[batch]), self.y[batch]))

        @torch.no_grad()
        def look(step: int) -> None:
            nonlocal lowest, best
            if step % 20 == 0 and (now := self.val_loss(model, None, self.clean).item()) < lowest:
                lowest, best = now, copy.deepcopy(model.state_dict())

        self.train(model, optimizer, examples, look if stop else None)
        if stop:
            model.load_state_dict(best)
        return model

    def val_loss(self, model: Any, hparams: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(self.x[batch]), self.y[batch])

    def learn(self, decay: float) -> nn.Module:
        """Train on the noisy examples while their weights are learned."""
        torch.manual_seed(self.seed)
        model, hparams = self.make(), hoptim.recipes.ExampleWeights(NOISY + CLEAN, trusted=self.clean)
        loss = hoptim.CompositeLoss(
            lambda model, _, batch: model(self.x[batch]),
            lambda z, hparams, batch: hparams.mean(F.cross_entropy(z, self.y[batch], reduction="none"), batch),
        )
        self.problem = hoptim.Problem(model, hparams, loss, self.val_loss)
        optimizer = hoptim.BilevelOptimizer(
            self.inner(decay, counts=2)(model), hparams.optimizer(OUTER), self.problem, val_batches=[self.clean],
            train_batches=self.noisy.split(DRAWN), every=EVERY, warmup=STEPS // 4,
        )  # fmt: skip
        self.train(model, optimizer, self.noisy)
        return model

    def retrain(self, decay: float) -> nn.Module:
        """Train a new model on everything with the weights that were learned last."""
        torch.manual_seed(self.seed)
        return hoptim.retrain(self.problem, self.make, self.train, self.everything, inner=self.inner(decay, counts=2))

    def judge(self, decay: float) -> None:
        """Train a model on the clean examples, and keep the probabilities that it gives the noisy labels."""
        model = self.plain(decay, self.clean)
        with torch.no_grad():
            self.likely = model(self.x[self.noisy]).softmax(1)[self.noisy, self.y[self.noisy]]

    def run(self, way: str, decay: float, own: Any) -> nn.Module:
        """The trained model of a way."""
        if way.startswith("hoptim"):
            return self.learn(decay) if way == "hoptim, the run" else self.retrain(decay)
        if way == "GCE":
            return self.plain(decay, self.everything, lambda z, y: gce(z, y, own))
        if way in ("filter", "oracle"):
            kept = ~self.wrong if way == "oracle" else self.likely >= own
            return self.plain(decay, torch.cat([self.noisy[kept], self.clean]))
        examples = {"clean": self.clean, "all + clean": self.everything}.get(way, self.noisy)
        return self.plain(decay, examples, stop=way == "all, stopped")

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """Accuracy and cross-entropy on the test images."""
        x, y = self.test
        z = torch.cat([model(part) for part in x.split(1000)])
        return {"accuracy": (z.argmax(1) == y).double().mean().item(), "cross-entropy": F.cross_entropy(z, y).item()}

    def f1(self, way: str, own: Any) -> float | None:
        """The F1 score of finding the wrong labels, for the ways that find some; else ``None``."""
        if way != "filter" and not way.startswith("hoptim"):
            return None
        flagged = self.likely < own if way == "filter" else self.problem.hparams["example_weight"][self.noisy] < 0.5
        return 2 * int((flagged & self.wrong).sum()) / int(flagged.sum() + self.wrong.sum())


def gce(z: Tensor, y: Tensor, q: float) -> Tensor:
    return ((1 - (-q * F.cross_entropy(z, y, reduction="none")).exp()) / q).mean()


def prepare(labels: Labels, way: str, chosen: Any) -> None:
    """Train what a way builds on, at the setting that was chosen for it by cross-entropy."""
    if way == "filter":
        labels.judge(chosen["clean"]["cross-entropy"][0])
    if way == "hoptim, retrained":
        labels.learn(chosen["hoptim, the run"]["cross-entropy"][0])


def tune(root: Path, noise: str, model: str, seeds: Sequence[int]) -> dict[str, Any]:
    """For each way and metric, the setting (decay, the way's own option) that is best on average over these seeds."""
    drawn, chosen = [Labels(root, noise, model, seed, tuning=True) for seed in seeds], {}
    for way in WAYS:
        for labels in drawn:
            prepare(labels, way, chosen)
        found = {}
        for setting in itertools.product(DECAYS, OWN.get(way, (None,))):
            scores = [labels.scores(labels.run(way, *setting)) for labels in drawn]
            found[setting] = {metric: mean(one[metric] for one in scores) for metric in METRICS}
        chosen[way] = {metric: best(found, key=lambda one: found[one][metric]) for metric, best in METRICS.items()}
        print(f"{noise}, {model}, {way}: {chosen[way]}", flush=True)
    return chosen


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """A job has a row for each way. With ``--tune`` the settings are chosen instead."""
    cells = list(itertools.product(options.noises, options.models))
    if options.tune:
        found = {f"{noise}, {model}": tune(options.data, noise, model, options.tune) for noise, model in cells}
        SETTINGS.write_text(json.dumps({**json.loads(SETTINGS.read_text()), **found}, indent=1) + "\n")
        return
    yield from ({"noise": n, "model": m, "seed": seed} for n, m in cells for seed in options.seeds)


def run(root: Path, noise: str, model: str, seed: int) -> Iterator[dict[str, Any]]:
    """For each way: accuracy and cross-entropy, each at the setting chosen for it, F1, and processor time."""
    labels, chosen = Labels(root, noise, model, seed), json.loads(SETTINGS.read_text())[f"{noise}, {model}"]
    for way in WAYS:
        begun = time.process_time()
        prepare(labels, way, chosen)
        seconds, found = [time.process_time() - begun], {}
        for setting in dict.fromkeys(tuple(chosen[way][metric]) for metric in METRICS):
            begun = time.process_time()
            found[setting] = labels.run(way, *setting)
            seconds.append(time.process_time() - begun)
        figures = {metric: labels.scores(found[tuple(chosen[way][metric])])[metric] for metric in METRICS}
        f1 = labels.f1(way, chosen[way]["cross-entropy"][1])
        yield {"way": way, **figures, "F1": f1, "seconds": seconds[0] + mean(seconds[1:])}


def show(rows: Sequence[Row]) -> Iterator[str]:
    """For each noise the scores, and those of the retrained model minus each other way's, paired by seed."""
    for noise in dict.fromkeys(row["noise"] for row in rows):
        names = list(dict.fromkeys(row["model"] for row in rows if row["noise"] == noise))
        columns = list(itertools.product(names, METRICS))
        heads, lines, gains = [f"{model}: {metric}" for model, metric in columns], [], []
        for way in WAYS:
            of = {
                (m, f): by_seed(rows, f, noise=noise, model=m, way=way) for m in names for f in (*METRICS, "F1", "seconds")
            }
            ours = {c: by_seed(rows, c[1], noise=noise, model=c[0], way="hoptim, retrained") for c in columns}
            units = {m: by_seed(rows, "seconds", noise=noise, model=m, way="all + clean") for m in names}
            f1 = [f"{mean(of[m, 'F1'].values()):.3f}" for m in names if None not in of[m, "F1"].values()]
            costs = [f"{mean(s / units[m][seed] for seed, s in of[m, 'seconds'].items()):.1f}" for m in names]
            cells = [mean_and_error(list(of[column].values())) for column in columns]
            lines.append([way, *cells, ", ".join(f1), ", ".join(costs)])
            gains.append([way, *(mean_and_error(differences(ours[c], of[c]), "+.3f") for c in columns)])
        yield markdown([noise, *heads, "F1", "cost"], lines)
        yield markdown(["retrained minus it", *heads], [line for line in gains if line[0] != "hoptim, retrained"])


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Accuracy and cross-entropy of each way, mean and standard error over the seeds."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout="constrained")
    for (noise, metric), axis in zip(itertools.product(NOISES, METRICS), axes.flat, strict=True):
        for number, model in enumerate(dict.fromkeys(row["model"] for row in rows if row["noise"] == noise)):
            values = [list(by_seed(rows, metric, noise=noise, model=model, way=way).values()) for way in WAYS]
            places = [place + (number - 1) / 5 for place in range(len(WAYS))]
            errors = list(map(standard_error, values))
            axis.errorbar(list(map(mean, values)), places, xerr=errors, fmt="os^"[number], label=model)
        axis.set(title=f"{noise} noise", xlabel=f"test {metric}", yticks=range(len(WAYS)), yticklabels=WAYS)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
    save(figure, folder / "wrong_labels.png", dpi=100)


if __name__ == "__main__":
    Study(
        file=__file__, seeds=range(2, 7), jobs=jobs, run=run, show=show, draw=draw,
        more={
            "models": {"nargs": "+", "choices": list(MODELS), "default": list(MODELS), "help": "default: all"},
            "noises": {"nargs": "+", "choices": NOISES, "default": NOISES, "help": "default: both"},
            "tune": {"nargs": "+", "type": int, "metavar": "SEED", "help": "choose the settings on these seeds instead"},
        },
    ).main(__doc__)  # fmt: skip
