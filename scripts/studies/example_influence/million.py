"""What a million examples cost: scores for one validation loss, from batches that are made one after the other.

    python scripts/studies/example_influence/million.py --data data                       # a minute
    python scripts/studies/example_influence/million.py --data data --task cnn --examples 10000 100000

Each example is an image of Fashion-MNIST with noise of its own, so that no two are the same. Memory is the peak of the
process above what it held before; it is read from /proc, so that this needs Linux. Seconds are of the processor, without
those of making the images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.tables import markdown
from studies.example_influence.run import each, problem_of
from studies.example_influence.tasks import TASKS, garments

from hoptim import Problem, influence

Batch = tuple[Tensor, Tensor]


def images(root: Path, count: int, size: int) -> Iterator[Batch]:
    """Batches of ``size`` images with noise, and their labels."""
    x, y = garments(root)
    draw = torch.Generator().manual_seed(0)
    for _ in range(count // size):
        index = torch.randint(len(x), (size,), generator=draw)
        yield x[index] + 0.1 * torch.randn(size, *x.shape[1:], generator=draw), y[index]


def peak(begin: bool = False) -> float:
    """The highest memory of this process in MiB, since the last call with ``begin``; Linux has it."""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def seconds(work: Callable[[Iterator[Batch]], Any], batches: Iterator[Batch]) -> float:
    """Processor seconds of work on all batches."""
    begun = time.process_time()
    work(batches)
    return time.process_time() - begun


def main() -> None:
    """Print a line for each number of examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="the folder of the data sets; default: data")
    parser.add_argument("--task", choices=("garments", "cnn"), default="garments", help="default: garments, an MLP")
    parser.add_argument("--examples", nargs="+", type=int, default=[10**4, 10**5, 10**6], help="default: up to a million")
    parser.add_argument("--size", type=int, default=1000, help="of a batch; default: 1000")
    given = parser.parse_args()
    torch.set_num_threads(1)
    x, y, *queries, _ = TASKS[given.task].data(given.data, 0)
    model = TASKS[given.task].trained(given.data, x, y, 0)
    problem = Problem(model, None, problem_of(model).train_loss, lambda *of: each(*of).mean())

    def scored(batches: Iterator[Batch]) -> None:
        influence(problem, each, (x, y), queries, examples=batches)

    def gradients(batches: Iterator[Batch]) -> None:
        for batch in batches:
            torch.autograd.grad(each(model, None, batch).mean(), list(model.parameters()))

    scored(images(given.data, 3 * given.size, given.size))
    lines = []
    for count in given.examples:
        before = peak(begin=True)
        found = seconds(scored, images(given.data, count, given.size))
        memory = peak() - before
        made, once = (seconds(work, images(given.data, count, given.size)) for work in (made_alone, gradients))
        figures = (found - made, (found - made) / (once - made), memory)
        lines.append([f"{count:,}", *(f"{figure:.1f}" for figure in figures)])
    print(markdown(["examples", "seconds", "of as many gradients", "MiB"], lines))


def made_alone(batches: Iterator[Batch]) -> None:
    """Make the images alone."""
    for _ in batches:
        pass


if __name__ == "__main__":
    main()
