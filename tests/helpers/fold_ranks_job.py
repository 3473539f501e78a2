"""Started once on each rank, as by torchrun: cross-validated fits whose models are wrapped; the answers go to a file."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hoptim import CrossValidated

N, STEPS = 24, 10
DRAW = torch.Generator().manual_seed(0)
X, Y = (torch.randn(N, n, generator=DRAW, dtype=torch.float64) for n in (3, 1))
UNEQUAL = [(list(range(8, 24)), list(range(8))), ([0, 1, 2, 3, 20, 21, 22, 23], list(range(4, 10)))]


class KilledError(Exception):
    pass


def val_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    model.eval()
    return (model(X[batch]) - Y[batch]).square().mean()


def train_loss(model: Any, hparams: Any, batch: Any) -> Tensor:
    fit = (model(X[batch]) - Y[batch]).square().mean()
    return fit + sum(hparams["decay"][i].exp() * model[3 * i].weight.square().sum() for i in (0, 1))


def fitted(rank: int, size: int, kill: int | None = None, dropout: float = 0.0, **options: Any) -> Any:
    """What a fit found, on this rank's share of each batch; of one process on all of it."""
    torch.manual_seed(rank)
    checkpoint = {key: options.pop(key) for key in ("checkpoint", "every_seconds") if key in options}
    taken = [0]

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 1))
        return DistributedDataParallel(model) if size > 1 else model

    def train(model: Any, optimizer: Any, examples: Tensor) -> None:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for step in optimizer.resumable(range(STEPS), scheduler):
            model.train()
            if taken[0] == kill:
                raise KilledError
            taken[0] += 1
            halves = [half[rank::size] for half in examples.roll(3 * step)[:8].chunk(2)]
            optimizer.zero_grad()
            with model.no_sync() if size > 1 else nullcontext():
                (optimizer.loss(halves[0]) / 2).backward()
            (optimizer.loss(halves[1]) / 2).backward()
            optimizer.step()
            scheduler.step()

    hparams = nn.ParameterDict({"decay": nn.Parameter(torch.tensor([-2.0, -1.0]) + rank)})
    settings = {"folds": 3, "hypersteps": 4, "val_batches": lambda held_out: [held_out[rank::size]], **options}
    cv = CrossValidated(
        make,
        hparams,
        train_loss,
        val_loss,
        inner=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        outer=torch.optim.Adam(hparams.parameters(), lr=0.1),
        examples=N,
        steps=STEPS,
        **settings,
    )
    found = cv.fit(train, **checkpoint)
    models = [getattr(model, "module", model) for model in (found.model, *found.models)]
    return {
        "learned": found.hyperparameters,
        "models": [dict(model.state_dict()) for model in models],
        "rows": [{key: value for key, value in row.items() if "seconds" not in key} for row in found.history],
        "folds": [(fold.train, fold.held_out) for fold in cv.folds],
        "random": torch.get_rng_state(),
        "steps": taken[0],
    }


def resumed(rank: int, size: int, folder: Path, kills: list[int]) -> Any:
    """A fit with dropout, of which each rank draws its own masks, killed and gone on with."""
    checkpoint = {"checkpoint": folder / f"fit{len(kills)}.pt", "every_seconds": 0}
    for kill in kills:
        try:
            fitted(rank, size, kill, 0.3, **checkpoint)
        except KilledError:
            continue
        raise AssertionError("it was not killed")
    return fitted(rank, size, None, 0.3, **(checkpoint if kills else {}))


def refused(rank: int, size: int, **options: Any) -> str:
    try:
        fitted(rank, size, **options)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    Path(folder / f"only{rank}.pt").touch()
    answers = {
        "joined": fitted(rank, size),
        "unequal": fitted(rank, size, folds=UNEQUAL, hypersteps=3),
        "whole": resumed(rank, size, folder, []),
        "resumed": resumed(rank, size, folder, [15, 20]),
        "other folds": refused(rank, size, folds=UNEQUAL if rank else UNEQUAL[::-1]),
        "own file": refused(rank, size, checkpoint=folder / f"only{0 if rank else 9}.pt"),
    }
    torch.save(answers, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
