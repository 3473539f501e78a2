"""Nine ways to train on wrong labels: half of 5,000 images have a wrong label, and 1,000 more have right ones.

    python scripts/examples/wrong_labels.py [linear mlp cnn] [--noise class-dependent symmetric] [--seeds 2 3 4 5 6]
    python scripts/examples/wrong_labels.py --tune 0 1        # choose the settings again
    python scripts/examples/wrong_labels.py --seeds           # print and draw what is stored; nothing runs

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
on other seeds and on 10,000 training images that these seeds do not draw; scores are on the test set. Both are stored in
scripts/wrong_labels.json. Costs are in trainings on all 6,000, by processor time.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST

import hoptim

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the modules of scripts/ are found
from common.means import mean_and_error, standard_error
from common.tables import markdown

NOISY, CLEAN, BATCH, STEPS = 5000, 1000, 100, 800
EVERY, DRAWN, OUTER = 10, 1000, 0.3  # steps between hypersteps, training examples of a hyperstep, and Adam's outer rate
NOISES = ("class-dependent", "symmetric")
METRICS = {"accuracy": max, "cross-entropy": min}
DECAYS = (1e-3, 1e-2, 3e-2, 1e-1)
OWN = {"GCE": (0.5, 0.7, 0.9), "filter": (0.03, 0.1, 0.3, 0.5)}  # q, and the lowest probability of a label that is kept
WAYS = ("all", "all, stopped", "clean", "all + clean", "GCE", "filter", "hoptim, the run", "hoptim, retrained", "oracle")
STORED = Path(__file__).parents[1] / "wrong_labels.json"


def linear():
    return nn.Linear(784, 10)


def mlp():
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn():
    first, second = nn.Conv2d(1, 8, 4, stride=3), nn.Conv2d(8, 16, 3, stride=2)
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


MODELS = {"linear": (linear, 0.05), "mlp": (mlp, 0.05), "cnn": (cnn, 0.1)}  # and the rate of momentum SGD


class Labels:
    """The images and wrong labels that a seed draws, and the trainings on them."""

    def __init__(self, root, noise, model, seed, tuning=False):
        draw = torch.Generator().manual_seed(seed)
        sets = [FashionMNIST(root, train=part, download=True) for part in (True, False)]
        (x, y), test = (((one.data.flatten(1) / 255 - 0.286) / 0.353, one.targets) for one in sets)
        order = torch.randperm(len(x), generator=draw)
        own, others = order[: NOISY + CLEAN], order[NOISY + CLEAN :][: len(test[1])]
        self.x, self.y, self.test = x[own], y[own], (x[others], y[others]) if tuning else test
        self.everything = torch.arange(NOISY + CLEAN)
        self.noisy, self.clean = self.everything[:NOISY], self.everything[NOISY:]
        self.wrong = torch.rand(NOISY, generator=draw) < 0.5
        shift = torch.randint(1, 10, (NOISY,), generator=draw) if noise == "symmetric" else 1
        self.y[:NOISY] = (self.y[:NOISY] + self.wrong * shift) % 10
        self.seed, (self.make, self.rate) = seed, MODELS[model]
        self.problem = None  # what was learned, after :meth:`learn`
        self.likely = None  # the probabilities of the noisy labels by a model of the clean examples, after :meth:`judge`

    def inner(self, decay, counts=1):
        """The optimizer for examples that count up to so many times: the same steps as at ``counts=1`` if they do."""
        rates = {"lr": self.rate / counts, "weight_decay": decay * counts}
        return lambda model: torch.optim.SGD(model.parameters(), momentum=0.9, **rates)

    def train(self, model, optimizer, examples):
        schedule, steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS), 0
        while steps < STEPS:
            for batch in examples[torch.randperm(len(examples))].split(BATCH)[: STEPS - steps]:
                optimizer.zero_grad()
                optimizer.loss(batch).backward()
                optimizer.step()
                schedule.step()
                steps += 1

    def plain(self, decay, examples, loss=F.cross_entropy, stop=False):
        """Train with this loss of logits and labels; with ``stop`` return the best weights instead of the last."""
        torch.manual_seed(self.seed)
        model = self.make()
        optimizer = self.inner(decay)(model)
        optimizer.loss = lambda batch: loss(model(self.x[batch]), self.y[batch])
        best = Best(model, lambda: self.val_loss(model, None, self.clean))
        if stop:
            optimizer.register_step_post_hook(best)
        self.train(model, optimizer, examples)
        if stop:
            model.load_state_dict(best.weights)
        return model

    def val_loss(self, model, hparams, batch):
        return F.cross_entropy(model(self.x[batch]), self.y[batch])

    def learn(self, decay):
        """Train on the noisy examples while their weights are learned."""
        torch.manual_seed(self.seed)
        model, hparams = self.make(), hoptim.recipes.ExampleWeights(NOISY + CLEAN, trusted=self.clean)
        loss = hoptim.CompositeLoss(
            lambda model, _, batch: model(self.x[batch]),
            lambda z, hparams, batch: hparams.mean(F.cross_entropy(z, self.y[batch], reduction="none"), batch),
        )
        self.problem = hoptim.Problem(model, hparams, loss, self.val_loss)
        batches = {"val_batches": [self.clean], "train_batches": self.noisy.split(DRAWN)}
        optimizer = hoptim.BilevelOptimizer(
            self.inner(decay, counts=2)(model),
            hparams.optimizer(OUTER),
            self.problem,
            **batches,
            every=EVERY,
            warmup=STEPS // 4,
        )
        self.train(model, optimizer, self.noisy)
        return model

    def retrain(self, decay):
        """Train a new model on everything with the weights that were learned last."""
        torch.manual_seed(self.seed)
        return hoptim.retrain(self.problem, self.make, self.train, self.everything, inner=self.inner(decay, counts=2))

    def judge(self, decay):
        """Train a model on the clean examples, and keep the probabilities that it gives the noisy labels."""
        model = self.plain(decay, self.clean)
        with torch.no_grad():
            self.likely = model(self.x[self.noisy]).softmax(1)[self.noisy, self.y[self.noisy]]

    def run(self, way, decay, own):
        """The trained model of a way."""
        if way == "hoptim, the run":
            return self.learn(decay)
        if way == "hoptim, retrained":
            return self.retrain(decay)
        if way == "GCE":
            return self.plain(decay, self.everything, lambda z, y: gce(z, y, own))
        if way in ("filter", "oracle"):
            kept = ~self.wrong if way == "oracle" else self.likely >= own
            return self.plain(decay, torch.cat([self.noisy[kept], self.clean]))
        examples = {"clean": self.clean, "all + clean": self.everything}.get(way, self.noisy)
        return self.plain(decay, examples, stop=way == "all, stopped")

    @torch.no_grad()
    def scores(self, model):
        """Accuracy and cross-entropy on the test images."""
        x, y = self.test
        z = torch.cat([model(part) for part in x.split(1000)])
        return {"accuracy": (z.argmax(1) == y).double().mean().item(), "cross-entropy": F.cross_entropy(z, y).item()}

    def f1(self, way, own):
        """The F1 score of finding the wrong labels, for the ways that find some; else ``None``."""
        if way == "filter":
            flagged = self.likely < own
        elif way.startswith("hoptim"):
            flagged = self.problem.hparams["example_weight"][self.noisy] < 0.5
        else:
            return None
        return 2 * int((flagged & self.wrong).sum()) / int(flagged.sum() + self.wrong.sum())


def gce(z, y, q):
    return ((1 - (-q * F.cross_entropy(z, y, reduction="none")).exp()) / q).mean()


class Best:
    """A hook after each step: every 20 steps it copies the weights if their loss is the lowest so far."""

    def __init__(self, model, loss):
        self.model, self.loss, self.steps, self.lowest, self.weights = model, loss, 0, math.inf, {}

    @torch.no_grad()
    def __call__(self, *_):
        self.steps += 1
        if self.steps % 20 == 0 and (now := self.loss().item()) < self.lowest:
            self.lowest, self.weights = now, copy.deepcopy(self.model.state_dict())


def tune(root, noise, model, seeds):
    """For each way and metric, the setting (decay, the way's own option) that is best on average over these seeds."""
    drawn, chosen = [Labels(root, noise, model, seed, tuning=True) for seed in seeds], {}
    for way in WAYS:
        for labels in drawn:
            prepare(labels, way, chosen)
        found = {}
        for setting in itertools.product(DECAYS, OWN.get(way, (None,))):
            scores = [labels.scores(labels.run(way, *setting)) for labels in drawn]
            found[setting] = {metric: statistics.mean(one[metric] for one in scores) for metric in METRICS}
        chosen[way] = {metric: best(found, key=lambda one: found[one][metric]) for metric, best in METRICS.items()}
        for metric, setting in chosen[way].items():
            print(f"{noise}, {model}, {way}: {metric} {found[setting][metric]:.3f} with {setting}", flush=True)
    return chosen


def prepare(labels, way, chosen):
    """Train what a way builds on, at the setting that was chosen for it by cross-entropy."""
    if way == "filter":
        labels.judge(chosen["clean"]["cross-entropy"][0])
    if way == "hoptim, retrained":
        labels.learn(chosen["hoptim, the run"]["cross-entropy"][0])


def score(root, noise, model, seed, chosen):
    """For each way: accuracy and cross-entropy, each at the setting chosen for it, F1, and processor time."""
    labels, found = Labels(root, noise, model, seed), {}
    for way in WAYS:
        begun = time.process_time()
        prepare(labels, way, chosen)
        seconds, models = [time.process_time() - begun], {}
        for setting in dict.fromkeys(tuple(chosen[way][metric]) for metric in METRICS):
            begun = time.process_time()
            models[setting] = labels.run(way, *setting)
            seconds.append(time.process_time() - begun)
        found[way] = {metric: labels.scores(models[tuple(chosen[way][metric])])[metric] for metric in METRICS}
        found[way]["F1"] = labels.f1(way, chosen[way]["cross-entropy"][1])
        found[way]["seconds"] = seconds[0] + statistics.mean(seconds[1:])
    return found


def tables(runs):
    """Two tables in Markdown: the scores, and those of the retrained model minus each other way's, paired by seed.

    Args:
        runs: by the name of the model, what :func:`score` found for each seed.
    """
    columns = [(model, metric) for model in runs for metric in METRICS]
    heads = [f"{model}: {metric}" for model, metric in columns]
    rows, differences = [], []
    for way in WAYS:
        cells = [mean_and_error([one[way][metric] for one in runs[model]]) for model, metric in columns]
        f1 = [statistics.mean(one[way]["F1"] for one in seeds) for seeds in runs.values() if seeds[0][way]["F1"] is not None]
        costs = [
            statistics.mean(one[way]["seconds"] / one["all + clean"]["seconds"] for one in seeds) for seeds in runs.values()
        ]
        rows.append([way, *cells, ", ".join(f"{one:.3f}" for one in f1), ", ".join(f"{one:.1f}" for one in costs)])
        gains = [[one["hoptim, retrained"][metric] - one[way][metric] for one in runs[model]] for model, metric in columns]
        if way != "hoptim, retrained":
            differences.append([way, *(mean_and_error(gain, "+.3f") for gain in gains)])
    return f"{markdown(['', *heads, 'F1', 'cost'], rows)}\n\n{markdown(['retrained minus it', *heads], differences)}"


def draw(stored, path):
    """Accuracy and cross-entropy of each way, mean and standard error over the seeds."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout="constrained")
    for row, noise in zip(axes, NOISES, strict=True):
        for ax, metric in zip(row, METRICS, strict=True):
            for number, model in enumerate(MODELS):
                seeds = list(stored.get(f"{noise}, {model}", {}).get("scores", {}).values())
                values = [[one[way][metric] for one in seeds] for way in WAYS] if len(seeds) > 1 else []
                errors = [standard_error(one) for one in values]
                places = [place + (number - 1) / 5 for place in range(len(values))]
                ax.errorbar([statistics.mean(one) for one in values], places, xerr=errors, fmt="os^"[number], label=model)
            ax.set(title=f"{noise} noise", xlabel=f"test {metric}", yticks=range(len(WAYS)), yticklabels=WAYS)
            ax.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
    save(figure, path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"some of {', '.join(MODELS)}; default: all")
    parser.add_argument("--noise", nargs="+", choices=NOISES, default=NOISES, help="default: both")
    parser.add_argument("--seeds", nargs="*", type=int, default=range(2, 7), help="default: 2 to 6; none: run nothing")
    parser.add_argument("--tune", nargs="+", type=int, metavar="SEED", help="choose the settings on these seeds instead")
    parser.add_argument("--data", default="data", help="the folder of torchvision's data sets; default: data")
    given = parser.parse_args()
    torch.set_num_threads(1)  # more are slower for so small nets
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    for model, noise in itertools.product(given.models, given.noise):
        one = stored.setdefault(f"{noise}, {model}", {"scores": {}})
        if given.tune:
            one["settings"] = tune(given.data, noise, model, given.tune)
        for seed in [] if given.tune else given.seeds:
            one["scores"][str(seed)] = score(given.data, noise, model, seed, one["settings"])
            print(noise, model, seed, flush=True)
        STORED.write_text(json.dumps(stored, indent=1) + "\n")
    for noise in NOISES:
        runs = {model: list(stored.get(f"{noise}, {model}", {"scores": {}})["scores"].values()) for model in MODELS}
        if runs := {model: seeds for model, seeds in runs.items() if seeds}:
            print(f"\n{noise} noise, {', '.join(f'{len(seeds)} seeds of {model}' for model, seeds in runs.items())}")
            print(tables(runs))
    draw(stored, STORED.with_suffix(".png"))


if __name__ == "__main__":
    main()
