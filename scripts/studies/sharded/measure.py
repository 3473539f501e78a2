"""What each rank runs to measure a training step and a hypergradient of a sharded GPT: started by run.py with torchrun."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpt import each, sharded
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hoptim
from hoptim.problem.distributed import all_gather, reduce_scatter
from hoptim.recipes import DomainWeights

KINDS = {
    "all_gather": "gather",
    "allgather": "gather",
    "reduce_scatter": "scatter",
    "all_reduce": "reduce",
    "allreduce": "reduce",
}
SIZES = (64, 2**16, 2**20, 2**22)  # bytes of the whole tensor


class Collectives(TorchDispatchMode):
    """Counts collectives and the bytes of their whole tensors, those of torch.distributed and those of DTensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note it if it is a collective."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its collectives come again, on plain tensors
        out = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name:
            kind = next((kind for word, kind in KINDS.items() if word in name), "other")
            self.count[kind] += 1
            self.bytes[kind] += max((t.nbytes for t in tree_leaves((args, out)) if isinstance(t, Tensor)), default=0)
        return out


def memory(name: str) -> float:
    """A figure of this process in MiB: VmRSS, what it has now, or VmHWM, the most since :func:`forget_peak`."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def seconds_of(act: Callable[[], Any], repeats: int = 9) -> float:
    """The median, after one call more."""
    found = []
    for _ in range(repeats + 1):
        dist.barrier()
        begun = time.perf_counter()
        act()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


def links(ranks: int) -> list[dict[str, Any]]:
    """The seconds of each collective at several sizes."""
    told = []
    for size in SIZES:
        whole = torch.zeros(size // 4)
        own = torch.zeros(size // 4 // ranks)
        acts: dict[str, Callable[[], Any]] = {
            "gather": lambda: all_gather(whole, own, None),  # noqa: B023
            "scatter": lambda: reduce_scatter(own, whole, None),  # noqa: B023
            "reduce": lambda: dist.all_reduce(whole),  # noqa: B023
        }
        told += [{"at": size, "name": f"{kind} seconds", "value": seconds_of(act)} for kind, act in acts.items()]
    return told


def main(layers: int, rows: int, length: int, curvature: str, repeats: int, seed: int) -> None:
    """Measure, and write the figures of the first rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    fully_shard(nn.Linear(4, 4))  # loads what torch needs for it before memory is measured
    base = memory("VmRSS")
    model = sharded(512, layers, ranks, seed)
    inner = torch.optim.Adam(model.parameters(), lr=1e-4)
    hparams = DomainWeights({"one": 1, "other": 1})
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randint(256, (2, rows, length + 1), generator=generator)
    source = torch.arange(rows) % 2

    def criterion(z: Tensor, hparams: Any, x: Tensor) -> Tensor:
        return hparams.mean(each(z, x), source)

    parts = hoptim.CompositeLoss(lambda model, _, x: model(x[:, :-1]), criterion)
    plain = lambda model, hparams, x: criterion(model(x[:, :-1]), hparams, x)  # noqa: E731
    loss = parts if curvature == "Gauss-Newton" else plain
    problem = hoptim.Problem(model, hparams, loss, lambda model, _, x: each(model(x[:, :-1]), x).mean())

    def step() -> None:
        inner.zero_grad()
        problem.loss(x[0]).backward()
        inner.step()

    def hypergradient() -> None:
        found = hoptim.hypergradient(problem, x[0], x[1])
        assert found.solution.status.ok, found.solution.status
        assert found.solution.products == 5

    def of(act: Callable[[], None]) -> tuple[float, float]:
        """The peak above the base, in MiB, and the seconds."""
        inner.zero_grad()
        dist.barrier()
        forget_peak()
        begun = time.perf_counter()
        act()
        return memory("VmHWM") - base, time.perf_counter() - begun

    step()
    step()
    inner.zero_grad()
    resting = memory("VmRSS") - base
    hypergradient()
    pairs = [(of(step), of(hypergradient)) for _ in range(repeats)]
    figures = {"weights": sum(p.numel() for p in model.parameters()), "MB at rest": resting}
    for n, unit in enumerate(("MB", "seconds")):
        for k, name in enumerate(("step", "hypergradient")):
            figures[f"{unit} of a {name}"] = statistics.median(pair[k][n] for pair in pairs)
        figures[f"{unit} in steps"] = statistics.median(pair[1][n] / pair[0][n] for pair in pairs)
    for name, act in (("step", step), ("hypergradient", hypergradient)):
        with Collectives() as found:
            act()
        for kind in ("gather", "scatter", "reduce", "other"):
            figures[f"{kind} messages of a {name}"] = found.count[kind]
            figures[f"{kind} bytes of a {name}"] = found.bytes[kind]
    told = [{"at": 0, "name": name, "value": value} for name, value in figures.items()] + links(ranks)
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
