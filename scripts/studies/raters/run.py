"""Which examples to train on? A learned rater beside what is usual: classifiers, perplexity, losses, a random share.

    python scripts/studies/raters/run.py --data data            # run what runs/raters lacks, then tables and a picture
    python scripts/studies/raters/run.py --problems garments --seeds 0
    python scripts/studies/raters/run.py --saved                # the tables of the page; nothing runs

Each way rates the 4,000 training examples (300 in the table) by what it makes of them and of the same few validation
examples. The share with the highest ratings, 30, 45 or 60 % by the validation loss, trains a new model; the score is its
test loss. The ways:

- all; clean: the validation examples alone; all + clean; random: a random share;
- classifier: of validation against training examples, as DCLM filters (arXiv 2406.11794), by logistic regression on pairs of
  letters, and by a network as large as the rater's on images and rows;
- perplexity: of trigrams of the validation texts, as CCNet filters (arXiv 1911.00359);
- clean model: the lowest loss by a model of the validation examples; both: the sum of its rating and the classifier's,
  scaled to the same variance; low loss, high loss: by a model of all;
- table of weights: recipes.ExampleWeights, a weight for each example by its number, learned in one training;
- rater: recipes.Rater, learned in one training, from the same features as the classifier; rater of all: from these, the
  loss by the clean model and the classifier's rating; its weights: hoptim.retrain on all examples with the weights of the
  latter, none left out;
- useful: the kinds that were made to be kept.

Then all but those that need a training on the examples rate 4,000 others, which nobody has trained on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, by_seed, differences
from common.tables import markdown
from studies.raters.problems import CONTEXT, LETTERS, PROBLEMS, Pool, mlp
from tasks.loops import in_epochs, train, with_loss

import hoptim
from hoptim.recipes import ExampleWeights, Rater

SHARES = (0.3, 0.45, 0.6)
FILTERS = (
    "random", "classifier", "perplexity", "clean model", "both", "low loss", "high loss", "table of weights", "rater",
    "rater of all",
)  # fmt: skip
WAYS = ("all", "clean", "all + clean", *FILTERS, "its weights", "useful")
OF_OTHERS = (
    "random",
    "classifier",
    "perplexity",
    "clean model",
    "both",
    "rater",
    "rater of all",
)  # rate what nobody trained on
COLOURS = {
    "speeches": "#1f5fb4", "novel": "#7fb3e6", "repeated": "#e8b04a", "shuffled": "#d9722b", "noise": "#a34a1a",
    "numbers": "#6b6b6b", "right": "#1f5fb4", "wrong": "#d9722b", "copied": "#e8b04a", "other value": "#d9722b",
    "moved": "#e8b04a", "unit": "#6b6b6b",
}  # fmt: skip
CLEAN_STEPS = {"text": 0.8, "garments": 0.25, "table": 0.5}  # of the model of the validation examples, in trainings


class Ways:
    """What each way makes of a pool, and the trainings."""

    def __init__(self, name: str, pool: Pool, seed: int) -> None:
        self.name, self.pool, self.seed = name, pool, seed
        self.rates: dict[str, Callable[[Tensor], Tensor]] = {}  # how each way rates examples

    @property
    def of_texts(self) -> bool:
        return self.pool.x.dtype is torch.int64

    def loop(self, model: Any, optimizer: Any, examples: Tensor, share: float = 1.0, after: Any = None) -> None:
        steps = int(self.pool.steps * share)
        train(model, optimizer, in_epochs(examples, self.pool.batch, steps), falling=steps, after=after)

    def inner(self, model: Any) -> torch.optim.Optimizer:
        return self.pool.inner(model)

    def trained(self, examples: Tensor, share: float = 1.0) -> Any:
        """An ordinary training on these examples."""
        torch.manual_seed(self.seed)
        model = self.pool.make()
        optimizer = with_loss(self.inner(model), lambda batch: self.pool.each(model, batch).mean())
        self.loop(model, optimizer, examples, share)
        return model

    @torch.no_grad()
    def losses(self, model: Any, examples: Tensor) -> Tensor:
        return torch.cat([self.pool.each(model, part) for part in examples.split(1000)])

    def learned(self, make: Callable[[], Any], weighted: Callable[[Any, Tensor, Tensor], Tensor]) -> hoptim.Problem:
        """One training in which hyperparameters are learned; ``weighted(hparams, losses, batch)`` is its loss."""
        pool = self.pool
        torch.manual_seed(self.seed)
        model, hparams = pool.make(), make()
        problem = hoptim.Problem(
            model, hparams, lambda model, h, batch: weighted(h, pool.each(model, batch), batch),
            lambda model, _, batch: pool.each(model, batch).mean(),
        )  # fmt: skip
        warmup = pool.steps // 4
        outer = hparams.optimizer(pool.rate) if isinstance(hparams, Rater) else hparams.optimizer()
        optimizer = hoptim.BilevelOptimizer(
            self.inner(model), outer, problem, val_batches=pool.val.split(pool.asked), every=pool.every, warmup=warmup,
            train_batches=lambda: pool.train[torch.randperm(len(pool.train))[: pool.drawn]],
        )  # fmt: skip
        first = outer.param_groups[0]["lr"]

        def fall(step: int) -> None:  # as the inner rate does, since a model that no longer moves cannot answer
            outer.param_groups[0]["lr"] = first * min(1.0, (pool.steps - step) / (pool.steps - warmup))

        self.loop(model, optimizer, pool.train, after=fall)
        return problem

    def known(self, examples: Tensor) -> Tensor:
        """What the clean model and the classifier make of examples, each scaled by the training examples, shape (N, 2)."""
        found = []
        for way in ("clean model", "classifier"):
            own = self.rates[way](self.pool.train)
            found.append(((self.rates[way](examples) - own.mean()) / own.std()).clamp(-4, 4).float())
        return torch.stack(found, 1)

    def prepared(self, way: str) -> Callable[[Tensor], Tensor]:
        """The function that rates examples; what it builds on is made now."""
        pool, draw = self.pool, torch.Generator().manual_seed(self.seed)
        if way == "random":
            return lambda examples: torch.rand(len(examples), generator=draw)
        if way == "classifier":
            as_many = torch.cat([pool.val.repeat(len(pool.train) // len(pool.val)), pool.train])
            network = MLPClassifier((32,), alpha=0.01, max_iter=30, random_state=self.seed)
            found = LogisticRegression(max_iter=300) if self.of_texts else network
            found.fit(pool.features[as_many].numpy(), torch.isin(as_many, pool.val).numpy())
            return lambda examples: torch.from_numpy(found.predict_proba(pool.features[examples].numpy())[:, 1]).logit(1e-5)
        if way == "perplexity":
            return trigrams(pool.x[pool.val], pool.x)
        if way == "clean model":
            clean = self.trained(pool.val, CLEAN_STEPS[self.name])
            return lambda examples: -self.losses(clean, examples)
        if way in ("low loss", "high loss"):
            sign = 1 if way == "high loss" else -1
            return lambda examples: sign * self.losses(self.of_all, examples)
        if way == "table of weights":
            table = self.learned(lambda: ExampleWeights(len(pool.train)), lambda h, losses, batch: h.mean(losses, batch))
            return lambda examples: table.hparams["example_weight"].detach()[examples]
        if way == "both":
            return lambda examples: self.known(examples).sum(1)
        features = pool.features
        if way == "rater of all":
            features = torch.cat([features, self.known(torch.arange(len(pool.x)))], 1)
        self.problem = self.learned(
            lambda: Rater(mlp(features.shape[1], 1, 32)), lambda h, losses, batch: h.mean(losses, features[batch])
        )
        rater: Any = self.problem.hparams
        return lambda examples: torch.cat(list(rater.rate(features[examples].split(1000))))

    def filtered(self, rate: Callable[[Tensor], Tensor], examples: Tensor) -> dict[str, Any]:
        """The figures of the share that has the lowest validation loss."""
        ratings, found = rate(examples), []
        for share in SHARES:
            kept = examples[Rater.keep(ratings, share)]
            found.append({"share": share, **self.figures(self.trained(kept), kept)})
        return min(found, key=lambda one: one["val"])

    def weighted(self, examples: Tensor) -> dict[str, Any]:
        """The figures of a training on all examples, with the weights of the rater that was learned last."""
        torch.manual_seed(self.seed)
        model = hoptim.retrain(self.problem, self.pool.make, self.loop, examples, inner=self.inner)
        return {"way": "its weights", "share": 1.0, **self.figures(model, examples)}

    def figures(self, model: Any, kept: Tensor) -> dict[str, Any]:
        pool = self.pool
        own = kept[kept < len(pool.kind)]
        kinds = {kind: int((pool.kind[own] == number).sum()) for number, kind in enumerate(pool.kinds)}
        return {
            "test": self.losses(model, pool.test).mean().item(), "val": self.losses(model, pool.val).mean().item(),
            "useful": pool.is_useful[own].double().mean().item() if len(own) else None, "kept": kinds,
        }  # fmt: skip

    def rows(self) -> Iterator[dict[str, Any]]:
        """Those of all ways; ``seconds`` are of processor time, of what is made first and of the last training."""
        pool, clock = self.pool, time.process_time
        sets = {
            "clean": pool.val, "all + clean": torch.cat([pool.train, pool.val]),
            "useful": pool.train[pool.is_useful[pool.train]], "all": pool.train,
        }  # fmt: skip
        seconds: dict[str, float] = {}
        self.trained(pool.val, 0.05)  # a first training is slower, whichever it is
        for way, examples in sets.items():
            begun = clock()
            model = self.of_all = self.trained(examples, CLEAN_STEPS[self.name] if way == "clean" else 1.0)
            seconds[way] = clock() - begun
            yield {"set": "own", "way": way, "share": 1.0, **self.figures(model, examples), "seconds": seconds[way]}
        once = seconds["all"]
        for way in FILTERS:
            if way != "perplexity" or self.of_texts:
                begun = clock()
                self.rates[way] = self.prepared(way)
                seconds[way] = clock() - begun + once * (2 if "loss" in way else 1)
                if way in ("both", "rater of all"):
                    seconds[way] += sum(seconds[one] - once for one in ("clean model", "classifier"))
                yield {"set": "own", "way": way, **self.filtered(self.rates[way], pool.train), "seconds": seconds[way]}
        yield {"set": "own", **self.weighted(pool.train), "seconds": seconds["rater of all"]}
        if len(pool.following):
            others = {"all": pool.following, "useful": pool.following[pool.is_useful[pool.following]]}
            for way, examples in others.items():
                row = {"set": "next", "way": way, "share": 1.0, **self.figures(self.trained(examples), examples)}
                yield {**row, "seconds": once}
            for way in OF_OTHERS:
                if way in self.rates:
                    yield {"set": "next", "way": way, **self.filtered(self.rates[way], pool.following), "seconds": once}
            yield {"set": "next", **self.weighted(pool.following), "seconds": once}


def trigrams(target: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The mean log-probability of the letters of texts, each given the two before it, with three counts by the last."""
    size = len(LETTERS)

    def codes(texts: Tensor) -> Tensor:
        return (texts[:, :-2] * size + texts[:, 1:-1]) * size + texts[:, 2:]

    seen = codes(target).flatten().bincount(minlength=size**3).reshape(-1, size).float()
    pairs = seen.reshape(size, size, size).sum(0)  # of the last two letters, to fall back on
    letters = (pairs + 0.1) / (pairs + 0.1).sum(1, keepdim=True)
    logs = ((seen + 3 * letters.repeat(size, 1)) / (seen.sum(1, keepdim=True) + 3)).log().flatten()
    return lambda examples: logs[codes(x[examples][:, CONTEXT:])].mean(1)


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    yield from ({"problem": name, "seed": seed} for name in options.problems for seed in options.seeds)


def run(root: Path, problem: str, seed: int) -> Iterator[dict[str, Any]]:
    yield from Ways(problem, PROBLEMS[problem](root, seed), seed).rows()


def values(rows: Sequence[Row], figure: str, name: str, way: str, part: str = "own") -> dict[int, float]:
    return by_seed(rows, figure, problem=name, way=way, set=part)


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Test losses, the differences of the rater of all, the next set, and what was kept at what cost."""
    names = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    for part, ways in (("own", WAYS), ("next", ("all", *OF_OTHERS, "its weights", "useful"))):
        found = [name for name in names if values(rows, "test", name, "all", part)]
        lines = [
            [way, *(mean_and_error(list(values(rows, "test", name, way, part).values())) for name in found)] for way in ways
        ]
        yield markdown([f"test loss, {part} set", *found], lines)
        lines = []
        for way in ways:
            if way != "rater of all":
                pairs = [[values(rows, "test", name, one, part) for one in ("rater of all", way)] for name in found]
                lines.append([way, *(mean_and_error(differences(*pair), "+.3f") for pair in pairs)])
        yield markdown([f"rater of all minus it, {part} set", *found], lines)
    lines = []
    for way in WAYS:
        cells = [way]
        for name in names:
            kept = [one for one in values(rows, "useful", name, way).values() if one is not None]
            units, spent = values(rows, "seconds", name, "all"), values(rows, "seconds", name, way)
            costs = [seconds / units[seed] for seed, seconds in spent.items()]
            cells += [f"{mean(kept):.0%}" if kept else "", f"{mean(costs):.1f}" if costs else ""]
        lines.append(cells)
    yield markdown(["useful among the kept, and cost", *(head for name in names for head in (name, "cost"))], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Which kinds each way keeps, as shares of the training examples of that kind, and the test loss."""
    from common.pictures import plt, save

    names = [name for name in PROBLEMS if any(row["problem"] == name for row in rows)]
    figure, axes = plt.subplots(1, len(names), figsize=(4.6 * len(names), 4.6), layout="constrained", squeeze=False)
    for name, axis in zip(names, axes[0], strict=True):
        ways = [way for way in ("all", *FILTERS, "useful") if values(rows, "test", name, way)]
        own = [row for row in rows if row["problem"] == name and row["set"] == "own"]
        for place, way in enumerate(ways):
            kept = [row["kept"] for row in own if row["way"] == way]
            left = 0.0
            for kind in kept[0]:
                width = mean(one[kind] / sum(one.values()) for one in kept)
                axis.barh(place, width, left=left, color=COLOURS[kind], label=kind if place == 0 else None)
                left += width
            loss = mean(values(rows, "test", name, way).values())
            axis.text(1.02, place, f"{loss:.2f}", va="center", fontsize=8)
        axis.set(title=name, yticks=range(len(ways)), yticklabels=ways, xlim=(0, 1.16), xticks=[0, 0.5, 1])
        axis.set_xlabel("share of what is kept; right: test loss")
        axis.invert_yaxis()
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.13))
    save(figure, folder / "raters.png")


if __name__ == "__main__":
    options = {"nargs": "+", "choices": list(PROBLEMS), "default": list(PROBLEMS), "help": "default: all"}
    Study(
        file=__file__, seeds=(0, 1, 2), jobs=jobs, run=run, show=show, draw=draw, more={"problems": options},
    ).main(__doc__)  # fmt: skip
