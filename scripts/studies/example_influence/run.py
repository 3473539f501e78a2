"""Whose scores tell best what a training without some examples would do? Influence by hoptim, kronfluence and TRAK.

    python scripts/studies/example_influence/run.py --data data        # run what runs/example_influence lacks, then tables
    python scripts/studies/example_influence/run.py --tasks digits --seeds 0 --ways "MINRES(10)"
    python scripts/studies/example_influence/run.py --saved            # the tables of the page; nothing runs

The figure is LDS, the linear datamodelling score (Park et al. 2023, TRAK, arXiv 2303.14186, section 2): the rank
correlation, over 50 trainings on random halves of the examples, of a query's loss with the sum of the scores of the half,
mean over the queries. The peers are installed apart: pip install kronfluence traker. Settings were chosen on seed 100.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
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
from studies.example_influence.peers import kronfluence, trak
from studies.example_influence.tasks import DECAY, TASKS, losses_of

from hoptim import (
    CG,
    EKFAC,
    MINRES,
    CompositeLoss,
    Exact,
    GaussNewton,
    Identity,
    Implicit,
    Problem,
    influence,
    self_influence,
)

HALVES, ENSEMBLE, KRONFLUENCE = 50, 5, "kronfluence's EKFAC"
METHODS = {
    "gradient products": Implicit(Identity()),
    "MINRES(5)": Implicit(MINRES(terms=5), curvature=Exact()),
    "MINRES(10)": Implicit(MINRES(terms=10), curvature=Exact()),
    "MINRES(20)": Implicit(MINRES(terms=20), curvature=Exact()),
    "MINRES(20), damping 0.1": Implicit(MINRES(terms=20), curvature=Exact(), damping=0.1),
    "CG(50) on Gauss-Newton, damping 0.01": Implicit(CG(terms=50), curvature=GaussNewton(), damping=0.01),
}
DAMPING = {"EKFAC alone": 0.1, "EKFAC alone, damping 1": 1.0, "MINRES(3) behind EKFAC": 0.3}
TRAK = {  # how many dimensions gradients are projected to, and lambda_reg, which is 0 by default
    "TRAK": {"digits": (64, 0.0), "garments": (256, 0.0), "cnn": (32, 0.0)},
    "TRAK, damped": {"digits": (1024, 100.0), "garments": (1024, 100.0), "cnn": (1024, 1000.0)},
}
WAYS = (*METHODS, *DAMPING, KRONFLUENCE, *TRAK)
ENSEMBLES = ("MINRES(10)", "EKFAC alone", KRONFLUENCE, *TRAK)
PEERS = {KRONFLUENCE: "kronfluence", **dict.fromkeys(TRAK, "trak")}  # the modules that these ways need
SELF = {  # a solve for each of a thousand examples takes minutes, and with convolutions hours
    "garments": ("gradient products", "MINRES(5)", "MINRES(10)", "EKFAC alone", KRONFLUENCE),
    "cnn": ("gradient products", "EKFAC alone", KRONFLUENCE),
    "sentences": ("gradient products", "EKFAC alone"),
}
Batch = tuple[Tensor, Tensor]


def jobs(options: argparse.Namespace) -> Iterator[Row]:
    """Each way on each task, for one model and for five; and the influence of examples on themselves."""
    for way in options.ways:
        if way in PEERS and find_spec(PEERS[way]) is None:
            raise SystemExit(f"{way} is not installed: pip install kronfluence traker, or name other --ways")
    for seed in options.seeds:
        for task in options.tasks:
            for way in options.ways:
                if way in TRAK and task not in TRAK[way]:
                    continue  # sentences, where it takes too long
                yield {"task": task, "way": way, "models": 1, "kind": "scores", "seed": seed}
                if way in ENSEMBLES and task != "sentences":  # where it takes minutes
                    yield {"task": task, "way": way, "models": ENSEMBLE, "kind": "scores", "seed": seed}
                if way in SELF.get(task, ()):
                    yield {"task": task, "way": way, "models": 1, "kind": "self", "seed": seed}


def problem_of(model: nn.Module) -> Problem:
    """Its training loss, and one validation loss for each query."""
    parts = CompositeLoss(
        lambda model, _, batch: model(batch[0]),
        lambda z, _, batch: F.cross_entropy(z, batch[1]),
        lambda model, _: 0.5 * DECAY * sum(p.square().sum() for p in model.parameters()),
    )
    return Problem(model, None, parts, each)


def each(model: Any, _: Any, batch: Batch) -> Tensor:
    return losses_of(model, *batch)


def method_of(way: str, model: nn.Module, train: Batch) -> Implicit:
    if way in METHODS:
        return METHODS[way]
    batches = list(zip(train[0].split(250), train[1].split(250), strict=True))
    ekfac = EKFAC(model=model, criterion=nn.CrossEntropyLoss(), batches=batches, damping=DAMPING[way])
    return Implicit(Identity() if "alone" in way else MINRES(terms=3), curvature=Exact(), preconditioner=ekfac)


def scores_of(way: str, task: str, models: Sequence[nn.Module], train: Batch, queries: Batch) -> Tensor:
    """Of shape (queries, examples), by all of these models."""
    if way in TRAK:
        return trak(copy.deepcopy(models), train, queries, *TRAK[way][task])
    return torch.stack([scores_of_one(way, model, train, queries) for model in models]).mean(0)


def scores_of_one(way: str, model: nn.Module, train: Batch, queries: Batch) -> Tensor:
    """Likewise, by one model."""
    if way == KRONFLUENCE:
        return kronfluence(copy.deepcopy(model), train, queries)
    return influence(problem_of(model), each, train, queries, method_of(way, model, train)).scores


def self_scores_of(way: str, model: nn.Module, train: Batch) -> Tensor:
    if way == KRONFLUENCE:
        return kronfluence(copy.deepcopy(model), train, None)
    pieces = list(zip(train[0].split(100), train[1].split(100), strict=True))
    return self_influence(problem_of(model), each, train, method_of(way, model, train), examples=pieces).scores


@cache
def halves(root: Path, task: str, seed: int) -> tuple[Tensor, Tensor]:
    """Which examples each of the trainings had, as 0 and 1, and the losses of the queries after it."""
    x, y, *queries, _ = TASKS[task].data(root, seed)
    draw, had, losses = torch.Generator().manual_seed(seed), torch.zeros(HALVES, len(x)), []
    for row in had:
        half = torch.randperm(len(x), generator=draw)[: len(x) // 2]
        row[half] = 1
        losses.append(losses_of(TASKS[task].trained(root, x[half], y[half], seed), *queries).detach())
    return had, torch.stack(losses)


def ranks(values: Tensor) -> Tensor:
    """The rank of each number in its column, less the mean rank."""
    found = values.argsort(0).argsort(0).double()
    return found - found.mean(0)


def lds(scores: Tensor, had: Tensor, losses: Tensor) -> float:
    """The mean over the queries of the rank correlation of predicted and real losses."""
    one, other = ranks(had @ scores.T), ranks(losses)
    return float(((one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))).mean())


def found_first(scores: Tensor, wrong: Tensor) -> float:
    """The share of wrong labels among as many examples as there are wrong ones, those with the lowest scores."""
    return float(wrong[scores.argsort()[: int(wrong.sum())]].double().mean())


def run(root: Path, task: str, way: str, models: int, kind: str, seed: int) -> Iterator[dict[str, Any]]:
    """LDS, or the share of wrong labels that were found, and the processor seconds without the trainings."""
    x, y, qx, qy, wrong = TASKS[task].data(root, seed)
    trained = [TASKS[task].trained(root, x, y, seed + 1000 * k) for k in range(models)]
    begun = time.process_time()
    if kind == "self":
        value = found_first(self_scores_of(way, trained[0], (x, y)), wrong)
    else:
        scores = scores_of(way, task, trained, (x, y), (qx, qy))
    seconds = time.process_time() - begun
    if kind == "scores":
        value = lds(scores, *halves(root, task, seed))
    with torch.no_grad():
        by_loss = found_first(-losses_of(trained[0], x, y), wrong) if kind == "self" else 0.0
    yield {"value": value, "seconds": seconds, "by loss": by_loss}


def show(rows: Sequence[Row]) -> Iterator[str]:
    """LDS and seconds for each way, and the wrong labels that were found; apart for sentences, where not all was run."""
    known = list(dict.fromkeys(row["task"] for row in rows))
    for names in ([name for name in known if name != "sentences"], [name for name in known if name == "sentences"]):
        for kind, title in (("scores", "LDS"), ("self", "wrong labels found")):
            own = [row for row in rows if row["kind"] == kind and row["task"] in names]
            if own:
                yield table(own, names, title)


def table(rows: Sequence[Row], names: Sequence[str], title: str) -> str:
    """A line for each way, and for the training loss where wrong labels are found."""
    lines = []
    for way, models in dict.fromkeys((row["way"], row["models"]) for row in rows):
        cells = [way if models == 1 else f"{way}, mean of {models} models"]
        for name in names:
            where = {"task": name, "way": way, "models": models}
            found, seconds = (list(by_seed(rows, figure, **where).values()) for figure in ("value", "seconds"))
            cells += [mean_and_error(found), f"{mean(seconds):.1f}" if seconds else ""]
        lines.append(cells)
    if rows[0]["kind"] == "self":
        found = [list(by_seed(rows, "by loss", task=name).values()) for name in names]
        lines.append(["the training loss itself", *(cell for one in found for cell in (mean_and_error(one), ""))])
    return markdown([title, *(head for name in names for head in (TASKS[name].title, "seconds"))], lines)


def chosen(names: Sequence[str]) -> dict[str, Any]:
    return {"nargs": "+", "choices": list(names), "default": list(names), "help": "default: all"}


if __name__ == "__main__":
    Study(
        file=__file__, seeds=(0, 1, 2), jobs=jobs, run=run, show=show,
        more={"tasks": chosen(list(TASKS)), "ways": chosen(WAYS)},
    ).main(__doc__)  # fmt: skip
