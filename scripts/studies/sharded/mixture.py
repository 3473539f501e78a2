"""What each rank runs to learn how much four sources of text weigh: started by run.py with torchrun."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpt import each, sharded
from torch import Tensor
from torch import distributed as dist

import hoptim
from hoptim.recipes import DomainWeights

SOURCES = ("addresses 1790–1960", "addresses 1961–1992", "Moby-Dick", "shuffled bytes")
WIDTH, LAYERS, LENGTH = 512, 8, 32
A_SOURCE = 1  # rows of each source in a batch of a rank
RATE, OUTER_RATE = 5e-4, 0.2


def texts(root: Path) -> tuple[list[Tensor], Tensor, Tensor]:
    """The sources, and the validation and test texts: addresses of 1993–2021, the older and the newer half."""
    old, modern, target, novel = (
        torch.frombuffer(bytearray((root / "text" / f"{name}.txt").read_bytes()), dtype=torch.uint8).long()
        for name in ("train", "valid", "test", "moby_dick")
    )
    noise = old[torch.randperm(len(old), generator=torch.Generator().manual_seed(0))]
    half = len(target) // 2
    return [old, modern, novel, noise], target[:half], target[half:]


def rows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of bytes from random places of a text."""
    begin = torch.randint(len(text) - LENGTH - 1, (count, 1), generator=generator)
    return text[begin + torch.arange(LENGTH + 1)]


def batch(sources: list[Tensor], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """So many rows of each source, and the number of the source of each row."""
    return torch.cat([rows(text, count, generator) for text in sources]), torch.arange(4).repeat_interleave(count)


class Batches:
    """Batches without an end; each rank has its own."""

    def __init__(self, draw: Any, generator: torch.Generator) -> None:
        self.draw, self.generator = draw, generator

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.draw(self.generator)


@torch.no_grad()
def loss_on(model: Any, text: Tensor, count: int = 256) -> float:
    """The mean loss over rows that are evenly spread, the same for both ways; each rank has its part of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    begin = torch.linspace(0, len(text) - LENGTH - 2, count).long()[rank::ranks, None]
    found = [each(model(x[:, :-1]), x).sum() for x in text[begin + torch.arange(LENGTH + 1)].split(32)]
    total = torch.stack(found).sum()
    dist.all_reduce(total)
    return float(total) / count


def main(root: str, way: str, seed: int, steps: int, warmup: int, every: int) -> None:
    """Train one model and print the figures, each with the step it is of."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sources, val, test = texts(Path(root))
    model = sharded(WIDTH, LAYERS, ranks, seed)
    hparams = DomainWeights(dict.fromkeys(SOURCES, 1))

    def criterion(z: Tensor, hparams: Any, batch: Any) -> Tensor:
        return hparams.mean(each(z, batch[0]), batch[1])

    loss = hoptim.CompositeLoss(lambda model, _, batch: model(batch[0][:, :-1]), criterion)
    problem = hoptim.Problem(model, hparams, loss, lambda model, _, x: each(model(x[:, :-1]), x).mean())
    first, second, third = (torch.Generator().manual_seed(1000 * seed + 10 * rank + n) for n in range(3))
    inner = torch.optim.Adam(model.parameters(), lr=RATE)
    optimizer = hoptim.BilevelOptimizer(
        inner,
        torch.optim.Adam(hparams.parameters(), lr=OUTER_RATE),
        problem,
        val_batches=Batches(lambda g: rows(val, 8, g), second),
        train_batches=Batches(lambda g: batch(sources, A_SOURCE, g), third),
        warmup=warmup if way == "learned" else 2 * steps,
        every=every,
    )
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 20, 1 - n / steps))
    told: list[dict[str, Any]] = []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    hypersteps = 0

    def tell(step: int, **figures: float) -> None:
        told.extend({"at": step, "name": name, "value": value} for name, value in figures.items())
        if rank == 0:
            print(step, *(f"{name} {value:.4f}" for name, value in figures.items()), file=sys.stderr, flush=True)

    for step in range(1, steps + 1):
        begun, before = time.perf_counter(), optimizer.record
        optimizer.zero_grad()
        value = optimizer.loss(batch(sources, A_SOURCE, first))
        value.backward()
        optimizer.step()
        rate.step()
        is_hyper = optimizer.record is not before
        seconds[is_hyper].append(time.perf_counter() - begun)
        if is_hyper:
            hypersteps += 1
            tell(step, **dict(zip(SOURCES, hparams["mixture"].tolist(), strict=True)), ok=float(optimizer.record.status.ok))
        if step % 30 == 0 or step == steps:
            tell(step, validation=loss_on(model, val), test=loss_on(model, test))
    leaf = torch.cat([p.detach() for p in hparams.parameters()])
    every_leaf = [torch.empty_like(leaf) for _ in range(ranks)]
    dist.all_gather(every_leaf, leaf)
    middle = {is_hyper: sorted(found)[len(found) // 2] for is_hyper, found in seconds.items() if found}
    tell(steps, alike=float(all(torch.equal(one, leaf) for one in every_leaf)), hypersteps=hypersteps)
    tell(steps, **{"weights": sum(p.numel() for p in model.parameters()), "seconds of a step": middle[False]})
    tell(steps, **{"seconds of a step with a hyperstep": middle.get(True, 0.0), "seconds": sum(map(sum, seconds.values()))})
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
