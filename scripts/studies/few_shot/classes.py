"""Digits and garments: the share of right answers in tasks of five classes that meta-training has not seen."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from common.means import mean_and_error
from common.study import Row, by_seed, differences
from common.tables import markdown
from studies.few_shot import tasks
from studies.few_shot.tasks import Batch
from studies.few_shot.ways import Learner, Way, nearest_mean, pretrained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hoptim import CG, GaussNewton, Implicit, PerTask

SHOTS, META_STEPS, META_BATCH = (1, 5), 500, 4
SIDE = META_BATCH  # all of them side by side, which is faster for so small convolutions
LEARNED = {
    "MAML": Way(method=PerTask(3, chunk_size=SIDE), rate=0.1, meta_rate=3e-3),
    "first-order MAML": Way(method=PerTask(3, first_order=True, chunk_size=SIDE), rate=0.1, meta_rate=3e-3),
    "ANIL": Way(method=PerTask(3, chunk_size=SIDE), rate=0.4, last=True, meta_rate=3e-3),
    "implicit MAML": Way(
        method=PerTask(8, Implicit(CG(terms=3), curvature=GaussNewton()), chunk_size=SIDE),
        rate=0.1,
        pull=1.0,
        meta_rate=3e-3,
    ),
}
NEAREST, LAYER, WHOLE, RANDOM = "nearest class mean", "a new last layer", "all layers again", "random weights"
SIMPLE = {LAYER: (0.1, 50), WHOLE: (0.2, 10), RANDOM: (0.2, 50)}  # rate and steps on a task
WAYS = (*LEARNED, NEAREST, *SIMPLE)
ONCE: tuple[str, ...] = ()  # each way has all seeds
NEW = 200  # test tasks
TEST_STEPS = 10
ORDINARY, ORDINARY_BATCH = 5000, 96  # steps of the classifier of the 48 training classes


Score = Callable[[Batch, Tensor], Tensor]  # of the queries of each task, by its support set


def run(root: Path, way: str, shots: int, seed: int) -> dict[str, Any]:
    """The share of right answers on new tasks, and the processor seconds until they begin."""
    _, test = tasks.classes(root, seed)
    support, (x, y) = test.tasks(NEW, shots, torch.Generator().manual_seed(10_000 + seed))
    torch.manual_seed(seed)
    score, rate, seconds = learned(root, way, shots, seed) if way in LEARNED else simple(root, way, seed)
    return {"seconds": seconds, "rate": rate, "accuracy": (score(support, x).argmax(-1) == y).float().mean().item()}


def learned(root: Path, way: str, shots: int, seed: int) -> tuple[Score, float, float]:
    """A start by meta-training."""
    (train, _), generator, begun = tasks.classes(root, seed), torch.Generator().manual_seed(seed), time.process_time()
    learner = Learner(tasks.classifier(), LEARNED[way], cross_entropy)
    learner.train(lambda: train.tasks(META_BATCH, shots, generator), META_STEPS)
    seconds = time.process_time() - begun
    if learner.skipped:
        print(f"{learner.skipped} hypergradients were not usable")
    return lambda support, x: of_models(learner.adapted(support, TEST_STEPS), x), LEARNED[way].rate, seconds


@cache
def ordinary(root: Path, seed: int) -> tuple[nn.Sequential, float]:
    """An ordinary classifier of the training classes, and its seconds."""
    (train, _), generator, begun = tasks.classes(root, seed), torch.Generator().manual_seed(seed), time.process_time()
    model = tasks.classifier(outputs=4 * tasks.TRAINING)
    pretrained(model, lambda: train.examples(ORDINARY_BATCH, generator), cross_entropy, ORDINARY, rate=3e-3)
    return model, time.process_time() - begun


def simple(root: Path, way: str, seed: int) -> tuple[Score, float | None, float]:
    """An ordinary classifier, or a new network, and what is done with it on a task."""
    model, seconds = (tasks.classifier(), 0.0) if way == RANDOM else copy.deepcopy(ordinary(root, seed))
    if way == NEAREST:
        return lambda support, x: nearest_mean((features(model, support[0]), support[1]), features(model, x)), None, seconds
    rate, steps = SIMPLE[way]
    head = zeros(nn.Linear(tasks.FEATURES, tasks.CLASSES))
    if way == LAYER:
        learner = Learner(nn.Sequential(head), Way(method=PerTask(steps), rate=rate), cross_entropy)

        def by_layer(support: Batch, x: Tensor) -> Tensor:
            found = learner.adapted((features(model, support[0]), support[1]), steps)
            return of_models(found, features(model, x))

        return by_layer, rate, seconds
    model[-1] = head
    learner = Learner(model, Way(method=PerTask(steps, chunk_size=SIDE), rate=rate), cross_entropy)
    return lambda support, x: of_models(learner.adapted(support, steps), x), rate, seconds


def zeros(layer: nn.Linear) -> nn.Linear:
    """A layer that prefers no class."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


@torch.no_grad()
def features(model: nn.Sequential, x: Tensor) -> Tensor:
    """What the last layer sees of the images of each task, whose batch norm has the statistics of these images."""
    return torch.stack([model[:-1](images) for images in x])


@torch.no_grad()
def of_models(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """What each model says of its task."""
    return torch.stack([model(images) for model, images in zip(models, x, strict=True)])


def show(rows: Sequence[Row]) -> Iterator[str]:
    """The shares of right answers, beside those of MAML with the same seeds, and the seconds."""

    def right(way: str, shots: int) -> dict[int, float]:
        return {seed: 100 * share for seed, share in by_seed(rows, "accuracy", way=way, shots=shots).items()}

    lines = []
    for way in WAYS:
        cells = [way]
        for shots in SHOTS:
            found, seconds = right(way, shots), by_seed(rows, "seconds", way=way, shots=shots).values()
            behind = differences(found, right("MAML", shots)) if way != "MAML" else []
            cells += [mean_and_error(list(found.values()), ".1f"), mean_and_error(behind, "+.1f")]
            cells += [f"{mean(seconds):.0f}" if seconds else ""]
        lines.append(cells)
    heads = [head for images in ("1 image", "5 images") for head in (f"{images} a class", "minus MAML", "seconds")]
    yield markdown(["right answers, %", *heads], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The shares of right answers, a dot for each seed."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(1, len(SHOTS), figsize=(10, 3), layout="constrained", sharey=True)
    for axis, shots in zip(axes, SHOTS, strict=True):
        for place, way in enumerate(WAYS):
            found = [100 * row["accuracy"] for row in rows if (row["way"], row["shots"]) == (way, shots)]
            axis.plot(found, [place] * len(found), "o", color="C0" if way in LEARNED else "C1", alpha=0.7)
        axis.set(title=f"{shots} image{'s' * (shots > 1)} a class", xlabel="right answers, %")
        axis.set_yticks(range(len(WAYS)), WAYS)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    save(figure, folder / "classes.png")
