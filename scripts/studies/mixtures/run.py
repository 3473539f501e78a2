"""How much of which text should a language model train on? Ten sources, two targets, and eight ways to find a mixture.

    python scripts/studies/mixtures/run.py --data data        # run what runs/mixtures lacks, then tables and the picture
    python scripts/studies/mixtures/run.py --seeds 0 --ways "learned, then anew" "all alike"
    python scripts/studies/mixtures/run.py --saved            # the tables of the page; nothing runs

Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.means import mean_and_error
from common.study import Row, Study, differences
from common.tables import markdown
from studies.mixtures import ways
from studies.mixtures.model import bits, trained
from studies.mixtures.sources import texts

import hoptim

TARGETS = ("addresses", "code")
PLAIN = "all alike"
LEARNED = "learned, then anew"
WEIGHTED = "learned by weights in the loss, then anew"
WAYS = (
    PLAIN, "by size", "the best source alone", "a classifier's guess", "DoReMi", "RegMix, 32 small trainings", LEARNED,
    "learned with the default solve, then anew", WEIGHTED, "learned for both targets in one training, then anew",
    "learned for the worse target, then anew",
)  # fmt: skip


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """Each way with each seed."""
    for seed in options.seeds:
        for way in options.ways:
            yield {"way": way, "seed": seed}


class Clock:
    """Processor seconds since it was made."""

    def __init__(self) -> None:
        self.begun = time.process_time()

    def spent(self) -> float:
        return time.process_time() - self.begun


def run(root: Path, way: str, seed: int) -> Iterator[dict[str, Any]]:
    """Bits a byte on both targets, and the processor seconds that were spent for one of them."""
    sources, targets = texts(root, seed)
    validation = {target: val for target, (val, _) in targets.items()}
    alike = ways.shares(sources, np.ones(len(sources)))

    def row(target: str, model: torch.nn.Module, seconds: float, mixture: dict[str, float], **more: Any) -> dict[str, Any]:
        val, test = (bits(model, text) for text in targets[target])
        found = {"target": target, "val": val, "test": test, "seconds": seconds, "mixture": mixture}
        return {**found, "source": "", "run": None, "run seconds": None, "path": [], **more}

    clock = Clock()
    if way in (PLAIN, "by size", "DoReMi", "learned for the worse target, then anew"):  # one mixture for both targets
        if way == PLAIN:
            mixture = alike
        elif way == "by size":
            mixture = ways.shares(sources, [len(text) for text in sources.values()])
        elif way == "DoReMi":
            mixture = ways.by_doremi(sources, seed)
        else:
            _, mixture, _ = ways.learned(sources, list(validation.values()), seed, join=ways.smooth_maximum)
        model = trained(sources, mixture, seed)
        spent = clock.spent()
        for target in targets:
            yield row(target, model, spent, mixture)
    elif way == "the best source alone":
        for name in sources:
            clock = Clock()
            model = trained(sources, {**dict.fromkeys(sources, 0.0), name: 1.0}, seed)
            spent = clock.spent()
            for target in targets:
                yield row(target, model, spent, {}, source=name)
    elif way in ("RegMix, 32 small trainings", "learned for both targets in one training, then anew"):
        find = ways.by_regmix if "RegMix" in way else ways.learned_for_each
        found = find(sources, validation, seed)
        spent = clock.spent()
        for target, mixture in found.items():
            clock = Clock()
            model = trained(sources, mixture, seed)
            yield row(target, model, spent + clock.spent(), mixture)
    else:
        for target, val in validation.items():
            clock, more = Clock(), {}
            if way == "a classifier's guess":
                mixture = ways.by_classifier(sources, val, seed)
            else:
                more = {"method": hoptim.Implicit(), "every": 25, "rate": 0.8} if "default" in way else {}
                model, mixture, path = ways.learned(sources, [val], seed, sampled=way != WEIGHTED, **more)
                more = {"run seconds": clock.spent(), "run": bits(model, targets[target][1])}
                if (way, seed) == (LEARNED, 0):  # for the picture
                    more["path"] = path
            model = trained(sources, mixture, seed)
            yield row(target, model, clock.spent(), mixture, **more)


def best_alone(rows: Sequence[Row], target: str, seed: int) -> Row:
    """The source with the lowest validation loss, at the cost of a training on each."""
    found = [row for row in rows if (row["way"], row["target"], row["seed"]) == (WAYS[2], target, seed)]
    return {**min(found, key=lambda row: row["val"]), "seconds": sum(row["seconds"] for row in found)}


def scored(rows: Sequence[Row]) -> list[Row]:
    """One row for each way, target and seed."""
    alone = {(row["target"], row["seed"]) for row in rows if row["way"] == WAYS[2]}
    found = [row for row in rows if row["way"] != WAYS[2]] + [best_alone(rows, *one) for one in sorted(alone)]
    for row in list(found):
        if row["run"] is not None:
            name = {LEARNED: "learned, the run itself", WEIGHTED: "learned by weights in the loss, the run itself"}
            if row["way"] in name:
                found.append({**row, "way": name[row["way"]], "test": row["run"], "seconds": row["run seconds"]})
    return found


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Bits a byte against trainings; and the mixtures."""
    found = scored(rows)
    order = [*WAYS, *sorted({row["way"] for row in found} - set(WAYS))]
    seconds = {row["seed"]: row["seconds"] for row in found if row["way"] == PLAIN and row["target"] == TARGETS[0]}

    def of(way: str, target: str) -> dict[int, Row]:
        return {row["seed"]: row for row in found if (row["way"], row["target"]) == (way, target)}

    lines = []
    for way in (way for way in order if of(way, TARGETS[0])):
        costs = [row["seconds"] / seconds[s] for target in TARGETS for s, row in of(way, target).items() if s in seconds]
        cells = [way, f"{mean(costs):.1f}" if costs else ""]
        for target in TARGETS:
            test, other = ({s: row["test"] for s, row in of(name, target).items()} for name in (way, LEARNED))
            cells += [mean_and_error(list(test.values())), mean_and_error(differences(test, other), "+.3f")]
        lines.append(cells)
    heads = [cell for target in TARGETS for cell in (f"{target}, bits a byte", f"minus “{LEARNED}”")]
    yield markdown(["way", "trainings", *heads], lines)
    names = list(next((row["mixture"] for row in found if row["mixture"]), {}))
    lines = []
    for way in (LEARNED, "RegMix, 32 small trainings", "a classifier's guess", "DoReMi"):
        for target in TARGETS[: 1 if way == "DoReMi" else 2]:
            mixtures = [row["mixture"] for row in of(way, target).values()]
            if mixtures:
                title = way if way == "DoReMi" else f"{way}: {target}"
                lines.append([title, *(f"{mean(one[name] for one in mixtures):.2f}" for name in names)])
    yield markdown(["mixture", *names], lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The learned mixture over the steps, for each target."""
    from common.pictures import plt, save

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, target in zip(axes, TARGETS, strict=True):
        path = next((row["path"] for row in rows if (row["way"], row["target"]) == (LEARNED, target) and row["path"]), [])
        if not path:
            continue
        steps = [0, *(ways.WARMUP + ways.EVERY * n for n in range(len(path) - 1))]
        names = list(path[0])
        axis.stackplot(steps, *([one[name] for one in path] for name in names), labels=names, colors=plt.cm.tab10.colors)
        axis.set(title=f"target: {target}", xlabel="step", xlim=(0, steps[-1]), ylim=(0, 1))
    axes[0].set_ylabel("share of each source")
    bands, names = axes[1].get_legend_handles_labels()
    figure.legend(bands[::-1], names[::-1], loc="outside right center")
    save(figure, folder / "mixtures.png")


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(0, 1, 2), jobs=jobs, run=run, show=show, draw=draw,
        more={"ways": {"nargs": "+", "choices": WAYS, "default": list(WAYS), "help": "default: all"}},
    ).main(__doc__)  # fmt: skip
